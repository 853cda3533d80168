/** The client's end of the WebSocket protocol at /api/v2/generate. Knows nothing of the page or of chats. */

const OPEN_LIMIT_MS = 60_000; // connecting and opening the session
const RESPONSE_LIMIT_MS = 300_000; // one response: a long prompt in a slow swarm takes minutes
const STOP_LIMIT_MS = 10_000; // the end of an answer after `stop`
const TAKEN_OVER = 4001; // the close code when another page goes on with the session
const DROPPED = 4000; // the close code of a connection that may be dead; any but DONE lets the server keep the session
const TOO_LARGE = 1009; // the close code for a message that the server does not take
const DONE = 1000; // the close code that lets the server end the session: RFC 6455, section 7.4.1

/**
 * SocketError
 *  ├─ ConnectionLost   the connection closed or never opened
 *  ├─ TakenOver        another page has taken up the session
 *  ├─ ResponseTimeout  the server kept silent for too long; the connection is closed
 *  └─ RequestFailed    the server answered that it could not do it
 */
export class SocketError extends Error {
  name = this.constructor.name;
}

export class ConnectionLost extends SocketError {}

export class TakenOver extends SocketError {}

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
  #messages = []; // arrived and not asked for yet
  #waiter = null; // the one who asked for a message that has not arrived
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

  /**
   * Connect and open a session that outlives the connection for a while.
   *
   * @param {{model: string, maxLength: number, pageToken: string}} options `maxLength` in tokens, prefix included
   * @param {(message: object) => void} onUpdate called with the place in the queue
   * @returns {Promise<{session_id: string, resume_timeout: number}>}
   * @throws {SocketError} then it is closed
   */
  open({ model, maxLength, pageToken }, onUpdate) {
    const request = { type: "open_inference_session", model, max_length: maxLength, page_token: pageToken, resumable: true };
    return this.#begin(request, onUpdate);
  }

  /**
   * Connect and take up a session whose connection was lost; `responses` yields the rest of its last answer.
   *
   * @param {{sessionId: string, answers: number, received: number, pageToken: string}} options `answers`: that were asked
   *   for in this session; `received`: responses of the last one that are here already
   * @returns {Promise<{answers: number, responses: number}>} how many answers the session has begun, and how far the
   *   last one is
   * @throws {SocketError} then it is closed
   */
  resume({ sessionId, answers, received, pageToken }, onUpdate) {
    const place = { session_id: sessionId, answers, received };
    return this.#begin({ type: "resume_inference_session", ...place, page_token: pageToken }, onUpdate);
  }

  async #begin(request, onUpdate) {
    this.#socket = new WebSocket(this.#url);
    this.#socket.onopen = () => this.#send({ ...request, queue_updates: true, swarm_updates: true });
    this.#socket.onmessage = ({ data }) => this.#deliver(data);
    this.#socket.onclose = ({ code, reason: message }) => {
      if (code === TAKEN_OVER) this.#end(new TakenOver("The answer goes on in another window."));
      else if (code === TOO_LARGE) this.#end(new RequestFailed({ error: { code: "request_too_large", message } }));
      else this.#end(new ConnectionLost("The connection to the server was lost."));
    };
    try {
      for (;;) {
        const message = await this.#receive(OPEN_LIMIT_MS);
        if (!message.queue) return message;
        onUpdate(message);
      }
    } catch (error) {
      this.close();
      throw error;
    }
  }

  /**
   * Generate with the parameters of the protocol's `generate`; yields its responses, the last one with `stop: true`, and
   * between them what there is to tell of the queue and the swarm. Throws SocketError. Leaving the iteration early closes
   * the connection, for the rest of the answer would be taken for the next one.
   */
  generate(parameters) {
    return this.responses({ type: "generate", ...parameters });
  }

  /** Yields the responses to a request, or, without one, those of the answer that was taken up. See `generate`. */
  async *responses(request = null) {
    if (this.#generating) throw new Error("An answer is running; one session generates one at a time.");
    this.#generating = true;
    let ended = false;
    try {
      if (request) this.#send(request);
      while (!ended) {
        const response = await this.#receive(RESPONSE_LIMIT_MS);
        ended = response.stop ?? false;
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
    if (!this.#generating || !this.isOpen) return false;
    this.#send({ type: "stop" });
    clearTimeout(this.#stopTimer);
    this.#stopTimer = setTimeout(() => this.#endLate("end the answer", STOP_LIMIT_MS), STOP_LIMIT_MS);
    return true;
  }

  /** Close the connection and with it the session. May be called at any time, and twice. */
  close() {
    this.#messages.length = 0;
    this.#end(new ConnectionLost("The connection was closed."));
  }

  /** Give the connection up, but not the session. */
  drop() {
    this.#end(new ConnectionLost("The connection to the server was lost."), DROPPED);
  }

  #send(message) {
    if (this.isOpen) this.#socket.send(JSON.stringify(message));
  }

  #deliver(data) {
    if (this.#failure) return;
    let message;
    try {
      message = JSON.parse(data);
    } catch {
      this.#end(new ConnectionLost("The server sent something that is not part of the protocol."));
      return;
    }
    if (this.#waiter) this.#settle((waiter) => waiter.resolve(message));
    else this.#messages.push(message);
  }

  async #receive(limitMs) {
    const message = this.#messages.shift() ?? (await this.#arrival(limitMs));
    if (!message.ok) throw new RequestFailed(message);
    return message;
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
    this.#end(new ResponseTimeout(`The server did not ${what} within ${limitMs / 1000} seconds.`), DROPPED);
  }

  #end(failure, code = DONE) {
    if (this.#failure) return;
    this.#failure = failure;
    this.#socket?.close(code);
    if (this.#waiter) this.#settle((waiter) => waiter.reject(failure));
  }
}
