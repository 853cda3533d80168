/** The chats that this browser keeps: their list, and the one that is open. */

import { $, setText } from "../shared/dom.js";
import { plural } from "../shared/words.js";
import { Conversation } from "./conversation.js";
import { newId } from "./id.js";

const TITLE_LENGTH = 60; // characters of a question
const DELETED_FOR_MS = 60_000; // that a deleted chat is kept: longer than it can be brought back
const MAX_FILE = 64 * 2 ** 20; // bytes of an imported file; its chats are held in memory twice

export class Chats {
  open; // the conversation that is shown
  #store;
  #running;
  #toast;
  #page;

  /**
   * @param {Map<string, object>} running chat id to the answer that is being written there
   * @param {{defaultModel: string, bounds: object, show: () => void, list: Function, focus: () => void}} page `show`: another conversation is open
   */
  constructor(store, running, toast, page) {
    this.#store = store;
    this.#running = running;
    this.#toast = toast;
    this.#page = page;
    store.onChange(() => this.#changedElsewhere());
    addEventListener("hashchange", () => this.#openFromAddress());
  }

  async start() {
    this.show(new Conversation(this.#blank()));
    await this.stored(this.#store.purge(Date.now() - DELETED_FOR_MS));
    await this.#openFromAddress();
    await this.list();
    if (!this.#store.lasting) this.#toast.show("This browser keeps nothing: your chats will be gone when you leave.");
  }

  #blank() {
    const now = Date.now();
    const { model = this.#page.defaultModel, system = null, settings = {} } = this.open?.chat ?? {};
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

  create({ replace = false } = {}) {
    this.show(new Conversation(this.#blank()));
    const address = location.pathname + location.search;
    if (replace) history.replaceState(null, "", address);
    else if (location.hash) history.pushState(null, "", address);
    this.list();
    this.#page.focus();
  }

  /** Show a conversation; what is being written in another one goes on. */
  show(conversation) {
    this.open = conversation;
    this.#page.show();
  }

  /**
   * A chat's conversation: the one in which an answer is being written, or else what is kept of it.
   *
   * @returns {Promise<Conversation | null>} null: there is no such chat any more; `otherwise`: it cannot be read
   */
  async conversation(id, otherwise = null) {
    const kept = await this.stored(this.#read(id), otherwise);
    const found = this.#running.get(id)?.conversation ?? kept;
    return found?.chat.deleted ? null : found;
  }

  async #read(id) {
    const [chat, messages] = await Promise.all([this.#store.chat(id), this.#store.messages(id)]);
    return chat ? new Conversation(chat, messages) : null;
  }

  async select(id) {
    const before = this.open;
    if (id === before.chat.id) return;
    const found = await this.conversation(id);
    if (!found || this.open !== before) return; // something else was opened meanwhile
    this.show(found);
    this.setAddress();
    this.list();
  }

  async #openFromAddress() {
    const id = new URLSearchParams(location.hash.slice(1)).get("chat");
    if (id) await this.select(id);
    else if (this.open.tree.size) this.create({ replace: true });
  }

  setAddress() {
    const address = `#chat=${this.open.chat.id}`;
    if (location.hash !== address) history.pushState(null, "", address);
  }

  async list() {
    setText($("title"), this.open.chat.title);
    document.title = this.open.tree.size ? `${this.open.chat.title} · Petals Chat` : "Petals Chat";
    const chats = await this.stored(this.#store.chats(), []);
    this.#page.list(chats, this.open.chat.id, new Set(this.#running.keys()));
  }

  /** Name a new chat by its first question. */
  begin(question) {
    const title = question.replace(/\s+/g, " ").trim();
    this.open.chat.title = title.length > TITLE_LENGTH ? `${title.slice(0, TITLE_LENGTH).trimEnd()}…` : title;
    this.setAddress();
  }

  async #known(id) {
    if (id === this.open.chat.id) return this.open.chat;
    return this.#running.get(id)?.conversation.chat ?? (await this.stored(this.#store.chat(id)));
  }

  async rename(id, title) {
    const chat = await this.#known(id);
    if (!chat) return;
    chat.title = title;
    await this.stored(this.#store.putChat(chat));
    await this.list();
  }

  async remove(id) {
    const chat = await this.#known(id);
    if (!chat) return;
    this.#running.get(id)?.stop();
    chat.deleted = Date.now();
    await this.stored(this.#store.putChat(chat));
    if (id === this.open.chat.id) this.create();
    else await this.list();
    this.#toast.show(`Deleted “${chat.title}”.`, {
      undo: async () => {
        chat.deleted = null;
        await this.stored(this.#store.putChat(chat));
        await this.select(id);
        await this.list();
      },
      gone: () => this.stored(this.#store.delete(id)),
    });
  }

  /** Change the open chat. */
  async change(changes) {
    Object.assign(this.open.chat, changes);
    if (this.open.tree.size) await this.stored(this.#store.putChat(this.open.chat));
  }

  search(text) {
    return this.#store.search(text);
  }

  /** Keep a chat and, of its messages, these. */
  async keep({ chat, tree }, messages) {
    chat.selected = tree.selected;
    chat.updated = Date.now();
    await this.stored(this.#store.putAll(chat, messages));
  }

  keepMessage(message) {
    this.stored(this.#store.putMessage(message));
  }

  /** Wait for the store; if it fails, say so, and go on with `otherwise`. */
  async stored(promise, otherwise = undefined) {
    try {
      return await promise;
    } catch (error) {
      console.error(error);
      this.#toast.show("This browser could not keep or read your chats: it may be short of space. Export what you need.");
      return otherwise;
    }
  }

  async export(id, format) {
    const chats = id ? [await this.#store.chat(id)] : await this.#store.chats();
    const all = await Promise.all(chats.map(async (chat) => ({ chat, messages: await this.#store.messages(chat.id) })));
    const name = id ? chats[0].title.replace(/[^\p{L}\p{N} _-]+/gu, "").slice(0, TITLE_LENGTH).trim() || "chat" : "petals-chats";
    const { download, toJson, toMarkdown } = await import("./transfer.js");
    if (format === "md") download(`${name}.md`, "text/markdown", toMarkdown(all[0]));
    else download(`${name}.json`, "application/json", toJson(all));
  }

  async import(file) {
    const { ImportError, parse } = await import("./transfer.js");
    try {
      if (file.size > MAX_FILE) throw new ImportError(`The file is larger than ${MAX_FILE / 2 ** 20} MiB.`);
      const found = parse(await file.text(), this.#page.bounds);
      for (const { chat, messages } of found) await this.#store.putAll(chat, messages);
      this.#toast.show(`Imported ${plural(found.length, "chat")}.`);
      await this.select(found[0].chat.id);
      await this.list();
    } catch (error) {
      if (!(error instanceof ImportError)) console.error(error);
      const reason = error instanceof ImportError ? error.message : "It could not be kept.";
      this.#toast.show(`${file.name} was not imported. ${reason}`);
    }
  }

  /** Another window of this browser has changed something. */
  async #changedElsewhere() {
    await this.list();
    const shown = this.open;
    const { id, updated } = shown.chat;
    const kept = await this.conversation(id, shown);
    if (!shown.tree.size || this.#running.has(id) || this.open !== shown) return;
    if (!kept) {
      this.create({ replace: true });
      this.#toast.show("This chat was deleted in another window.");
    } else if (kept.chat.updated !== updated) {
      this.show(kept);
    }
  }
}
