/** Where messages are written. */

import { $, isComposing, setText } from "../shared/dom.js";
import { recall, remember } from "../shared/web-storage.js";
import { number } from "../shared/words.js";

const DRAFT = "draft"; // in the session's storage: a page that must be loaded again loses no words
const NEARLY_FULL = 0.9; // of the context: time to think of what is to be left out

export class Composer {
  #prompt = $("prompt");
  #canSend = false;

  /** @param {{send(text: string): boolean, stop(): void, editLast(): void}} actions `send` tells whether it was taken */
  constructor({ send, stop, editLast }) {
    const submit = (text) => {
      const taken = send(text);
      this.focus();
      return taken;
    };
    const submitPrompt = () => {
      const text = this.#prompt.value.trim();
      if (!this.#canSend || !text || !submit(text)) return;
      this.#prompt.value = "";
      this.#changed();
    };
    this.#prompt.value = recall("sessionStorage", DRAFT) ?? "";
    $("composer").addEventListener("submit", (event) => (event.preventDefault(), submitPrompt()));
    this.#prompt.addEventListener("input", () => this.#changed());
    this.#prompt.addEventListener("keydown", (event) => {
      // While an input method composes a character, Enter chooses it.
      if (isComposing(event)) return;
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        submitPrompt();
      } else if (event.key === "ArrowUp" && !this.#prompt.value) {
        event.preventDefault();
        editLast();
      }
    });
    $("stop").addEventListener("click", () => (stop(), this.focus()));
    for (const example of document.querySelectorAll(".example")) {
      example.addEventListener("click", () => this.#canSend && submit(example.textContent));
    }
  }

  /**
   * @param {"loading" | "ready" | "answering" | "error"} state
   * @param {string} status the same in words
   * @param {boolean} canSend whether a message can be sent
   */
  show(state, status, canSend) {
    const answering = state === "answering";
    document.body.dataset.state = state;
    setText($("status"), status);
    this.#canSend = canSend;
    $("send").hidden = answering;
    $("stop").hidden = !answering;
    this.#updateSend();
  }

  status(text) {
    setText($("status"), text);
  }

  /** Show that the wish to stop was heard; the answer may take a moment to end. */
  stopping() {
    setText($("status"), "Stopping…");
  }

  placeholder(text) {
    this.#prompt.placeholder = text;
  }

  /** How much of the context is used, in tokens. */
  tokens(used, limit) {
    $("tokens").hidden = !used || !limit;
    $("meter").max = limit || 1;
    $("meter").value = used;
    $("tokens").classList.toggle("nearly-full", used >= limit * NEARLY_FULL);
    setText($("count"), `${number(used)} of ${number(limit)} tokens`);
  }

  focus() {
    // Where fingers are used, the focus would bring up a keyboard over half of the answer.
    if (matchMedia("(pointer: fine)").matches) this.#prompt.focus();
  }

  #changed() {
    remember("sessionStorage", DRAFT, this.#prompt.value);
    this.#prompt.style.height = "auto";
    this.#prompt.style.height = `${this.#prompt.scrollHeight}px`;
    this.#updateSend();
  }

  #updateSend() {
    $("send").disabled = !this.#canSend || !this.#prompt.value.trim();
    for (const example of document.querySelectorAll(".example")) example.disabled = !this.#canSend;
  }
}
