/** What the swarm is like now, as GET /api/v1/state tells it. Knows nothing of the page. */

const LIMIT_MS = 5_000;

/** The app answered, but not with the state. */
export class StateRefused extends Error {
  name = this.constructor.name;

  /** @param {number} status 401: the page is older than the program, or than a day, or its key is gone @param {string} message */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/**
 * @param {string} pageToken shows the app that it is its page that asks; empty: the cookie of a key does
 * @returns {Promise<object>} the body of the answer; see /docs for its schema
 * @throws {StateRefused} or whatever fetch throws when the app cannot be reached in time
 */
export async function fetchState(pageToken) {
  const response = await fetch("api/v1/state", {
    headers: { "X-Page-Token": pageToken },
    signal: AbortSignal.timeout(LIMIT_MS),
    cache: "no-store",
  });
  if (response.ok) return response.json();
  const body = await response.json().catch(() => null); // a proxy's own page is no JSON
  throw new StateRefused(response.status, body?.error?.message ?? `The server answered ${response.status}.`);
}
