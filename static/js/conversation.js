/** The conversation, and how it becomes model input. Knows nothing of the page or of the network. */

/**
 * How a model wants to be spoken to.
 *
 * @typedef {object} ChatFormat
 * @property {string} begin what every context begins with, such as the system message
 * @property {string} user a question, "{text}" standing for its text; ends where the answer begins
 * @property {string} turn_end what stands between an answer and the next question
 * @property {string[]} stop the texts that end an answer
 */

export class Conversation {
  #format;
  /** @type {{question: string, answer: string | null, stopSequence: string | null}[]} */
  #exchanges = [];
  #inContext = false; // whether the inference session holds all that comes before the last question
  #refused = false;
  #full = false;

  /** @param {ChatFormat} format */
  constructor(format) {
    this.#format = format;
  }

  /** Whether the context has reached its maximum length, so that there is no room for another question. */
  get full() {
    return this.#full;
  }

  /** The answer to the last question so far; empty before its first text. */
  get answer() {
    return this.#exchanges.at(-1)?.answer ?? "";
  }

  /**
   * Add a question. One before it that got no answer is asked along with it, so that nothing the user wrote is lost,
   * unless the server refused it: it would be refused again.
   */
  ask(text) {
    const unanswered = this.#exchanges.at(-1)?.answer === null ? this.#exchanges.pop() : null;
    const question = unanswered && !this.#refused ? `${unanswered.question}\n\n${text}` : text;
    this.#exchanges.push({ question, answer: null, stopSequence: null });
    this.#refused = false;
  }

  /** Ask the last question again, as if it had not been answered. */
  retry() {
    const last = this.#exchanges.at(-1);
    this.#exchanges.splice(-1, 1, { question: last.question, answer: null, stopSequence: null });
    this.#refused = false;
    this.forget();
  }

  /** What to send to get the last question answered: all of the conversation, or what the session does not hold yet. */
  input() {
    return this.#inContext ? this.#opening(this.#exchanges.length - 1) : this.transcript();
  }

  /** The whole conversation exactly as it stands in the model's context. */
  transcript() {
    return this.#exchanges
      .map(({ answer, stopSequence }, i) => this.#opening(i) + (answer ?? "") + (stopSequence ?? ""))
      .join("");
  }

  /** Add the next piece of the answer. */
  receive(text) {
    const last = this.#exchanges.at(-1);
    last.answer = (last.answer ?? "") + text;
  }

  /** The answer is complete and in the session's context, with the stop sequence, if any, that ended it. */
  finish({ finish_reason: reason, stop_sequence: stopSequence = null }) {
    this.receive("");
    this.#exchanges.at(-1).stopSequence = stopSequence;
    this.#inContext = true;
    this.#full = reason === "length";
  }

  /** The answer was given up; what has come of it stays. */
  abandon() {
    this.receive("");
    this.forget();
  }

  /** The answer failed; what has come of it stays. `refused`: the server would not take the question. */
  fail({ refused }) {
    const last = this.#exchanges.at(-1);
    last.answer ||= null;
    this.#refused = refused;
    this.forget();
  }

  /** The session is gone: the next input is the whole transcript. */
  forget() {
    this.#inContext = false;
  }

  /** Go on with another model. The transcript is written anew in its format. */
  reformat(format) {
    this.#format = format;
    for (const each of this.#exchanges) each.stopSequence = null;
    this.#full = false;
    this.forget();
  }

  /** What comes before the answer number i, and after the one before it. */
  #opening(i) {
    const { begin, user, turn_end: turnEnd } = this.#format;
    // A function, for in a replacement text "$&" and its like would not stand for themselves.
    const question = user.replace("{text}", () => this.#exchanges[i].question);
    if (i === 0) return begin + question;
    const input = turnEnd + question;
    const inContext = this.#exchanges[i - 1].stopSequence ?? "";
    return input.startsWith(inContext) ? input.slice(inContext.length) : input;
  }
}

/** The speed of an answer: tokens per second between its first response and its last. Times are in milliseconds. */
export class TokenRate {
  tokens = 0;
  #firstTokens = 0;
  #firstAt = null;
  #lastAt = null;

  add(tokenCount, at) {
    if (!tokenCount) return;
    this.tokens += tokenCount;
    if (this.#firstAt === null) {
      this.#firstAt = at;
      this.#firstTokens = tokenCount;
    }
    this.#lastAt = at;
  }

  /** null while there is nothing to measure between. */
  get perSecond() {
    const seconds = (this.#lastAt - this.#firstAt) / 1000;
    return seconds > 0 ? (this.tokens - this.#firstTokens) / seconds : null;
  }
}
