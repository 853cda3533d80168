/**
 * A chat's inference session on the server, which the chat outlives: it is opened when it is needed, made longer when it
 * is full, taken up again when the connection was lost, and replaced when it is gone. Knows nothing of the page.
 */

import { pause } from "../shared/pause.js";
import { DOWN, readiness } from "./readiness.js";
import { ConnectionLost, InferenceSocket, RequestFailed, ResponseTimeout } from "./socket.js";
import { inputsAfter, textOf } from "./transcript.js";

const PATIENCE_MS = 20_000; // with a model that has failed, or a server that cannot be reached, before an answer begins
const RESUME_TIMEOUT = 60; // seconds that the server keeps an answer without its connection, until it says its own
const RETRY_MS = 500; // between two tries to connect anew
const ROOM = 512; // tokens that a new session has left for an answer at least, where the model allows it
const CHARACTERS_PER_TOKEN = 3; // about; it is checked by the server

/** The answer was running when the page was left, and the server has not kept it. */
export class Interrupted extends Error {
  name = "Interrupted";
}

export class ChatSession {
  #url;
  #model;
  #limitOf;
  #pageToken;
  #socket = null;
  #sessionId = null;
  #answers = 0; // begun in this session
  #received = 0; // responses of the last one that have arrived
  #held = ""; // what stands in the session's context
  #before = null; // the same before the last request, if it is known
  #length = 0; // tokens that the session takes
  #resumeTimeout = RESUME_TIMEOUT;
  #stopAsked = false;

  /**
   * @param {{name: string, max_length: number}} model `max_length`: tokens of a session to begin with
   * @param {{limit: () => number, pageToken: string}} options `limit`: tokens that a session of this model may have at most
   */
  constructor(model, { limit, pageToken }) {
    this.#model = model;
    this.#limitOf = limit;
    this.#pageToken = pageToken;
    this.#url = new URL("api/v2/generate", document.baseURI);
    this.#url.protocol = this.#url.protocol.replace("http", "ws");
  }

  get #limit() {
    return Math.max(this.#limitOf(), this.#model.max_length);
  }

  /** How long to try to come back to a lost answer: as long as it is kept, and as with a server that is just restarted. */
  get #patience() {
    return Math.max(PATIENCE_MS, 1000 * this.#resumeTimeout);
  }

  get model() {
    return this.#model.name;
  }

  /** Where the running answer can be taken up by another page: see `answer`. */
  get point() {
    return { sessionId: this.#sessionId, answers: this.#answers, received: this.#received, length: this.#length, resumeTimeout: this.#resumeTimeout };
  }

  /**
   * Let the model go on from a transcript.
   *
   * Yields {begun: true} when the server has been asked, so that from then on another page can take the answer up; and the
   * server's messages: responses ({outputs, token_count, position, stop, ...}), {queue: {position}} and
   * {swarm: {route | lost | prefill}}; while the model is not ready, {status: words}; and, while there is no connection,
   * {reconnecting: true}. If the connection is lost the answer goes on by itself, from where it is; the text that was
   * yielded stays valid.
   *
   * @param {import("./transcript.js").Piece[]} transcript what the model is to read, up to where it goes on
   * @param {object} parameters of the protocol's `generate`
   * @param {object} options
   * @param {AbortSignal} options.signal gives the answer up
   * @param {number} [options.position] about how many tokens the transcript has
   * @param {object | null} [options.point] where a page before this one left the answer, whose text so far ends the
   *   transcript
   * @throws {import("./socket.js").SocketError | Interrupted}
   */
  async *answer(transcript, parameters, { signal, position = 0, point = null }) {
    signal.throwIfAborted();
    this.#stopAsked = false;
    const run = { transcript, parameters, signal, position, text: "", tokens: 0, isNew: point === null, again: false };
    let how = point ? "resume" : "generate";
    if (point) this.#restore(point, textOf(transcript));
    let patientUntil = performance.now() + this.#patience;
    signal.addEventListener("abort", () => this.close(), { once: true });
    for (;;) {
      try {
        const messages = how === "resume" ? this.#resume(run) : this.#generate(run);
        for await (const message of messages) {
          if (!message.status) patientUntil = performance.now() + this.#patience;
          if (this.#isFull(message)) {
            yield { ...message, stop: false, finish_reason: undefined };
            break;
          }
          yield message;
          if (message.stop) return;
        }
        this.#grow();
        how = "generate";
      } catch (error) {
        signal.throwIfAborted();
        how = this.#wayOn(error, run);
        // What was to be stopped is not taken up again.
        if (how === null || this.#stopAsked || performance.now() > patientUntil) throw error;
        if (!(error instanceof RequestFailed)) {
          yield { reconnecting: true };
          await pause(RETRY_MS, signal);
        }
      }
    }
  }

  /** End the running answer soon. Returns false if that cannot be asked of the server. */
  stop() {
    this.#stopAsked = true;
    return this.#socket?.stop() ?? false;
  }

  /** The network has changed: the connection may be dead without any event. */
  reconnect() {
    this.#socket?.drop();
  }

  /** Let the session go. May be called at any time, and twice. */
  close() {
    this.#socket?.close();
    this.#socket = null;
    this.#sessionId = null;
    this.#held = "";
  }

  /** What to do after a failure; null: nothing helps. */
  #wayOn(error, run) {
    if (error instanceof RequestFailed) {
      this.close();
      if (error.code === "too_long" && this.#length < this.#limit) {
        this.#grow();
        return "generate";
      }
      if (error.code !== "session_not_found" || run.again) return null;
      // It has ended while nobody looked: the same is asked of a new one, but for what a page before this one asked,
      // which may be long ago.
      if (!run.isNew && !run.text) throw new Interrupted("The answer was interrupted.");
      run.again = true;
      return "generate";
    }
    if (error instanceof ConnectionLost || error instanceof ResponseTimeout) {
      this.#socket = null;
      return this.#sessionId ? "resume" : "generate";
    }
    return null;
  }

  async *#generate(run) {
    const { transcript, parameters, signal, position, text } = run;
    const pieces = [...transcript, { text, plain: true }];
    const whole = textOf(pieces);
    if (!this.#socket?.isOpen || !whole.startsWith(this.#held)) yield* this.#open(whole, position, signal);
    const inputs = inputsAfter(pieces, this.#held.length);
    this.#before = this.#held;
    this.#held = whole;
    this.#answers += 1;
    this.#received = 0;
    const messages = this.#socket.generate({ ...inputs, ...parameters, ...bound(parameters, run.tokens) });
    yield { begun: true };
    yield* this.#follow(run, messages);
  }

  async *#resume(run) {
    yield* this.#ready(run.signal);
    const socket = (this.#socket = new InferenceSocket(this.#url));
    const updates = [];
    const options = { ...this.point, pageToken: this.#pageToken };
    const { answers } = await socket.resume(options, (update) => updates.push(update));
    yield* updates;
    if (answers < this.#answers) {
      // The request was lost with the connection.
      this.#answers = answers;
      if (this.#before === null) this.close();
      else this.#held = this.#before;
      yield* this.#generate(run);
    } else {
      yield* this.#follow(run, socket.responses());
    }
  }

  async *#follow(run, messages) {
    for await (const message of messages) {
      if (message.outputs !== undefined) {
        this.#received += 1;
        run.text += message.outputs;
        run.tokens += message.token_count;
        this.#held += message.outputs + (message.stop_sequence ?? "");
        run.position = message.position ?? run.position;
      }
      yield message;
    }
  }

  async *#open(whole, position, signal) {
    this.close();
    yield* this.#ready(signal);
    const needed = Math.max(position, whole.length / CHARACTERS_PER_TOKEN) + ROOM;
    this.#length ||= this.#model.max_length;
    while (this.#length < this.#limit && this.#length < needed) this.#grow();
    const socket = (this.#socket = new InferenceSocket(this.#url));
    const updates = new Updates();
    const options = { model: this.#model.name, maxLength: this.#length, pageToken: this.#pageToken };
    const opening = socket.open(options, (update) => updates.push(update)).finally(() => updates.end());
    yield* updates;
    const { session_id: sessionId, resume_timeout: resumeTimeout } = await opening;
    this.#sessionId = sessionId;
    this.#resumeTimeout = resumeTimeout ?? RESUME_TIMEOUT;
    this.#answers = 0;
  }

  #restore({ sessionId, answers, received, length, resumeTimeout = RESUME_TIMEOUT }, held) {
    this.close();
    this.#sessionId = sessionId;
    this.#answers = answers;
    this.#received = received;
    this.#length = length;
    this.#resumeTimeout = resumeTimeout;
    this.#held = held;
    this.#before = null;
  }

  /** Whether an answer has ended because the session, but not the model's context, is full. */
  #isFull({ finish_reason: reason, position }) {
    return reason === "length" && position >= this.#length && this.#length < this.#limit;
  }

  /** Let the next session be longer. Twice as long: each one reads all that is before it anew. */
  #grow() {
    this.close();
    this.#length = Math.min(2 * this.#length, this.#limit);
  }

  async *#ready(signal) {
    const patientUntil = performance.now() + PATIENCE_MS;
    for await (const { state, words } of readiness(this.#model.name, this.#pageToken, signal)) {
      if (DOWN.has(state) && performance.now() > patientUntil) throw new ConnectionLost(`${words}.`);
      if (state !== "ready") yield { status: words };
    }
  }
}

/** What is left of the tokens that an answer may have, when it goes on in another session. */
function bound({ max_answer_tokens: most }, tokens) {
  return most === undefined ? {} : { max_answer_tokens: Math.max(1, most - tokens) };
}

/** What comes one by one from a callback, as an iteration. */
class Updates {
  #items = [];
  #ended = false;
  #wake = () => {};

  push(item) {
    this.#items.push(item);
    this.#wake();
  }

  end() {
    this.#ended = true;
    this.#wake();
  }

  async *[Symbol.asyncIterator]() {
    while (!this.#ended || this.#items.length) {
      if (this.#items.length) yield this.#items.shift();
      else await new Promise((resolve) => (this.#wake = resolve));
    }
  }
}
