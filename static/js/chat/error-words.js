/** Why something failed, in words. Knows nothing of the page. */

import { Interrupted } from "./session.js";
import { RequestFailed, SocketError } from "./socket.js";

export const RECONNECTING = "The connection was lost; connecting again…";

export function whyItFailed(error) {
  if (error instanceof Interrupted) return "The answer was interrupted, and the server has not kept it.";
  if (!(error instanceof SocketError)) return "Something went wrong in this page.";
  if (!(error instanceof RequestFailed)) return error.message;
  return `The server says: ${error.message}` + (error.requestId ? ` (request ${error.requestId})` : "");
}
