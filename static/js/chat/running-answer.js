/** An answer that is being written, and what is reported of it. Knows nothing of the page. */

import { blocks, serverName } from "../shared/words.js";

const SLOW_AFTER = 4; // seconds of an answer, before its speed is judged
const SLOW = 1; // tokens per second: slower than anybody reads

/** An answer that is being written. */
export class RunningAnswer {
  abort = new AbortController();
  rate = new TokenRate();
  stopping = false;
  saidWhy = false;
  keepTimer = 0;
  words = "Answering…";
  #began = performance.now();
  #lostAt = null;

  constructor({ conversation, answer, session, model }) {
    Object.assign(this, { conversation, answer, session, model });
    this.ended = new Promise((resolve) => (this.end = resolve));
    this.rate.tokens = answer.stats?.tokens ?? 0;
    answer.stats ??= { tokens: 0 };
    answer.stats.events ??= [];
    delete answer.stats.reason;
  }

  /** Count a response. */
  count({ token_count: tokens, position, finish_reason: reason }) {
    const { stats } = this.answer;
    const now = performance.now();
    this.rate.add(tokens, now);
    if (tokens && this.#lostAt !== null) this.#heal();
    if (tokens) stats.firstToken ??= (now - this.#began) / 1000;
    stats.tokens = this.rate.tokens;
    stats.perSecond = this.rate.perSecond ?? stats.perSecond;
    stats.position = position ?? stats.position;
    if (reason) stats.reason = reason;
  }

  /** Note what the server tells of the swarm. */
  notice({ route, lost }) {
    const { stats } = this.answer;
    if (lost) this.#notice(lost);
    if (route) stats.route = route;
  }

  /** A server was lost; until the next token comes, whatever else is tried and lost belongs to it. */
  #notice(lost) {
    const { events, route } = this.answer.stats;
    if (this.#lostAt !== null) return;
    this.#lostAt = performance.now();
    // The message says which peer it was; its name stood in the route.
    lost.name ??= route?.find(({ peer_id: peer }) => peer === lost.peer_id)?.name;
    const words = `Healing: ${serverName(lost)} with ${blocks(lost)} was lost; looking for another server.`;
    events.push({ words, lost, healed: false });
  }

  #heal() {
    const seconds = ((performance.now() - this.#lostAt) / 1000).toFixed(2);
    this.#lostAt = null;
    const { events, route = [] } = this.answer.stats;
    const event = events.at(-1);
    const { lost } = event;
    const now = route.filter(({ start, end }) => start < lost.end && end > lost.start);
    const back = now.every(({ peer_id: peer }) => peer === lost.peer_id);
    const how = back ? "it came back" : `${now.map(serverName).join(" and ")} took over`;
    event.words = `Healed in ${seconds} s: ${serverName(lost)} with ${blocks(lost)} was lost, ${how}. No token was lost.`;
    event.healed = true;
  }

  get isSlow() {
    return !this.saidWhy && this.rate.seconds > SLOW_AFTER && this.rate.perSecond < SLOW;
  }

  /** End it: in good order if the server can be asked to, else, or if that was asked before, at once. */
  stop() {
    if (this.stopping || !this.session.stop()) this.abort.abort();
    this.stopping = true;
  }
}

/** The speed of an answer: tokens per second between its first response and its last. Times are in milliseconds. */
class TokenRate {
  tokens = 0;
  #firstTokens = 0;
  #firstAt = null;
  #lastAt = null;

  add(tokenCount, at) {
    if (!tokenCount) return;
    this.tokens += tokenCount;
    if (this.#firstAt === null) {
      this.#firstAt = at;
      this.#firstTokens = this.tokens;
    }
    this.#lastAt = at;
  }

  /** null while there is nothing to measure between. */
  get perSecond() {
    const seconds = (this.#lastAt - this.#firstAt) / 1000;
    return seconds > 0 ? (this.tokens - this.#firstTokens) / seconds : null;
  }

  /** How long it has been measured. */
  get seconds() {
    return (this.#lastAt - this.#firstAt) / 1000;
  }
}
