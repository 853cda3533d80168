/** Numbers, stats and failures in words. Knows nothing of the page. */

import { RequestFailed, SocketError } from "./socket.js";
import { Interrupted } from "./session.js";

const whole = new Intl.NumberFormat("en");
const tenths = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const hundredths = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const PEER_END = 6; // characters by which a peer is told from others; all ids begin alike

export function count(number, unit) {
  return `${whole.format(number)} ${unit}${number === 1 ? "" : "s"}`;
}

export function number(value) {
  return whole.format(value);
}

/** What is told below an answer. */
export function describe({ tokens, perSecond, firstToken, stopped }) {
  const parts = [];
  if (tokens) parts.push(count(tokens, "token"));
  if (perSecond) parts.push(`${tenths.format(perSecond)} tokens/s`);
  if (firstToken) parts.push(`first token after ${hundredths.format(firstToken)} s`);
  if (stopped) parts.push("stopped");
  return parts.join(" · ");
}

/** A server of a route, by its own name or the end of its peer's. */
export function serverName({ name, peer_id: peer }) {
  return name || `…${peer.slice(-PEER_END)}`;
}

export function blocks({ start, end }) {
  return end - start === 1 ? `block ${start}` : `blocks ${start}–${end - 1}`;
}

export function explain(error) {
  if (error instanceof Interrupted) return "The answer was interrupted, and the server has not kept it.";
  if (!(error instanceof SocketError)) return "Something went wrong in this page.";
  if (!(error instanceof RequestFailed)) return error.message;
  return `The server says: ${error.message}` + (error.requestId ? ` (request ${error.requestId})` : "");
}

/** Why an answer is slow, and what would help. */
export function whySlow(perSecond, route) {
  const speed = `This is slow: ${hundredths.format(perSecond)} tokens a second.`;
  if (!route?.length) return `${speed} The swarm has much to do.`;
  const passes = route.length === 1 ? "a single server, which" : `${count(route.length, "server")} one after the other, which`;
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
