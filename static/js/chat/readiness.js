/** Whether a model can answer, as GET /readyz tells it. Knows nothing of the page. */

import { pause } from "../shared/pause.js";
import { stateWords } from "../shared/words.js";

const POLL_MS = 2_000;
const PROBE_LIMIT_MS = 5_000;

/** States of a model that may never become ready. */
export const DOWN = new Set(["failed", "unreachable"]);

/**
 * Ask until the model is ready.
 *
 * @param {string} model
 * @param {string} pageToken see `fetchState`
 * @param {AbortSignal} signal ends the asking; the iteration then throws an AbortError
 * @yields {{state: string, words: string}} a state of /readyz, or "unreachable"; "ready" is last
 */
export async function* readiness(model, pageToken, signal) {
  for (;;) {
    const report = await probe(model, pageToken, signal);
    yield report;
    if (report.state === "ready") return;
    await pause(POLL_MS, signal);
  }
}

async function probe(model, pageToken, signal) {
  try {
    const limited = AbortSignal.any([signal, AbortSignal.timeout(PROBE_LIMIT_MS)]);
    const response = await fetch("readyz", { headers: { "X-Page-Token": pageToken }, signal: limited, cache: "no-store" });
    const { ready, models } = await response.json(); // 503 has the same body as 200
    const { state, message } = models?.[model] ?? { state: ready ? "ready" : "loading" };
    const words = stateWords(state);
    return { state, words: message && message !== state ? `${words}: ${message}` : words };
  } catch {
    signal.throwIfAborted();
    return { state: "unreachable", words: stateWords("unreachable") };
  }
}
