/** How a chat is answered: the system prompt and the sampling, each with its default. The fields stand in index.html. */

import { $ } from "../shared/dom.js";

/** What to ask of the server for these settings: only what was changed; the others are the model's own. */
export function samplingParameters({ temperature, ...others }) {
  if (temperature === undefined) return others;
  return temperature === 0 ? { ...others, do_sample: 0 } : { ...others, do_sample: 1, temperature };
}

export class Settings {
  #model = null;
  #changed;
  #fields = new Map(); // name to {input, reset}

  /** @param {(settings: Record<string, number>, system: string | null) => void} changed called with the new settings */
  constructor(changed) {
    this.#changed = changed;
    for (const input of document.querySelectorAll("#parameters input")) {
      const reset = input.nextElementSibling;
      reset.addEventListener("click", () => ((input.value = ""), this.#tell(), input.focus()));
      input.addEventListener("input", () => this.#tell());
      this.#fields.set(input.name, { input, reset });
    }
    $("reset-system").addEventListener("click", () => this.#setSystem(null));
    $("system").addEventListener("input", () => this.#tell());
    $("reset-all").addEventListener("click", () => {
      for (const { input } of this.#fields.values()) input.value = "";
      this.#setSystem(null);
    });
    $("settings-button").addEventListener("click", () => $("settings").showModal());
  }

  /** Of each setting that there is, its bounds: {name: [least, most]}. */
  get bounds() {
    return Object.fromEntries([...this.#fields].map(([name, { input }]) => [name, [Number(input.min), Number(input.max)]]));
  }

  /** Show the settings of a chat. */
  show(model, settings, system) {
    this.#model = model;
    for (const [name, { input }] of this.#fields) {
      input.value = settings[name] ?? "";
      input.placeholder = this.#defaultOf(input);
    }
    $("system").value = system ?? model.chat.system;
    this.#mark();
  }

  /** What goes for a setting that was not changed: the model's own, or what Transformers does. */
  #defaultOf({ name, dataset }) {
    const { do_sample: samples, ...own } = this.#model.generation;
    return name === "temperature" && !samples ? "0" : String(own[name] ?? dataset.otherwise);
  }

  #setSystem(text) {
    $("system").value = text ?? this.#model.chat.system;
    this.#tell();
  }

  #tell() {
    const settings = {};
    for (const [name, { input }] of this.#fields) {
      if (input.value === "" || !input.checkValidity() || input.value === this.#defaultOf(input)) continue;
      settings[name] = input.valueAsNumber;
    }
    this.#mark();
    this.#changed(settings, this.#ownSystem ? $("system").value.trim() : null);
  }

  get #ownSystem() {
    return $("system").value.trim() !== this.#model.chat.system.trim();
  }

  #mark() {
    let changed = this.#ownSystem;
    $("reset-system").hidden = !changed;
    for (const { input, reset } of this.#fields.values()) {
      reset.hidden = input.value === "";
      changed ||= input.value !== "";
    }
    $("settings-button").classList.toggle("changed", changed);
    $("reset-all").disabled = !changed;
  }
}
