/** The models of the page: which one the open chat is with, whether it can be asked, and how much it can read. */

import { Picker } from "./picker.js";
import { DOWN, readiness } from "./readiness.js";

export class Models {
  ready = false; // whether the model that is watched can be asked
  watched = null; // the name of the model that is waited for, or was
  #all;
  #default;
  #pageToken;
  #states = new Map(); // what the server says of them
  #waiting = new AbortController();
  #picker;

  /** @param {{select: (name: string) => void, updated: () => void}} actions `updated`: the server reports new states */
  constructor({ models, default_model: defaultModel, page_token: pageToken }, { select, updated }) {
    this.#all = models;
    this.#default = defaultModel;
    this.#pageToken = pageToken;
    this.#picker = new Picker(models, pageToken, {
      select,
      updated: (states) => {
        this.#states = states;
        updated();
      },
    });
  }

  /** @returns {object | undefined} the model of this name, if it is served */
  find(name) {
    const found = this.#all.find((model) => model.name === name);
    // While a model loads, it is not known yet what its template is, and how little it may read.
    const { chat, context_length: length } = this.#states.get(name) ?? {};
    return found && { ...found, chat: chat ?? found.chat, max_length: Math.min(found.max_length, length ?? Infinity) };
  }

  /** The model of a chat, which may have been imported, or whose model is served no more. */
  of(chat) {
    if (!this.find(chat.model)) chat.model = this.#default;
    this.#picker.choose(chat.model);
    return this.find(chat.model);
  }

  /** Tokens that a model can read at most. */
  limit(name) {
    return Math.max(this.#states.get(name)?.context_length ?? 0, this.find(name).max_length);
  }

  /**
   * Wait until a model can be asked, or another one is watched.
   *
   * @param {(words: string, isDown: boolean, isNew: boolean) => void} onStep called at each step; `isNew`: its state is another
   * @returns {Promise<boolean>} whether it is ready
   */
  async watch(name, onStep) {
    this.#waiting.abort();
    this.#waiting = new AbortController();
    const { signal } = this.#waiting;
    this.watched = name;
    this.ready = false;
    let before = "loading";
    try {
      for await (const { state, words } of readiness(name, this.#pageToken, signal)) {
        onStep(words, DOWN.has(state), state !== before);
        before = state;
      }
    } catch (error) {
      if (signal.aborted) return false;
      throw error;
    }
    await this.#picker.refresh(); // how much the model can read
    if (signal.aborted) return false;
    this.ready = true;
    return true;
  }
}
