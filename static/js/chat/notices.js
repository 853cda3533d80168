/** Notices below answers: what went wrong, and what can be done about it. */

import { number, whySlow } from "../shared/words.js";
import { forgetUpTo } from "./transcript.js";

const RELOAD = "This page is older than the server, which does not know it any more.";
const UNKNOWN = "The server did not accept the key of this page.";

export class Notices {
  #list;
  #actions;
  #slow = null; // {id, notice} of an answer of which that was said
  #asked = new Set(); // ids of the answers for which a key was asked for

  /** @param {{proceed: Function, forget: Function, newChat: Function, pageToken: string}} actions */
  constructor(list, actions) {
    this.#list = list;
    this.#actions = actions;
  }

  /** An answer begins, or goes on: what was said of it is over. */
  begun({ answer: { id } }) {
    this.#slow = null;
    this.#asked.delete(id);
  }

  /**
   * Say below the last answer what is to be done about it, if anything is. What is said already stays as it is.
   *
   * @param {number} limit tokens that the model can read
   * @param {boolean} full whether the chat has as many
   */
  show(conversation, limit, full) {
    const { path, last } = conversation;
    for (const { id, role } of path) {
      if (role !== "assistant") continue;
      const notice = id === last.id ? this.#of(conversation, limit, full) : null;
      if (notice) this.#list.get(id).notice(...notice);
      else this.#list.get(id).clearNotice();
    }
    if (last?.error?.code === "invalid_api_key") this.#askForKey(last.id);
  }

  /** Say that a running answer is slow, and why. */
  slow(view, { rate, answer }) {
    const notice = [whySlow(rate.perSecond, answer.stats.route), ["How to add a machine", "swarm#add"]];
    this.#slow = { id: answer.id, notice };
    view.notice(...notice);
  }

  /** @returns {[string, ...[string, Function | string][]] | undefined} the words below the last answer, and the buttons */
  #of(conversation, limit, full) {
    const { id, state, text, error } = conversation.last;
    const { code, words } = error ?? {};
    const retry = () => this.#actions.proceed(id);
    const reads = `the model can read ${number(limit)} tokens`;
    if (code === "too_long") return this.#offerRoom(conversation, limit, `This chat has no room left for your message: ${reads}.`);
    if (code === "invalid_api_key" && this.#actions.pageToken) return [RELOAD, ["Load it again", () => location.reload()]];
    if (code === "invalid_api_key") return [UNKNOWN, ["Retry", retry]];
    if (words) return [words, [text ? "Continue" : "Retry", retry]];
    if (full && state !== "running") return this.#offerRoom(conversation, limit, `This chat is full: ${reads}.`);
    return this.#slow?.id === id ? this.#slow.notice : undefined;
  }

  /** The context is full: let the user choose what to do. */
  #offerRoom({ chat, path, last }, limit, words) {
    const from = forgetUpTo(path, limit, chat.forgotten);
    const choices = [["New chat", () => this.#actions.newChat()]];
    if (from) choices.unshift(["Go on without the oldest messages", () => this.#actions.forget(last.id, from)]);
    return [words, ...choices];
  }

  /** Once for each failure: who puts it off can still retry. */
  async #askForKey(id) {
    const { pageToken, proceed } = this.#actions;
    if (pageToken || this.#asked.has(id)) return;
    this.#asked.add(id);
    const { askForKey } = await import("../shared/key.js");
    await askForKey(() => proceed(id));
  }
}
