/** Where chats are kept: in the browser's IndexedDB. Knows nothing of the page or of the network. */

/**
 * @typedef {object} Chat
 * @property {string} id
 * @property {string} title
 * @property {number} created milliseconds since 1970
 * @property {number} updated
 * @property {string} model
 * @property {string | null} system the system prompt; null: the model's own
 * @property {Record<string, number>} settings of sampling, those that were changed
 * @property {Record<string, string>} selected which branches are shown, see tree.js
 * @property {string | null} forgotten the question from which on the model reads the chat; null: all
 * @property {number | null} deleted when it was deleted, while that can be undone
 */

const NAME = "petals-chat";
const VERSION = 1;
const OPEN_LIMIT_MS = 5_000; // opening takes milliseconds, or for ever where another window holds an older version

/** Open the store; where the browser keeps nothing (private windows of some), one that lasts as long as the page. */
export async function openStore() {
  try {
    const opening = indexedDB.open(NAME, VERSION);
    opening.onupgradeneeded = () => {
      opening.result.createObjectStore("chats", { keyPath: "id" });
      opening.result.createObjectStore("messages", { keyPath: "id" }).createIndex("chat", "chat");
    };
    const db = await Promise.race([result(opening), expiry(OPEN_LIMIT_MS)]);
    db.onversionchange = () => db.close(); // another page brings a newer version of the store
    navigator.storage?.persist?.(); // else a browser that is short of space may drop it; it may say no
    return new Store(new Database(db));
  } catch (error) {
    console.warn("This browser keeps no chats.", error);
    return new Store(new Memory());
  }
}

function expiry(ms) {
  return new Promise((_, reject) => setTimeout(() => reject(new Error(`not opened within ${ms} ms`)), ms));
}

/** @param {IDBRequest} request */
function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** What Store uses of a database. */
class Database {
  #db;

  constructor(db) {
    this.#db = db;
  }

  get(store, id) {
    return result(this.#read(store).get(id));
  }

  getAll(store) {
    return result(this.#read(store).getAll());
  }

  messages(chatId) {
    return result(this.#read("messages").index("chat").getAll(chatId));
  }

  /** Put and delete: all of it, or nothing. [store, item] and [store, id] each. */
  write({ put = [], remove = [] }) {
    const transaction = this.#db.transaction(["chats", "messages"], "readwrite");
    for (const [store, item] of put) transaction.objectStore(store).put(item);
    for (const [store, id] of remove) transaction.objectStore(store).delete(id);
    return new Promise((resolve, reject) => {
      transaction.oncomplete = () => resolve();
      transaction.onabort = () => reject(transaction.error);
    });
  }

  #read(store) {
    return this.#db.transaction(store).objectStore(store);
  }
}

class Store {
  #db;
  #others = typeof BroadcastChannel === "undefined" ? null : new BroadcastChannel(NAME);

  constructor(db) {
    this.#db = db;
  }

  /** Whether chats outlive the page. */
  get lasting() {
    return !(this.#db instanceof Memory);
  }

  /** Call when another page has changed a chat. */
  onChange(changed) {
    if (this.#others) this.#others.onmessage = changed;
  }

  /** All chats that are not deleted, the one that was changed last first. */
  async chats() {
    const chats = await this.#db.getAll("chats");
    return chats.filter((chat) => !chat.deleted).sort((a, b) => b.updated - a.updated);
  }

  /** @returns {Promise<Chat | undefined>} */
  chat(id) {
    return this.#db.get("chats", id);
  }

  /** @returns {Promise<import("./tree.js").Message[]>} */
  messages(chatId) {
    return this.#db.messages(chatId);
  }

  async putChat(chat) {
    await this.putAll(chat, []);
  }

  /** Keep a message. A question that was asked and an answer that is growing are kept without telling other pages. */
  async putMessage(message) {
    await this.#db.write({ put: [["messages", message]] });
  }

  /** Keep a chat with its messages: all of it, or nothing. */
  async putAll(chat, messages) {
    await this.#db.write({ put: [["chats", chat], ...messages.map((message) => ["messages", message])] });
    this.#others?.postMessage("changed");
  }

  /** Delete for good. */
  async delete(chatId) {
    const messages = await this.#db.messages(chatId);
    await this.#db.write({ remove: [["chats", chatId], ...messages.map(({ id }) => ["messages", id])] });
    this.#others?.postMessage("changed");
  }

  /** Delete for good what was deleted before `time` and not brought back. */
  async purge(time) {
    for (const chat of await this.#db.getAll("chats")) {
      if (chat.deleted && chat.deleted < time) await this.delete(chat.id);
    }
  }

  /** The ids of the chats in whose messages or titles a text stands, in whatever case. */
  async search(text) {
    const wanted = text.toLocaleLowerCase();
    const holds = (other) => other.toLocaleLowerCase().includes(wanted);
    const [chats, messages] = await Promise.all([this.#db.getAll("chats"), this.#db.getAll("messages")]);
    return new Set([
      ...chats.filter(({ title }) => holds(title)).map(({ id }) => id),
      ...messages.filter((message) => holds(message.text)).map(({ chat }) => chat),
    ]);
  }
}

/** The same in memory. */
class Memory {
  #stores = { chats: new Map(), messages: new Map() };

  async get(store, id) {
    return structuredClone(this.#stores[store].get(id));
  }

  async getAll(store) {
    return structuredClone([...this.#stores[store].values()]);
  }

  async messages(chatId) {
    return (await this.getAll("messages")).filter(({ chat }) => chat === chatId);
  }

  async write({ put = [], remove = [] }) {
    for (const [store, item] of put) this.#stores[store].set(item.id, structuredClone(item));
    for (const [store, id] of remove) this.#stores[store].delete(id);
  }
}
