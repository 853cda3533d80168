/** A chat with its messages: the one that is open, or one in which an answer is being written. */

import { newId } from "./id.js";
import { MessageTree } from "./tree.js";

let lastCreated = 0;

export class Conversation {
  /** @param {import("./tree.js").Message[]} messages */
  constructor(chat, messages = []) {
    this.chat = chat;
    this.tree = new MessageTree(messages, chat.selected);
  }

  get path() {
    return this.tree.path();
  }

  get last() {
    return this.path.at(-1);
  }

  /** Tokens of the context that it has used, up to a message. */
  position(id = null) {
    const path = id ? this.tree.pathTo(id) : this.path;
    return path.findLast(({ stats }) => stats?.position)?.stats.position ?? 0;
  }

  add(fields) {
    lastCreated = Math.max(Date.now(), lastCreated + 1); // no two at the same time: it is their order
    const message = { id: newId(), chat: this.chat.id, created: lastCreated, ...fields };
    if (message.role === "assistant") message.model ??= this.chat.model;
    this.tree.add(message);
    return message;
  }
}
