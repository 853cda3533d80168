/** Wires the chats, the answers and the page together. */

import { Announcer } from "../shared/announcer.js";
import { $, isFreeEscape, pageConfig } from "../shared/dom.js";
import { remember } from "../shared/web-storage.js";
import { Answering } from "./answering.js";
import { Asking } from "./asking.js";
import { openStore } from "./chat-store.js";
import { Chats } from "./chats.js";
import { Composer } from "./composer.js";
import { MessageList } from "./messages.js";
import { Models } from "./models.js";
import { Notices } from "./notices.js";
import { Settings } from "./settings.js";
import { Sidebar, Toast } from "./sidebar.js";

class App {
  #chats;
  #answering;
  #asking;
  #models;
  #notices;
  #list;
  #composer;
  #settings;
  #announcer = new Announcer();

  constructor(config, store) {
    const { default_model: defaultModel, page_token: pageToken } = config;
    const running = new Map(); // chat id to the answer that is being written there
    this.#list = new MessageList({
      regenerate: (id) => this.#asking.regenerate(id),
      proceed: (id) => this.#asking.proceed(id),
      edit: (id, text) => this.#asking.edit(id, text),
      select: (id) => this.#asking.select(id),
    });
    this.#composer = new Composer({
      send: (text) => this.#asking.send(text),
      stop: () => this.#stop(),
      editLast: () => this.#asking.editLast(),
    });
    const sidebar = new Sidebar({
      newChat: () => this.#chats.create(),
      open: (id) => this.#chats.select(id),
      rename: (id, title) => this.#chats.rename(id, title),
      remove: (id) => this.#chats.remove(id),
      exportChat: (id, format) => this.#chats.export(id, format),
      importFile: (file) => this.#chats.import(file),
      search: (text) => this.#chats.search(text),
    });
    this.#settings = new Settings((settings, system) => this.#chats.change({ settings, system }));
    this.#models = new Models(config, {
      select: (name) => this.#selectModel(name),
      updated: () => (this.#models.ready ? this.#refreshStatus() : this.#showTokens()),
    });
    this.#chats = new Chats(store, running, new Toast(), {
      defaultModel,
      bounds: this.#settings.bounds,
      show: () => this.#show(),
      list: (...shown) => sidebar.show(...shown),
      focus: () => this.#composer.focus(),
    });
    this.#answering = new Answering(running, this.#chats, this.#models, {
      pageToken,
      view: (id) => this.#list.get(id),
      begun: (run) => this.#notices.begun(run),
      refresh: () => this.#refresh(),
      words: ({ words }) => this.#composer.status(words),
      said: (text) => this.#announcer.append(text),
      position: (tokens) => this.#composer.tokens(tokens, this.#limit),
      slow: (view, run) => this.#notices.slow(view, run),
      ended: ({ answer }, failed) => {
        this.#refresh({ failed });
        this.#list.get(answer.id)?.note("");
        this.#announcer.end();
      },
    });
    this.#asking = new Asking(this.#chats, this.#answering, this.#models, {
      view: (id) => this.#list.get(id),
      refresh: () => this.#refresh(),
      follow: () => this.#list.follow(),
      focus: () => this.#composer.focus(),
      stop: () => this.#stop(),
    });
    this.#notices = new Notices(this.#list, {
      pageToken,
      proceed: (id) => this.#asking.proceed(id),
      forget: (id, from) => this.#asking.forget(id, from),
      newChat: () => this.#chats.create(),
    });
    document.addEventListener("keydown", (event) => this.#shortcut(event));
    for (const radio of document.querySelectorAll("input[name=theme]")) {
      radio.checked = radio.value === (document.documentElement.dataset.theme ?? "");
      radio.addEventListener("change", () => setTheme(radio.value));
    }
  }

  start() {
    return this.#chats.start();
  }

  /** Another chat is open: show it. */
  #show() {
    this.#answering.leave();
    this.#announcer.reset();
    const { chat } = this.#chats.open;
    const model = this.#models.of(chat);
    if (chat.model !== this.#models.watched) this.#watchModel();
    this.#refresh();
    this.#list.follow();
    this.#settings.show(model, chat.settings, chat.system);
    this.#answering.resume();
  }

  get #limit() {
    return this.#models.limit(this.#chats.open.chat.model);
  }

  get #isFull() {
    return this.#chats.open.position() >= this.#limit;
  }

  /** Show the open chat as it is, and what can be done in it. */
  #refresh({ failed = false } = {}) {
    const { open } = this.#chats;
    this.#list.show(open.tree, open.chat.forgotten);
    this.#refreshStatus({ failed });
    this.#notices.show(open, this.#limit, this.#models.ready && this.#isFull);
  }

  #showTokens() {
    this.#composer.tokens(this.#chats.open.position(), this.#limit);
  }

  #refreshStatus({ failed = false } = {}) {
    const { run, elsewhere } = this.#answering;
    const { ready } = this.#models;
    const full = !run && this.#isFull;
    this.#showTokens();
    this.#composer.placeholder(full ? "This chat is full" : ready ? "Write a message" : "The model is loading");
    if (run) this.#composer.show("answering", run.words, false);
    else if (elsewhere) this.#composer.show("loading", "Another window writes here", false);
    else if (failed) this.#composer.show("error", "The last answer failed", this.#asking.possible && !full);
    else if (ready) this.#composer.show("ready", "Ready", !full);
    else this.#composer.show("loading", "Connecting…", false);
  }

  /** The chat goes on with another model, which will read it from the beginning. */
  async #selectModel(name) {
    this.#answering.run?.stop();
    this.#answering.closeSession();
    await this.#chats.change({ model: name });
    const { chat } = this.#chats.open;
    this.#settings.show(this.#models.of(chat), chat.settings, chat.system);
    this.#watchModel();
    this.#refreshStatus();
  }

  async #watchModel() {
    const isReady = await this.#models.watch(this.#chats.open.chat.model, (words, isDown, isNew) => {
      if (!this.#answering.run) this.#composer.show(isDown ? "error" : "loading", words, false);
      if (isNew) this.#announcer.say(words); // not each step of the progress
    });
    if (isReady) this.#refresh();
  }

  #stop() {
    const { run } = this.#answering;
    if (!run) return;
    this.#composer.stopping();
    run.stop();
  }

  #shortcut(event) {
    const { key } = event;
    const control = (event.ctrlKey || event.metaKey) && !event.altKey && !event.shiftKey;
    if (isFreeEscape(event)) {
      this.#stop();
    } else if (control && key.toLowerCase() === "k") {
      event.preventDefault();
      closeDialogs();
      this.#chats.create();
    } else if (control && key === "/") {
      event.preventDefault();
      if ($("keys").open) $("keys").close();
      else (closeDialogs(), $("keys").showModal());
    }
  }
}

function closeDialogs() {
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  remember("localStorage", "theme", theme);
}

const app = new App(pageConfig(), await openStore());
await app.start();
