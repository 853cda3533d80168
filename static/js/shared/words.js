/** Numbers, servers and blocks in words. Knows nothing of the page. */

const whole = new Intl.NumberFormat("en");
const tenths = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const hundredths = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
/** States of a model: of /readyz, and "unreachable"; in a word or two, and as a sentence for who waits for it. */
const STATES = {
  loading: ["Loading", "Loading"],
  ready: ["Ready", "Ready"],
  failed: ["Does not answer", "The model does not answer"],
  blocks_missing: ["Blocks missing", "Waiting for parts of the model"],
  stale: ["No news", "Waiting for news of the servers"],
  rejoining: ["Joining again", "Connecting to the servers again"],
  unreachable: ["Unreachable", "The server cannot be reached"],
};
const PEER_END = 6; // characters that distinguish a peer; all ids begin alike

/** A model's state for a list. */
export function stateLabel(state) {
  return STATES[state]?.[0] ?? state;
}

/** A model's state for whoever waits for it. */
export function stateWords(state) {
  return STATES[state]?.[1] ?? state;
}

export function plural(number, unit) {
  return `${whole.format(number)} ${unit}${number === 1 ? "" : "s"}`;
}

export function number(value) {
  return whole.format(value);
}

/** What is shown below an answer. */
export function describe({ tokens, perSecond, firstToken, stopped }) {
  const parts = [];
  if (tokens) parts.push(plural(tokens, "token"));
  if (perSecond) parts.push(`${tenths.format(perSecond)} tokens/s`);
  if (firstToken) parts.push(`first token after ${hundredths.format(firstToken)} s`);
  if (stopped) parts.push("stopped");
  return parts.join(" · ");
}

/** The end of a peer's id. */
export function shortPeer(peer) {
  return `…${peer.slice(-PEER_END)}`;
}

/** A server, by its own name or the end of its peer's. */
export function serverName({ name, peer_id: peer }) {
  return name || shortPeer(peer);
}

/** "4" or "0–3", of [start, end). */
export function range({ start, end }) {
  return end - start === 1 ? `${start}` : `${start}–${end - 1}`;
}

export function blocks(span) {
  return `${span.end - span.start === 1 ? "block" : "blocks"} ${range(span)}`;
}

/** Why an answer is slow, and what would help. */
export function whySlow(perSecond, route) {
  const speed = `This is slow: ${hundredths.format(perSecond)} tokens a second.`;
  if (!route?.length) return `${speed} The swarm has much to do.`;
  const passes = route.length === 1 ? "a single server, which" : `${plural(route.length, "server")} one after the other, which`;
  return `${speed} Each token passes ${passes} may be far away, busy or short of power. Another machine in the swarm helps.`;
}

export function ago(time, now = Date.now()) {
  const days = Math.floor((new Date(now).setHours(0, 0, 0, 0) - new Date(time).setHours(0, 0, 0, 0)) / 86_400_000);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  if (days < 7) return "This week";
  if (days < 31) return "This month";
  return "Earlier";
}
