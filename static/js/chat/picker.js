/** Which models there are, what each is and how far it is; and the choice of one. */

import { $, element, setText } from "../shared/dom.js";
import { StateRefused, fetchState } from "../shared/swarm-state.js";
import { number, stateWords } from "../shared/words.js";

const REFRESH_MS = 2_000; // while the list is open

export class Picker {
  #models;
  #pageToken;
  #rows = new Map();
  #timer = 0;
  #updated;

  /**
   * @param {object[]} models of the page's configuration
   * @param {{select: (name: string) => void, updated: (states: Map<string, object>) => void}} actions `updated`: given what the server
   *   reports of its models
   */
  constructor(models, pageToken, { select, updated }) {
    this.#models = models;
    this.#pageToken = pageToken;
    this.#updated = updated;
    for (const model of models) $("models").append(this.#row(model, select));
    $("model-button").addEventListener("click", () => {
      $("picker").showModal();
      this.refresh();
    });
    $("picker").addEventListener("close", () => clearTimeout(this.#timer));
  }

  /** Show which one is chosen. */
  choose(name) {
    setText($("model"), this.#models.find((model) => model.name === name).title);
    this.#rows.get(name).radio.checked = true;
  }

  /** Ask the server what its models are and how far; go on with it while the list is open. */
  async refresh() {
    clearTimeout(this.#timer);
    try {
      const { models } = await fetchState(this.#pageToken);
      for (const state of models) this.#show(state);
      this.#updated(new Map(models.map((state) => [state.name, state])));
      setText($("picker-trouble"), "");
    } catch (error) {
      console.warn("The state of the models is not known.", error);
      const trouble = error instanceof StateRefused ? error.message : "The server cannot be reached";
      setText($("picker-trouble"), `${trouble}; this may be out of date.`);
    }
    if ($("picker").open) this.#timer = setTimeout(() => this.refresh(), REFRESH_MS);
  }

  #row({ name, title }, select) {
    const radio = element("input", { type: "radio", name: "model", value: name });
    const facts = element("span", { className: "facts" });
    const state = element("span", { className: "state" });
    const progress = element("progress", { max: 1, hidden: true, ariaLabel: `Loading ${title}` });
    const label = element("label", {}, radio, element("span", { className: "name", textContent: title }), facts, state, progress);
    const link = element("a", { target: "_blank", rel: "noopener noreferrer", hidden: true, textContent: "About it" });
    link.ariaLabel = `About ${title}`;
    radio.addEventListener("change", () => select(name));
    this.#rows.set(name, { radio, facts, state, progress, link });
    return element("li", {}, label, link);
  }

  #show({ name, state, message, progress, size, licence, link, context_length: length }) {
    const row = this.#rows.get(name);
    if (!row) return;
    const facts = [size, licence, length && `reads ${number(length)} tokens`].filter(Boolean);
    setText(row.facts, facts.join(" · "));
    setText(row.state, state === "ready" ? stateWords(state) : `${stateWords(state)}: ${message}`);
    row.state.dataset.state = state;
    row.progress.hidden = state !== "loading";
    if (progress === null || progress === undefined) row.progress.removeAttribute("value");
    else row.progress.value = progress;
    row.link.hidden = !/^https:\/\//.test(link ?? "");
    if (!row.link.hidden) row.link.href = link;
  }
}
