/** Tells those who listen to the page what others see: answers sentence by sentence, as they come. */

import { $, element } from "./dom.js";

const EVERY_MS = 1_500; // between two pieces of an answer: a reader needs longer to speak them
const KEPT = 12; // pieces; older ones have been read out
const SENTENCE_END = /[.!?…:。！？]["»”)\]]*\s|\n/g;

export class Announcer {
  #log = $("announcer");
  #waiting = "";
  #timer = 0;

  /** Say something now. */
  say(words) {
    if (!words.trim()) return;
    this.#log.append(element("p", { textContent: words }));
    while (this.#log.children.length > KEPT) this.#log.firstElementChild.remove();
  }

  /** Add a piece of an answer; it is said when its sentence is complete. */
  append(text) {
    this.#waiting += text;
    this.#timer ||= setTimeout(() => this.#sayComplete(), EVERY_MS);
  }

  /** Another chat is shown: what is left to say belongs to the one before. */
  reset() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#waiting = "";
  }

  /** The answer is over: say the rest of it. */
  end() {
    this.say(this.#waiting);
    this.reset();
  }

  #sayComplete() {
    this.#timer = 0;
    const last = [...this.#waiting.matchAll(SENTENCE_END)].at(-1);
    if (!last) return;
    const end = last.index + last[0].length;
    this.say(this.#waiting.slice(0, end));
    this.#waiting = this.#waiting.slice(end);
  }
}
