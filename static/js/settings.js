/** How a chat is answered: the system prompt and the sampling, each with its default. */

import { $, element, textButton } from "./dom.js";

/** What can be changed. `fallback`: what Transformers does where the model's line in config.py says nothing. */
const PARAMETERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 5, step: 0.05, fallback: 1, hint: "0: always the likeliest word. Higher: more varied, less sure." },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01, fallback: 1, hint: "Chooses among the likeliest words that together have this probability." },
  { name: "top_k", label: "Top k", min: 0, max: 1000, step: 1, fallback: 50, hint: "Chooses among so many of the likeliest words. 0: among all." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 3, step: 0.05, fallback: 1, hint: "Above 1: what was said already becomes less likely." },
  { name: "max_answer_tokens", label: "Maximum new tokens", min: 1, max: 1_000_000, step: 1, fallback: null, words: "as many as fit", hint: "Ends an answer after so many tokens." },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 53 - 1, step: 1, fallback: null, words: "random", hint: "With the same seed the same question gets the same answer." },
];

/** What to ask of the server for these settings: only what was changed; the others are the model's own. */
export function samplingParameters({ temperature, ...others }) {
  if (temperature === undefined) return others;
  return temperature === 0 ? { ...others, do_sample: 0 } : { ...others, do_sample: 1, temperature };
}

export class Settings {
  #model = null;
  #changed;
  #fields = new Map();
  #resetSystem = textButton("Reset", () => this.#setSystem(null), "plain small");

  /** @param {(settings: Record<string, number>, system: string | null) => void} changed told the new settings */
  constructor(changed) {
    this.#changed = changed;
    for (const parameter of PARAMETERS) $("parameters").append(this.#field(parameter));
    $("system-head").append(this.#resetSystem);
    $("system").addEventListener("input", () => this.#tell());
    $("reset-all").addEventListener("click", () => {
      for (const { input } of this.#fields.values()) input.value = "";
      this.#setSystem(null);
    });
    $("settings-button").addEventListener("click", () => $("settings").showModal());
    // The button that closes it submits the form, which is not done with a number that is out of range.
    $("settings").querySelector("form").addEventListener("submit", () => this.#tell());
  }

  /** Show the settings of a chat. */
  show(model, settings, system) {
    this.#model = model;
    for (const [name, { input }] of this.#fields) {
      input.value = settings[name] ?? "";
      input.placeholder = this.#defaultOf(name);
    }
    $("system").value = system ?? model.chat.system;
    this.#mark();
  }

  #field({ name, label, min, max, step, hint }) {
    const input = element("input", { type: "number", id: `set-${name}`, inputMode: "decimal", min, max, step: "any", autocomplete: "off" });
    if (step === 1) input.step = 1;
    const hintId = `hint-${name}`;
    input.setAttribute("aria-describedby", hintId);
    const reset = textButton("Reset", () => ((input.value = ""), this.#tell(), input.focus()), "plain small");
    reset.ariaLabel = `Reset ${label}`;
    input.addEventListener("input", () => this.#tell());
    this.#fields.set(name, { input, reset });
    const head = element("label", { htmlFor: input.id, textContent: label });
    return element("div", { className: "parameter" }, head, input, reset, element("p", { id: hintId, className: "hint", textContent: hint }));
  }

  #defaultOf(name) {
    const { fallback, words } = PARAMETERS.find((parameter) => parameter.name === name);
    const { do_sample: samples, ...own } = this.#model.generation;
    if (name === "temperature" && !samples) return "0";
    return words ?? String(own[name] ?? fallback);
  }

  #setSystem(text) {
    $("system").value = text ?? this.#model.chat.system;
    this.#tell();
  }

  #tell() {
    const settings = {};
    for (const [name, { input }] of this.#fields) {
      if (input.value === "" || !input.checkValidity() || input.value === this.#defaultOf(name)) continue;
      settings[name] = input.valueAsNumber;
    }
    const system = $("system").value;
    this.#mark();
    this.#changed(settings, system.trim() === this.#model.chat.system.trim() ? null : system.trim());
  }

  #mark() {
    let changed = $("system").value.trim() !== this.#model.chat.system.trim();
    this.#resetSystem.hidden = !changed;
    this.#resetSystem.ariaLabel = "Reset the system prompt";
    for (const { input, reset } of this.#fields.values()) {
      reset.hidden = input.value === "";
      changed ||= input.value !== "";
    }
    $("settings-button").classList.toggle("changed", changed);
    $("reset-all").disabled = !changed;
  }
}
