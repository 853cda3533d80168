/** The client's end of the WebSocket protocol at /api/v2/generate. Knows nothing of the page or of chats. */

const OPEN_LIMIT_MS = 60_000; // connecting and opening the session
const RESPONSE_LIMIT_MS = 300_000; // one response: a long prompt in a slow swarm takes minutes
const STOP_LIMIT_MS = 10_000; // the end of an answer after `stop`

/**
 * SocketError
 *  ├─ ConnectionLost   the connection closed or never opened; the session is gone
 *  ├─ ResponseTimeout  the server kept silent for too long; the connection is closed
 *  └─ RequestFailed    the server answered that it could not do it
 */
export class SocketError extends Error {
  name = this.constructor.name;
}

export class ConnectionLost extends SocketError {}

export class ResponseTimeout extends SocketError {}

export class RequestFailed extends SocketError {
  /** @param {{error?: {code: string, message: string}, request_id?: string, traceback?: string}} response */
  constructor({ error, request_id: requestId, traceback }) {
    super(error?.message || "The server could not do this and did not say why.");
    this.code = error?.code ?? "unknown";
    this.requestId = requestId ?? null;
    this.traceback = traceback ?? "";
  }
}

/** One connection with one inference session. Once closed, for whatever reason, it stays closed. */
export class InferenceSocket {
  #url;
  #socket = null;
  #responses = []; // arrived and not asked for yet
  #waiter = null; // the one who asked for a response that has not arrived
  #failure = null; // why the connection is no more
  #generating = false;
  #stopTimer = 0;

  /** @param {string | URL} url ws: or wss: */
  constructor(url) {
    this.#url = url;
  }

  get isOpen() {
    return this.#failure === null && this.#socket?.readyState === WebSocket.OPEN;
  }

  /** Connect and open the session. `maxLength` is in tokens, prefix included. Throws SocketError; then it is closed. */
  async open({ model, maxLength, pageToken }) {
    this.#socket = new WebSocket(this.#url);
    const request = { type: "open_inference_session", model, max_length: maxLength, page_token: pageToken };
    this.#socket.onopen = () => this.#send(request);
    this.#socket.onmessage = ({ data }) => this.#deliver(data);
    this.#socket.onclose = () => this.#end(new ConnectionLost("The connection to the server was lost."));
    try {
      await this.#receive(OPEN_LIMIT_MS);
    } catch (error) {
      this.close();
      throw error;
    }
  }

  /**
   * Generate with the parameters of the protocol's `generate`; yields its responses, the last one with `stop: true`.
   * Throws SocketError. Leaving the iteration early closes the connection, for the rest of the answer would be taken
   * for the next one.
   */
  async *generate(parameters) {
    if (this.#generating) throw new Error("An answer is running; one session generates one at a time.");
    this.#generating = true;
    let ended = false;
    try {
      this.#send({ type: "generate", ...parameters });
      while (!ended) {
        const response = await this.#receive(RESPONSE_LIMIT_MS);
        ended = response.stop;
        yield response;
      }
    } catch (error) {
      ended = error instanceof RequestFailed;
      throw error;
    } finally {
      this.#generating = false;
      clearTimeout(this.#stopTimer);
      if (!ended) this.close();
    }
  }

  /** End the running answer soon; its last response says so. Returns false if no answer is running. */
  stop() {
    if (!this.#generating) return false;
    this.#send({ type: "stop" });
    clearTimeout(this.#stopTimer);
    this.#stopTimer = setTimeout(() => this.#endLate("end the answer", STOP_LIMIT_MS), STOP_LIMIT_MS);
    return true;
  }

  /** Close the connection and with it the session. May be called at any time, and twice. */
  close() {
    this.#responses.length = 0;
    this.#end(new ConnectionLost("The connection was closed."));
  }

  #send(message) {
    if (this.isOpen) this.#socket.send(JSON.stringify(message));
  }

  #deliver(data) {
    if (this.#failure) return;
    let response;
    try {
      response = JSON.parse(data);
    } catch {
      this.#end(new ConnectionLost("The server sent something that is not part of the protocol."));
      return;
    }
    if (this.#waiter) this.#settle((waiter) => waiter.resolve(response));
    else this.#responses.push(response);
  }

  async #receive(limitMs) {
    const response = this.#responses.shift() ?? (await this.#arrival(limitMs));
    if (!response.ok) throw new RequestFailed(response);
    return response;
  }

  #arrival(limitMs) {
    if (this.#failure) return Promise.reject(this.#failure);
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => this.#endLate("answer", limitMs), limitMs);
      this.#waiter = { resolve, reject, timer };
    });
  }

  #settle(how) {
    const waiter = this.#waiter;
    this.#waiter = null;
    clearTimeout(waiter.timer);
    how(waiter);
  }

  #endLate(what, limitMs) {
    this.#end(new ResponseTimeout(`The server did not ${what} within ${limitMs / 1000} seconds.`));
  }

  #end(failure) {
    if (this.#failure) return;
    this.#failure = failure;
    this.#socket?.close();
    if (this.#waiter) this.#settle((waiter) => waiter.reject(failure));
  }
}
