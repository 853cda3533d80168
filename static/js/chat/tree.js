/** The messages of a chat. Knows nothing of the page, of storage or of the network. */

/**
 * @typedef {object} Message
 * @property {string} id
 * @property {string} chat the chat's id
 * @property {string | null} parent the message that it follows; null: the first one
 * @property {"user" | "assistant"} role
 * @property {string} text
 * @property {number} created milliseconds since 1970
 * @property {"done" | "running" | "stopped" | "failed" | "refused" | "interrupted"} state of an answer; questions are done
 * @property {string} [model] who answered
 * @property {string | null} [stopSequence] the text that ended the answer, which stands in the model's context
 * @property {object} [stats] what is shown below an answer
 * @property {{code?: string, words: string} | null} [error] why an answer failed
 * @property {object | null} [point] where a running answer can be taken up again, see session.js
 */

/** A tree of messages: an edited question and another answer are branches beside the first. One path is shown. */
export class MessageTree {
  #messages = new Map();
  #children = new Map(); // id of the parent, or "", to the ids of what follows it, oldest first
  #selected;

  /**
   * @param {Message[]} messages in any order; those whose parents are missing are left out
   * @param {Record<string, string>} selected of each parent, or "", the child that is on the path; default: the last
   */
  constructor(messages = [], selected = {}) {
    this.#selected = { ...selected };
    for (const message of messages.toSorted((a, b) => a.created - b.created)) this.#messages.set(message.id, message);
    for (const message of this.#messages.values()) {
      if (message.parent === null || this.#messages.has(message.parent)) this.#childrenOf(message.parent).push(message.id);
    }
  }

  /** The choice between branches, for the constructor. */
  get selected() {
    return { ...this.#selected };
  }

  get size() {
    return this.#messages.size;
  }

  get(id) {
    return this.#messages.get(id);
  }

  /** Add a message and show it. */
  add(message) {
    this.#messages.set(message.id, message);
    this.#childrenOf(message.parent).push(message.id);
    this.#selected[message.parent ?? ""] = message.id;
  }

  /** The messages that are shown, from the first on. */
  path() {
    const path = [];
    // Bounded: an imported chat might hold a circle.
    for (let id = this.#choice(null); id && path.length < this.#messages.size; id = this.#choice(id)) {
      path.push(this.#messages.get(id));
    }
    return path;
  }

  /** The messages from the first up to this one. */
  pathTo(id) {
    const path = [];
    for (let message = this.get(id); message && path.length < this.#messages.size; message = this.get(message.parent)) {
      path.unshift(message);
    }
    return path;
  }

  /** The ids of the branches that begin where this message does, itself among them. */
  siblings(id) {
    return [...this.#childrenOf(this.get(id).parent)];
  }

  /** Show the path on which this message is. */
  select(id) {
    for (const message of this.pathTo(id)) this.#selected[message.parent ?? ""] = message.id;
  }

  #childrenOf(parent) {
    const key = parent ?? "";
    if (!this.#children.has(key)) this.#children.set(key, []);
    return this.#children.get(key);
  }

  #choice(parent) {
    const children = this.#childrenOf(parent);
    const selected = this.#selected[parent ?? ""];
    return children.includes(selected) ? selected : children.at(-1);
  }
}
