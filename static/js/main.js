/** Wires the conversation, the connection and the page together. */

import { Conversation, TokenRate } from "./conversation.js";
import { readiness } from "./readiness.js";
import { ConnectionLost, InferenceSocket, RequestFailed, SocketError } from "./socket.js";
import { View, pageConfig } from "./view.js";

const SESSION_MAX_LENGTH = 2048; // tokens: a chat's share of the swarm's attention cache
const PATIENCE_MS = 20_000; // with a server that cannot be reached or has failed, when a message waits for it
const DOWN = new Set(["failed", "unreachable"]); // states of a model that may never become ready

const TOO_LONG = "This chat has no room left for your message. Write a shorter one, or start a new chat.";

const count = new Intl.NumberFormat("en");
const speed = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

class Chat {
  #models;
  #pageToken; // shows the server that it is the page that asks
  #model;
  #conversation;
  #view;
  #socket = null;
  /** @type {"loading" | "idle" | "answering"} */
  #phase = "loading";
  #task = new AbortController(); // ends what the phase waits for
  #stopping = false;

  constructor({ models, default_model: defaultModel, page_token: pageToken }) {
    this.#models = models;
    this.#pageToken = pageToken;
    this.#view = new View({
      send: (text) => this.#send(text),
      stop: () => this.#stop(),
      newChat: () => this.#newChat(),
      selectModel: (name) => this.#selectModel(name),
    });
    this.#model = this.#find(this.#view.selectedModel ?? defaultModel);
    this.#conversation = new Conversation(this.#model.chat);
    this.#waitForModel();
  }

  #find(name) {
    return this.#models.find((model) => model.name === name);
  }

  get #maxLength() {
    return Math.min(this.#model.max_length, SESSION_MAX_LENGTH);
  }

  #begin(phase) {
    this.#phase = phase;
    this.#stopping = false;
    this.#task = new AbortController();
    return this.#task.signal;
  }

  async #waitForModel() {
    const signal = this.#begin("loading");
    this.#view.show("loading", "Connecting…", false);
    this.#view.placeholder("The model is loading");
    let told = "loading";
    try {
      for await (const { state, words } of readiness(this.#model.name, signal)) {
        this.#view.show(DOWN.has(state) ? "error" : "loading", words, false);
        if (state !== told) this.#view.announce(words); // not each step of the progress
        told = state;
      }
    } catch (error) {
      if (signal.aborted) return;
      throw error;
    }
    this.#idle("ready", "Ready");
  }

  #idle(state, status) {
    const { full } = this.#conversation;
    this.#begin("idle");
    this.#view.show(state, status, !full);
    this.#view.placeholder(full ? "This chat is full" : "Write a message");
  }

  #send(text) {
    this.#conversation.ask(text);
    this.#view.retireNotices();
    this.#view.addQuestion(text);
    this.#answer(this.#view.addAnswer(this.#model.title));
  }

  #retry(answer) {
    if (this.#phase !== "idle") return;
    this.#conversation.retry();
    answer.restart();
    this.#view.focus();
    this.#answer(answer);
  }

  #stop() {
    if (this.#phase !== "answering" || this.#stopping) return;
    this.#stopping = true;
    this.#view.stopping();
    if (!this.#socket?.stop()) this.#task.abort();
  }

  #newChat() {
    this.#conversation = new Conversation(this.#model.chat);
    this.#view.clear();
    if (this.#phase === "loading") return;
    this.#task.abort();
    this.#disconnect();
    this.#idle("ready", "Ready");
  }

  /** The conversation goes on with the other model, which will read it from the beginning. */
  #selectModel(name) {
    this.#task.abort();
    this.#disconnect();
    this.#model = this.#find(name);
    this.#conversation.reformat(this.#model.chat);
    this.#view.retireNotices();
    this.#waitForModel();
  }

  async #answer(view) {
    const run = { view, conversation: this.#conversation, rate: new TokenRate(), signal: this.#begin("answering") };
    this.#view.show("answering", "Answering…", false);
    let failed = false;
    try {
      this.#finish(run, await this.#stream(run));
    } catch (error) {
      failed = !this.#givenUp(run);
      if (failed) this.#fail(run, error);
      else this.#cutOff(run);
    }
    view.end();
    if (run.signal !== this.#task.signal) return; // the page has gone on to something else
    if (failed) this.#idle("error", "The last answer failed");
    else this.#idle("ready", "Ready");
  }

  #givenUp({ signal }) {
    return signal.aborted || this.#stopping;
  }

  #finish({ view, conversation, rate }, last) {
    conversation.finish(last);
    view.meta(describe(rate, last.finish_reason === "cancelled"));
    this.#view.announce(conversation.answer);
    if (!conversation.full) return;
    const limit = `This chat has reached its limit of ${count.format(this.#maxLength)} tokens.`;
    view.notice(`${limit} Start a new chat to go on.`, "New chat", () => this.#newChat());
  }

  /** The user gave the answer up and the server did not end it in good order. */
  #cutOff({ view, conversation, rate, signal }) {
    conversation.abandon();
    view.meta(describe(rate, true));
    if (signal === this.#task.signal) this.#disconnect();
  }

  #fail({ view, conversation }, error) {
    if (!(error instanceof SocketError)) console.error(error);
    conversation.fail({ refused: error instanceof RequestFailed });
    this.#disconnect();
    if (error.code === "too_long") view.notice(TOO_LONG, "New chat", () => this.#newChat());
    else view.notice(explain(error), "Retry", () => this.#retry(view));
  }

  /** A session may have ended unnoticed since the last answer. Then ask once more, in a new session. */
  async #stream(run) {
    const reused = this.#socket?.isOpen;
    try {
      return await this.#receive(run);
    } catch (error) {
      if (!reused || run.conversation.answer || this.#givenUp(run)) throw error;
      this.#disconnect();
      return await this.#receive(run);
    }
  }

  async #receive({ view, conversation, rate, signal }) {
    if (!this.#socket?.isOpen) await this.#connect(signal);
    let response;
    for await (response of this.#socket.generate(this.#request(conversation.input()))) {
      conversation.receive(response.outputs);
      rate.add(response.token_count, performance.now());
      view.append(response.outputs);
      view.meta(describe(rate, false));
    }
    return response;
  }

  #request(inputs) {
    const [stop, ...others] = this.#model.chat.stop;
    // Rounds of one token: the answer arrives token by token.
    const streaming = { max_new_tokens: 1, stop_sequence: stop, extra_stop_sequences: others };
    return { inputs, ...this.#model.generation, ...streaming };
  }

  async #connect(signal) {
    this.#disconnect();
    await this.#modelReady(signal);
    const url = new URL("api/v2/generate", document.baseURI);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = (this.#socket = new InferenceSocket(url));
    signal.addEventListener("abort", () => socket.close());
    await socket.open({ model: this.#model.name, maxLength: this.#maxLength, pageToken: this.#pageToken });
  }

  async #modelReady(signal) {
    const patientUntil = performance.now() + PATIENCE_MS;
    for await (const { state, words } of readiness(this.#model.name, signal)) {
      if (DOWN.has(state) && performance.now() > patientUntil) throw new ConnectionLost(`${words}.`);
      this.#view.status(state === "ready" ? "Answering…" : words);
    }
  }

  #disconnect() {
    this.#socket?.close();
    this.#socket = null;
    this.#conversation.forget();
  }
}

function describe(rate, stopped) {
  const parts = [];
  if (rate.tokens) parts.push(`${count.format(rate.tokens)} ${rate.tokens === 1 ? "token" : "tokens"}`);
  if (rate.perSecond) parts.push(`${speed.format(rate.perSecond)} tokens/s`);
  if (stopped) parts.push("stopped");
  return parts.join(" · ");
}

function explain(error) {
  if (!(error instanceof SocketError)) return "Something went wrong in this page.";
  if (!(error instanceof RequestFailed)) return error.message;
  return `The server says: ${error.message}` + (error.requestId ? ` (request ${error.requestId})` : "");
}

new Chat(pageConfig());
