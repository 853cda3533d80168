/** Notices below answers: what went wrong, and what can be done about it. */

import { number, whySlow } from "../shared/words.js";
import { forgetUpTo } from "./transcript.js";

export class Notices {
  #list;
  #actions;

  /** @param {{proceed: Function, again: Function, forget: Function, newChat: Function, pageToken: string}} actions */
  constructor(list, actions) {
    this.#list = list;
    this.#actions = actions;
  }

  clear({ path }) {
    for (const { id, role } of path) if (role === "assistant") this.#list.get(id)?.clearNotice();
  }

  /**
   * Say below the last answer what is to be done about it, if anything is.
   *
   * @param {number} limit tokens that the model can read
   * @param {boolean} full whether the chat has as many
   */
  show(conversation, limit, full) {
    const answer = conversation.last;
    if (answer?.role !== "assistant" || answer.state === "running") return;
    const { code, words } = answer.error ?? {};
    const view = this.#list.get(answer.id);
    const { proceed, again, pageToken } = this.#actions;
    const retry = () => (answer.text ? proceed(answer.id) : again(answer));
    const reads = `the model can read ${number(limit)} tokens`;
    if (code === "too_long") this.#offerRoom(conversation, limit, `This chat has no room left for your message: ${reads}.`);
    else if (code === "invalid_api_key") import("../shared/key.js").then((key) => key.refused(view, pageToken, retry));
    else if (words) view.notice(words, [answer.text ? "Continue" : "Retry", retry]);
    else if (full) this.#offerRoom(conversation, limit, `This chat is full: ${reads}.`);
  }

  /** The context is full: let the user choose what to do. */
  #offerRoom({ chat, path, last }, limit, words) {
    const from = forgetUpTo(path, limit, chat.forgotten);
    const choices = [["New chat", () => this.#actions.newChat()]];
    if (from) choices.unshift(["Go on without the oldest messages", () => this.#actions.forget(last, from)]);
    this.#list.get(last.id).notice(words, ...choices);
  }

  slow(view, { rate, answer }) {
    view.notice(whySlow(rate.perSecond, answer.stats.route), ["How to add a machine", "swarm#add"]);
  }
}
