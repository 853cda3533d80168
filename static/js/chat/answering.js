/** Writes answers: one at a time in each chat, and in several chats at once. */

import { number, plural } from "../shared/words.js";
import { RECONNECTING, whyItFailed } from "./error-words.js";
import { lock } from "./lock.js";
import { RunningAnswer } from "./running-answer.js";
import { ChatSession, Interrupted } from "./session.js";
import { samplingParameters } from "./settings.js";
import { RequestFailed, SocketError, TakenOver } from "./socket.js";
import { transcript } from "./transcript.js";

const KEEP_MS = 300; // between two times that a growing answer is kept: what a reload may have to ask for again
const STILL_WAITING_MS = 60_000; // for an answer to a question that was asked just before the page was left
const REFUSALS = new Set(["too_long", "invalid_parameter", "request_too_large"]); // of a question: it would be refused again

export class Answering {
  elsewhere = false; // whether another window writes in the chat that is open
  #running;
  #chats;
  #models;
  #page;
  #session = null; // of the chat that is open, while nothing is written there
  #away = new AbortController(); // ends the waiting for another window

  /**
   * @param {Map<string, RunningAnswer>} running of each chat, by its id
   * @param {object} page `view(id)` of a message; `refresh({failed})`, `begun(run)`, `ended(run)`, `words(run)`, `said(text)`,
   *   `position(tokens)` and `slow(view, run)`: what has changed; `pageToken`
   */
  constructor(running, chats, models, page) {
    this.#running = running;
    this.#chats = chats;
    this.#models = models;
    this.#page = page;
    addEventListener("online", () => running.forEach(({ session }) => session.reconnect()));
    addEventListener("pagehide", () => running.forEach((run) => this.#keepNow(run)));
  }

  /** What is being written in the chat that is open. */
  get run() {
    return this.#running.get(this.#chats.open.chat.id);
  }

  /** Let go of the open chat's session: another model is to be asked. */
  closeSession() {
    this.#session?.close();
    this.#session = null;
  }

  /** Another chat is to be shown. */
  leave() {
    this.closeSession();
    this.#away.abort();
    this.#away = new AbortController();
    this.elsewhere = false;
  }

  /** Take up the answer that was running when the page was left, if there is one, unless another window writes it. */
  async resume() {
    const conversation = this.#chats.open;
    const answer = conversation.last;
    if (answer?.state !== "running" || this.run) return;
    const { signal } = this.#away;
    this.elsewhere = true;
    this.#page.refresh();
    const held = await lock(answer.id, signal); // at once, or when the other window has ended
    const kept = await this.#chats.conversation(conversation.chat.id, conversation);
    if (signal.aborted || this.#chats.open !== conversation || !kept) {
      held?.release();
      return;
    }
    this.elsewhere = false;
    const now = kept.tree.get(answer.id);
    if (now?.state !== "running") {
      held?.release();
      this.#chats.show(kept);
      return;
    }
    Object.assign(answer, now);
    if (answer.point?.sessionId || Date.now() - answer.created < STILL_WAITING_MS) {
      await this.write(answer, { point: answer.point, held });
      return;
    }
    Object.assign(answer, { state: "interrupted", error: { words: whyItFailed(new Interrupted()) } });
    held?.release();
    await this.#chats.keep(conversation, [answer]);
    this.#page.refresh();
  }

  /** Write an answer of the open chat. */
  async write(answer, { point = null, held = null } = {}) {
    const conversation = this.#chats.open;
    const { chat, tree } = conversation;
    const model = this.#models.find(answer.model) ?? this.#models.find(chat.model);
    const run = new RunningAnswer({ conversation, answer, session: this.#takeSession(model), model });
    this.#running.set(chat.id, run);
    this.#page.begun(run);
    this.#page.refresh();
    // The answer, its question, and the answer that was wanting before that, if there was one: the others are kept.
    const latest = tree.pathTo(answer.id).slice(-3);
    const kept = this.#chats.keep(conversation, latest).then(() => this.#chats.list());
    held ??= await lock(answer.id, run.abort.signal);
    let error = null;
    try {
      const options = { signal: run.abort.signal, position: conversation.position(answer.id), point };
      for await (const message of run.session.answer(transcriptOf(run), parametersOf(run), options)) this.#take(run, message);
    } catch (caught) {
      error = caught;
    }
    await kept;
    try {
      // The session has read another system prompt than the next question is to be asked with.
      if (point && point.system !== chat.system) run.session.close();
      await this.#finish(run, error);
    } finally {
      held?.release();
      run.end();
    }
  }

  #takeSession(model) {
    const session = this.#session;
    this.#session = null;
    if (session?.model === model.name) return session;
    session?.close();
    return new ChatSession(model, { limit: () => this.#models.limit(model.name), pageToken: this.#page.pageToken });
  }

  /** Take in what the server says. */
  #take(run, message) {
    const { answer } = run;
    const view = this.#page.view(answer.id);
    if (message.outputs !== undefined) {
      answer.text += message.outputs;
      answer.stopSequence = message.stop_sequence ?? null;
      run.count(message);
      view?.append(message.outputs);
      view?.note("");
      run.words = "Answering…";
      if (view) this.#page.said(message.outputs);
      if (view && run.isSlow) {
        run.saidWhy = true;
        this.#page.slow(view, run);
      }
      run.keepTimer ||= setTimeout(() => this.#keepNow(run), KEEP_MS);
      if (view && message.stop !== true) this.#page.position(answer.stats.position ?? 0);
    } else if (message.begun) {
      this.#keepNow(run);
    } else if (message.swarm) {
      run.notice(message.swarm);
      view?.showStats();
      const { prefill } = message.swarm;
      if (prefill) view?.note(`Reading: ${number(prefill.processed)} of ${number(prefill.total)} tokens`);
    } else {
      run.words = message.reconnecting ? RECONNECTING : message.status ?? placeInQueue(message.queue.position);
      view?.note(run.words);
    }
    if (run === this.run && !run.stopping) this.#page.words(run);
  }

  #keepNow(run) {
    clearTimeout(run.keepTimer);
    run.keepTimer = 0;
    run.answer.point = { ...run.session.point, system: run.conversation.chat.system };
    this.#chats.keepMessage(run.answer);
  }

  async #finish(run, error) {
    const { answer, conversation, session } = run;
    const { chat } = conversation;
    const isOpen = () => conversation === this.#chats.open;
    clearTimeout(run.keepTimer);
    if (error instanceof TakenOver) {
      // What is kept of the answer is the other window's now.
      this.#running.delete(chat.id);
      const kept = await this.#chats.conversation(chat.id, conversation);
      if (kept && isOpen()) this.#chats.show(kept);
      return;
    }
    const givenUp = run.stopping || run.abort.signal.aborted;
    const failed = error && !givenUp;
    if (error) session.close();
    if (failed && !(error instanceof SocketError || error instanceof Interrupted)) console.error(error);
    Object.assign(answer, {
      point: null,
      state: failed ? stateAfter(error) : givenUp || answer.stats.reason === "cancelled" ? "stopped" : "done",
      error: failed ? { code: error.code, words: whyItFailed(error) } : null,
      ...(error ? { stopSequence: null } : {}),
    });
    await this.#chats.keep(conversation, [answer]);
    this.#running.delete(chat.id);
    if (isOpen() && chat.model === run.model.name) this.#session = session;
    else session.close();
    if (isOpen()) this.#page.ended(run, failed);
    await this.#chats.list();
  }
}

/** The conversation up to an answer, as its model reads it. */
function transcriptOf({ conversation, answer, model }) {
  const { chat, tree } = conversation;
  const path = tree.pathTo(answer.id);
  const start = Math.max(0, path.findIndex(({ id }) => id === chat.forgotten));
  return transcript(path.slice(start), model.chat, model.name, chat.system ?? undefined);
}

function parametersOf({ conversation, answer, model }) {
  const { chat, tree } = conversation;
  const [stop, ...others] = model.chat.stop;
  const { seed, ...settings } = samplingParameters(chat.settings);
  // Rounds of one token: the answer arrives token by token. Another answer to the same question is to be another one.
  const streaming = { max_new_tokens: 1, stop_sequence: stop, extra_stop_sequences: others };
  const fixed = seed === undefined ? {} : { seed: seed + tree.siblings(answer.id).indexOf(answer.id) };
  return { model_defaults: true, ...settings, ...fixed, ...streaming };
}

function stateAfter(error) {
  if (error instanceof Interrupted) return "interrupted";
  return error instanceof RequestFailed && REFUSALS.has(error.code) ? "refused" : "failed";
}

function placeInQueue(position) {
  return position === 1 ? "In the queue: you are next" : `In the queue: ${plural(position - 1, "other")} before you`;
}
