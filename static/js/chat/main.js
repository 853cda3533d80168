/** Wires the chats, the connection to the server and the page together. */

import { Announcer } from "../shared/announcer.js";
import { Composer } from "./composer.js";
import { $, isComposing, pageConfig, setText } from "../shared/dom.js";
import { explain } from "./failure.js";
import { newId } from "./id.js";
import { lock } from "./lock.js";
import { MessageList } from "./messages.js";
import { Picker } from "./picker.js";
import { DOWN, readiness } from "./readiness.js";
import { Run } from "./running-answer.js";
import { ChatSession, Interrupted } from "./session.js";
import { Settings, samplingParameters } from "./settings.js";
import { Sidebar, Toast } from "./sidebar.js";
import { RequestFailed, SocketError, TakenOver } from "./socket.js";
import { remember } from "../shared/web-storage.js";
import { openStore } from "./chat-store.js";
import { forgetUpTo, transcript } from "./transcript.js";
import { MessageTree } from "./tree.js";
import { number, plural, whySlow } from "../shared/words.js";

const KEEP_MS = 300; // between two times that a growing answer is kept: what a reload may have to ask for again
const TITLE_LENGTH = 60; // characters of a question
const DELETED_FOR_MS = 60_000; // that a deleted chat is kept: longer than it can be brought back
const MAX_FILE = 64 * 2 ** 20; // bytes of an imported file; its chats are held in memory twice
const REFUSALS = new Set(["too_long", "invalid_parameter", "request_too_large"]); // of a question: it would be refused again
const STILL_WAITING_MS = 60_000; // for an answer to a question that was asked just before the page was left
const SWARM_PAGE = "swarm";

class App {
  #store;
  #models;
  #states = new Map(); // what the server says of its models
  #defaultModel;
  #pageToken;
  #chat; // that is shown
  #tree;
  #lastCreated = 0;
  #runs = new Map(); // chat id to the answer that is being written there
  #session = null; // of the chat that is shown, while nothing is written there
  #watch = new AbortController(); // ends the waiting for a model
  #away = new AbortController(); // ends the waiting for another window
  #elsewhere = false; // whether another window writes in the chat that is shown
  #watched = null; // the model that is waited for, or was
  #ready = false; // whether it can be asked
  #list;
  #composer;
  #sidebar;
  #settings;
  #picker;
  #toast = new Toast();
  #announcer = new Announcer();

  constructor({ models, default_model: defaultModel, page_token: pageToken }, store) {
    this.#store = store;
    this.#models = models;
    this.#defaultModel = defaultModel;
    this.#pageToken = pageToken;
    this.#list = new MessageList({
      regenerate: (id) => this.#regenerate(id),
      proceed: (id) => this.#proceed(id),
      edit: (id, text) => this.#edit(id, text),
      select: (id) => this.#select(id),
    });
    this.#composer = new Composer({
      send: (text) => this.#send(text),
      stop: () => this.#stop(),
      editLast: () => this.#editLast(),
    });
    this.#sidebar = new Sidebar({
      newChat: () => this.#newChat(),
      open: (id) => this.#open(id),
      rename: (id, title) => this.#rename(id, title),
      remove: (id) => this.#remove(id),
      exportChat: (id, format) => this.#export(id, format),
      importFile: (file) => this.#import(file),
      search: (text) => store.search(text),
    });
    this.#settings = new Settings((settings, system) => this.#change({ settings, system }));
    this.#picker = new Picker(models, pageToken, {
      select: (name) => this.#selectModel(name),
      told: (states) => {
        this.#states = states;
        this.#showTokens();
        if (this.#ready) this.#idle();
      },
    });
    store.onChange(() => this.#changedElsewhere());
    document.addEventListener("keydown", (event) => this.#shortcut(event));
    addEventListener("online", () => this.#runs.forEach(({ session }) => session.reconnect()));
    addEventListener("pagehide", () => this.#runs.forEach((run) => this.#keepNow(run)));
    addEventListener("hashchange", () => this.#openFromAddress());
    for (const radio of document.querySelectorAll("input[name=theme]")) {
      radio.checked = radio.value === (document.documentElement.dataset.theme ?? "");
      radio.addEventListener("change", () => setTheme(radio.value));
    }
  }

  async start() {
    this.#show(this.#blank(), []);
    await this.#kept(this.#store.purge(Date.now() - DELETED_FOR_MS));
    await this.#openFromAddress();
    await this.#showList();
    if (!this.#store.lasting) this.#toast.show("This browser keeps nothing: your chats will be gone when you leave.");
  }

  // Chats

  #blank() {
    const now = Date.now();
    const { model = this.#defaultModel, system = null, settings = {} } = this.#chat ?? {};
    return {
      id: newId(),
      title: "New chat",
      created: now,
      updated: now,
      model,
      system,
      settings,
      selected: {},
      forgotten: null,
      deleted: null,
    };
  }

  #newChat({ replace = false } = {}) {
    this.#show(this.#blank(), []);
    const address = location.pathname + location.search;
    if (replace) history.replaceState(null, "", address);
    else if (location.hash) history.pushState(null, "", address);
    this.#showList();
    this.#composer.focus();
  }

  async #openFromAddress() {
    const id = new URLSearchParams(location.hash.slice(1)).get("chat");
    if (id && id !== this.#chat.id) await this.#open(id);
    else if (!id && this.#tree.size) this.#newChat({ replace: true });
  }

  async #open(id) {
    if (id === this.#chat.id) return;
    const before = this.#chat;
    const [stored, messages] = await this.#kept(Promise.all([this.#store.chat(id), this.#store.messages(id)]), []);
    if (this.#chat !== before) return; // something else was opened meanwhile
    const run = this.#runs.get(id);
    const chat = run?.chat ?? stored;
    if (!chat || chat.deleted) return;
    this.#show(chat, run?.tree ?? messages);
    this.#setAddress();
    this.#showList();
  }

  /** Show a chat; what is being written in another one goes on. */
  #show(chat, messages) {
    this.#session?.close();
    this.#session = null;
    this.#away.abort();
    this.#away = new AbortController();
    this.#elsewhere = false;
    this.#announcer.reset();
    this.#chat = chat;
    if (!this.#find(chat.model)) chat.model = this.#defaultModel; // imported, or not served any more
    this.#tree = messages instanceof MessageTree ? messages : new MessageTree(messages, chat.selected);
    this.#picker.choose(chat.model);
    this.#showMessages();
    this.#list.follow();
    this.#settings.show(this.#model, chat.settings, chat.system);
    if (chat.model !== this.#watched) this.#watchModel();
    else this.#idle();
    this.#remind();
    const last = this.#tree.path().at(-1);
    if (last?.state === "running" && !this.#run) this.#resume(last);
  }

  #setAddress() {
    const address = `#chat=${this.#chat.id}`;
    if (location.hash !== address) history.pushState(null, "", address);
  }

  async #showList() {
    setText($("title"), this.#chat.title);
    document.title = this.#tree.size ? `${this.#chat.title} · Petals Chat` : "Petals Chat";
    const chats = await this.#kept(this.#store.chats(), []);
    this.#sidebar.show(chats, this.#chat.id, new Set(this.#runs.keys()));
  }

  async #rename(id, title) {
    const chat = this.#known(id) ?? (await this.#kept(this.#store.chat(id)));
    if (!chat) return;
    chat.title = title;
    await this.#kept(this.#store.putChat(chat));
    await this.#showList();
  }

  async #remove(id) {
    const chat = this.#known(id) ?? (await this.#kept(this.#store.chat(id)));
    if (!chat) return;
    this.#runs.get(id)?.stop();
    chat.deleted = Date.now();
    await this.#kept(this.#store.putChat(chat));
    if (id === this.#chat.id) this.#newChat();
    else await this.#showList();
    this.#toast.show(`Deleted “${chat.title}”.`, {
      undo: async () => {
        chat.deleted = null;
        await this.#kept(this.#store.putChat(chat));
        await this.#open(id);
        await this.#showList();
      },
      gone: () => this.#kept(this.#store.delete(id)),
    });
  }

  /** Wait for the store; if it fails, say so, and go on with `otherwise`. */
  async #kept(promise, otherwise = undefined) {
    try {
      return await promise;
    } catch (error) {
      console.error(error);
      this.#toast.show("This browser could not keep or read your chats: it may be short of space. Export what you need.");
      return otherwise;
    }
  }

  #known(id) {
    return id === this.#chat.id ? this.#chat : this.#runs.get(id)?.chat;
  }

  async #export(id, format) {
    const chats = id ? [await this.#store.chat(id)] : await this.#store.chats();
    const all = await Promise.all(chats.map(async (chat) => ({ chat, messages: await this.#store.messages(chat.id) })));
    const name = id ? chats[0].title.replace(/[^\p{L}\p{N} _-]+/gu, "").slice(0, TITLE_LENGTH).trim() || "chat" : "petals-chats";
    const { toJson, toMarkdown } = await import("./transfer.js");
    if (format === "md") download(`${name}.md`, "text/markdown", toMarkdown(all[0]));
    else download(`${name}.json`, "application/json", toJson(all));
  }

  async #import(file) {
    const { ImportError, parse } = await import("./transfer.js");
    try {
      if (file.size > MAX_FILE) throw new ImportError(`The file is larger than ${MAX_FILE / 2 ** 20} MiB.`);
      const found = parse(await file.text(), this.#settings.bounds);
      for (const { chat, messages } of found) await this.#store.putAll(chat, messages);
      this.#toast.show(`Imported ${plural(found.length, "chat")}.`);
      await this.#open(found[0].chat.id);
      await this.#showList();
    } catch (error) {
      if (!(error instanceof ImportError)) console.error(error);
      const reason = error instanceof ImportError ? error.message : "It could not be kept.";
      this.#toast.show(`${file.name} was not imported. ${reason}`);
    }
  }

  /** Another window of this browser has changed something. */
  async #changedElsewhere() {
    await this.#showList();
    const [shown, tree] = [this.#chat, this.#tree];
    const [chat, messages] = await this.#kept(Promise.all([this.#store.chat(shown.id), this.#store.messages(shown.id)]), []);
    if (!tree.size || this.#run || this.#chat !== shown || this.#tree !== tree) return;
    if (!chat || chat.deleted) {
      this.#newChat({ replace: true });
      this.#toast.show("This chat was deleted in another window.");
    } else if (chat.updated !== shown.updated) {
      this.#show(chat, messages);
    }
  }

  async #change(changes) {
    Object.assign(this.#chat, changes);
    if (this.#tree.size) await this.#kept(this.#store.putChat(this.#chat));
  }

  // Models

  #find(name) {
    return this.#models.find((model) => model.name === name);
  }

  get #model() {
    return this.#find(this.#chat.model);
  }

  /** Tokens that the model can read at most. */
  get #limit() {
    return this.#limitOf(this.#model);
  }

  #limitOf(model) {
    return Math.max(this.#states.get(model.name)?.context_length ?? 0, model.max_length);
  }

  /** The chat goes on with another model, which will read it from the beginning. */
  async #selectModel(name) {
    this.#runs.get(this.#chat.id)?.stop();
    this.#session?.close();
    this.#session = null;
    this.#picker.choose(name);
    await this.#change({ model: name });
    this.#settings.show(this.#model, this.#chat.settings, this.#chat.system);
    this.#watchModel();
  }

  async #watchModel() {
    this.#watch.abort();
    this.#watch = new AbortController();
    this.#watched = this.#chat.model;
    const { signal } = this.#watch;
    this.#ready = false;
    this.#idle();
    let told = "loading";
    try {
      for await (const { state, words } of readiness(this.#chat.model, this.#pageToken, signal)) {
        if (!this.#run) this.#composer.show(DOWN.has(state) ? "error" : "loading", words, false);
        if (state !== told) this.#announcer.say(words); // not each step of the progress
        told = state;
      }
    } catch (error) {
      if (signal.aborted) return;
      throw error;
    }
    await this.#picker.refresh(); // how much the model can read
    if (signal.aborted) return;
    this.#ready = true;
    this.#idle();
    if (!this.#run) this.#remind();
  }

  // Messages

  /** What is being written in the chat that is shown. */
  get #run() {
    return this.#runs.get(this.#chat.id);
  }

  #showMessages() {
    this.#list.show(this.#tree, this.#chat.forgotten);
    this.#showTokens();
  }

  #showTokens() {
    this.#composer.tokens(positionOf(this.#tree.path()), this.#limit);
  }

  get #isFull() {
    return positionOf(this.#tree.path()) >= this.#limit;
  }

  /** Let the page say what can be done in the chat that is shown. */
  #idle({ failed = false } = {}) {
    const run = this.#run;
    const full = !run && this.#isFull;
    this.#composer.placeholder(full ? "This chat is full" : this.#ready ? "Write a message" : "The model is loading");
    if (run) this.#composer.show("answering", run.words, false);
    else if (this.#elsewhere) this.#composer.show("loading", "Another window writes here", false);
    else if (failed) this.#composer.show("error", "The last answer failed", this.#canAsk && !full);
    else if (this.#ready) this.#composer.show("ready", "Ready", !full);
    else this.#composer.show("loading", "Connecting…", false);
  }

  get #canAsk() {
    return this.#ready && !this.#run && !this.#elsewhere;
  }

  /** @returns {boolean} whether the text was taken */
  #send(text) {
    if (!this.#canAsk) return false;
    const path = this.#tree.path();
    if (!path.length) {
      const title = text.replace(/\s+/g, " ").trim();
      this.#chat.title = title.length > TITLE_LENGTH ? `${title.slice(0, TITLE_LENGTH).trimEnd()}…` : title;
      this.#setAddress();
    }
    let last = path.at(-1);
    // An imported chat may end with a question: it is asked along with this one.
    if (last?.role === "user") last = this.#add({ parent: last.id, role: "assistant", text: "", state: "failed", stats: {} });
    this.#list.follow();
    this.#ask(last?.id ?? null, text);
    return true;
  }

  #ask(parent, text) {
    this.#answer(this.#add({ parent, role: "user", text, state: "done" }));
  }

  #answer(question) {
    const stats = { tokens: 0, events: [] };
    this.#write(this.#add({ parent: question.id, role: "assistant", text: "", state: "running", stopSequence: null, stats }));
  }

  #add(fields) {
    this.#lastCreated = Math.max(Date.now(), this.#lastCreated + 1); // no two at the same time: it is their order
    const message = { id: newId(), chat: this.#chat.id, created: this.#lastCreated, ...fields };
    if (message.role === "assistant") message.model ??= this.#chat.model;
    this.#tree.add(message);
    return message;
  }

  #regenerate(id) {
    if (!this.#canAsk) return;
    this.#clearNotices();
    this.#answer(this.#tree.get(this.#tree.get(id).parent));
    this.#composer.focus();
  }

  /** Let the model write on where it ended or was cut off. */
  #proceed(id) {
    if (!this.#canAsk) return;
    this.#clearNotices();
    const answer = this.#tree.get(id);
    // Another model has its own way to end an answer.
    Object.assign(answer, { state: "running", stopSequence: null, model: this.#chat.model, error: null });
    this.#write(answer);
    this.#composer.focus();
  }

  /** @returns {Promise<boolean>} whether the text was taken */
  async #edit(id, text) {
    const [chat, run] = [this.#chat, this.#run];
    if (run) {
      // Who asks something else does not want this answer.
      this.#stop();
      await run.ended;
    }
    const { parent, role, model } = this.#tree.get(id) ?? {};
    if (this.#chat !== chat || !role || (role === "user" && !this.#canAsk)) return false;
    this.#clearNotices();
    if (role === "user") {
      this.#ask(parent, text);
    } else {
      const edited = this.#add({ parent, role, text, state: "done", stopSequence: null, model, stats: {} });
      await this.#keepAll(chat, this.#tree, [edited]);
      this.#showMessages();
    }
    return true;
  }

  #editLast() {
    const question = this.#tree.path().findLast(({ role }) => role === "user");
    if (question) this.#list.get(question.id).edit();
  }

  async #select(id) {
    if (this.#run || this.#elsewhere) return;
    this.#clearNotices();
    this.#tree.select(id);
    this.#showMessages();
    this.#list.get(id).focusVersions();
    this.#idle();
    this.#remind();
    await this.#keepAll(this.#chat, this.#tree, []);
  }

  /** Keep a chat and, of its messages, these. */
  async #keepAll(chat, tree, messages) {
    chat.selected = tree.selected;
    chat.updated = Date.now();
    await this.#kept(this.#store.putAll(chat, messages));
  }

  #clearNotices() {
    for (const { id, role } of this.#tree.path()) if (role === "assistant") this.#list.get(id)?.clearNotice();
  }

  #stop() {
    const run = this.#run;
    if (!run) return;
    this.#composer.stopping();
    run.stop();
  }

  // Answers

  /** Take up an answer that was running when the page was left, unless another window is writing it. */
  async #resume(answer) {
    const [chat, tree] = [this.#chat, this.#tree];
    const { signal } = this.#away;
    this.#elsewhere = true;
    this.#idle();
    const held = await lock(answer.id, signal); // at once, or when the other window has ended
    const messages = await this.#kept(this.#store.messages(chat.id), tree.path());
    if (signal.aborted || this.#tree !== tree) {
      held?.release();
      return;
    }
    this.#elsewhere = false;
    const now = messages.find(({ id }) => id === answer.id);
    if (now?.state !== "running") {
      held?.release();
      this.#show((await this.#kept(this.#store.chat(chat.id))) ?? chat, messages);
      return;
    }
    Object.assign(answer, now);
    if (answer.point?.sessionId || Date.now() - answer.created < STILL_WAITING_MS) {
      await this.#write(answer, { point: answer.point, held });
      return;
    }
    Object.assign(answer, { state: "interrupted", error: { words: explain(new Interrupted()) } });
    held?.release();
    await this.#keepAll(chat, tree, [answer]);
    this.#showMessages();
    this.#idle();
    this.#remind();
  }

  async #write(answer, { point = null, held = null } = {}) {
    const model = this.#find(answer.model) ?? this.#model;
    const run = new Run({ chat: this.#chat, tree: this.#tree, answer, session: this.#takeSession(model), model });
    this.#runs.set(run.chat.id, run);
    this.#clearNotices();
    this.#showMessages();
    this.#idle();
    // The answer, its question, and the answer that was wanting before that, if there was one: the others are kept.
    const latest = run.tree.pathTo(answer.id).slice(-3);
    const kept = this.#keepAll(run.chat, run.tree, latest).then(() => this.#showList());
    held ??= await lock(answer.id, run.abort.signal);
    let error = null;
    try {
      const options = { signal: run.abort.signal, position: positionOf(run.tree.pathTo(answer.id)), point };
      for await (const message of run.session.answer(this.#transcript(run), this.#parameters(run), options)) {
        this.#take(run, message);
      }
    } catch (caught) {
      error = caught;
    }
    await kept;
    try {
      // The session has read another system prompt than the next question is to be asked with.
      if (point && point.system !== run.chat.system) run.session.close();
      await this.#finish(run, error);
    } finally {
      held?.release();
      run.end();
    }
  }

  #takeSession(model) {
    const session = this.#session;
    this.#session = null;
    if (session?.model === model.name) return session;
    session?.close();
    return new ChatSession(model, { limit: () => this.#limitOf(model), pageToken: this.#pageToken });
  }

  #transcript({ chat, tree, answer, model }) {
    const path = tree.pathTo(answer.id);
    const start = Math.max(0, path.findIndex(({ id }) => id === chat.forgotten));
    return transcript(path.slice(start), model.chat, model.name, chat.system ?? undefined);
  }

  #parameters({ chat, tree, model, answer }) {
    const [stop, ...others] = model.chat.stop;
    const { seed, ...settings } = samplingParameters(chat.settings);
    // Rounds of one token: the answer arrives token by token. Another answer to the same question is to be another one.
    const streaming = { max_new_tokens: 1, stop_sequence: stop, extra_stop_sequences: others };
    const fixed = seed === undefined ? {} : { seed: seed + tree.siblings(answer.id).indexOf(answer.id) };
    return { model_defaults: true, ...settings, ...fixed, ...streaming };
  }

  /** Take in what the server says. */
  #take(run, message) {
    const { answer } = run;
    const view = this.#list.get(answer.id);
    if (message.outputs !== undefined) {
      answer.text += message.outputs;
      answer.stopSequence = message.stop_sequence ?? null;
      run.count(message);
      view?.append(message.outputs);
      view?.note("");
      run.words = "Answering…";
      if (view) this.#announcer.append(message.outputs);
      if (view && run.isSlow) this.#sayWhy(run, view);
      this.#keepSoon(run);
      if (view && message.stop !== true) this.#composer.tokens(answer.stats.position ?? 0, this.#limit);
    } else if (message.begun) {
      this.#keepNow(run);
    } else if (message.swarm) {
      run.notice(message.swarm);
      view?.showStats();
      const { prefill } = message.swarm;
      if (prefill) view?.note(`Reading: ${number(prefill.processed)} of ${number(prefill.total)} tokens`);
    } else {
      const words = message.status ?? placeInQueue(message.queue.position);
      run.words = words;
      view?.note(words);
    }
    if (run === this.#run && !run.stopping) this.#composer.status(run.words);
  }

  #sayWhy(run, view) {
    run.saidWhy = true;
    view?.notice(whySlow(run.rate.perSecond, run.answer.stats.route), ["How to add a machine", `${SWARM_PAGE}#add`]);
  }

  #keepSoon(run) {
    run.keepTimer ||= setTimeout(() => this.#keepNow(run), KEEP_MS);
  }

  #keepNow(run) {
    clearTimeout(run.keepTimer);
    run.keepTimer = 0;
    run.answer.point = { ...run.session.point, system: run.chat.system };
    this.#kept(this.#store.putMessage(run.answer));
  }

  async #finish(run, error) {
    const { answer, chat, session } = run;
    clearTimeout(run.keepTimer);
    if (error instanceof TakenOver) {
      // What is kept of the answer is the other window's now.
      this.#runs.delete(chat.id);
      if (chat === this.#chat) this.#show(chat, await this.#kept(this.#store.messages(chat.id), run.tree));
      return;
    }
    const givenUp = run.stopping || run.abort.signal.aborted;
    const failed = error && !givenUp;
    if (error) session.close();
    if (failed && !(error instanceof SocketError || error instanceof Interrupted)) console.error(error);
    Object.assign(answer, {
      point: null,
      state: failed ? stateAfter(error) : givenUp || answer.stats.reason === "cancelled" ? "stopped" : "done",
      error: failed ? { code: error.code, words: explain(error) } : null,
      ...(error ? { stopSequence: null } : {}),
    });
    await this.#keepAll(chat, run.tree, [answer]);
    this.#runs.delete(chat.id);
    if (chat === this.#chat && chat.model === run.model.name) this.#session = session;
    else session.close();
    if (chat === this.#chat) {
      this.#showMessages();
      this.#list.get(answer.id)?.note("");
      this.#announcer.end();
      this.#idle({ failed });
      this.#remind();
    }
    await this.#showList();
  }

  /** Say below the last answer what is to be done about it, if anything is. */
  #remind() {
    const answer = this.#tree.path().at(-1);
    if (answer?.role !== "assistant" || answer.state === "running") return;
    const { code, words } = answer.error ?? {};
    const view = this.#list.get(answer.id);
    const again = () => (answer.text ? this.#proceed(answer.id) : this.#askAgain(answer));
    const limit = `the model can read ${number(this.#limit)} tokens`;
    if (code === "too_long") this.#offerRoom(answer, `This chat has no room left for your message: ${limit}.`);
    else if (code === "invalid_api_key") import("../shared/key.js").then((key) => key.refused(view, this.#pageToken, again));
    else if (words) view.notice(words, [answer.text ? "Continue" : "Retry", again]);
    else if (this.#ready && this.#isFull) this.#offerRoom(answer, `This chat is full: ${limit}.`);
  }

  /** Ask again what got no answer: that is no branch worth keeping. */
  #askAgain(answer) {
    if (!this.#canAsk) return;
    this.#clearNotices();
    const stats = { tokens: 0, events: [] };
    Object.assign(answer, { state: "running", text: "", stopSequence: null, model: this.#chat.model, error: null, stats });
    this.#composer.focus();
    this.#write(answer);
  }

  /** The context is full: let the user choose what to do. */
  #offerRoom(answer, words) {
    const from = forgetUpTo(this.#tree.path(), this.#limit, this.#chat.forgotten);
    const choices = [["New chat", () => this.#newChat()]];
    if (from) choices.unshift(["Go on without the oldest messages", () => this.#forget(answer, from)]);
    this.#list.get(answer.id).notice(words, ...choices);
  }

  async #forget(answer, from) {
    if (!this.#canAsk) return;
    // How long what is left of them is will be known with the next answer.
    for (const message of this.#tree.path()) if (message.stats) message.stats.position = 0;
    this.#chat.forgotten = from;
    await this.#keepAll(this.#chat, this.#tree, this.#tree.path());
    this.#clearNotices();
    this.#showMessages();
    this.#idle();
    if (answer.text) this.#composer.focus();
    else this.#askAgain(answer);
  }

  // Keys

  #shortcut(event) {
    const { key } = event;
    const control = (event.ctrlKey || event.metaKey) && !event.altKey && !event.shiftKey;
    if (key === "Escape") {
      // Where it closes something, or ends a search or a composition, it does no more than that.
      const busy = event.defaultPrevented || isComposing(event) || document.querySelector("dialog[open], :popover-open");
      if (!busy && document.activeElement !== $("search")) this.#stop();
    } else if (control && key.toLowerCase() === "k") {
      event.preventDefault();
      closeDialogs();
      this.#newChat();
    } else if (control && key === "/") {
      event.preventDefault();
      if ($("keys").open) $("keys").close();
      else (closeDialogs(), $("keys").showModal());
    }
  }
}

/** Tokens of the context that a chat has used. */
function positionOf(path) {
  return path.findLast(({ stats }) => stats?.position)?.stats.position ?? 0;
}

function stateAfter(error) {
  if (error instanceof Interrupted) return "interrupted";
  return error instanceof RequestFailed && REFUSALS.has(error.code) ? "refused" : "failed";
}

function placeInQueue(position) {
  return position === 1 ? "In the queue: you are next" : `In the queue: ${plural(position - 1, "other")} before you`;
}

function closeDialogs() {
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  remember("localStorage", "theme", theme);
}

function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
  URL.revokeObjectURL(url);
}

const app = new App(pageConfig(), await openStore());
await app.start();
