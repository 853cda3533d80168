/** Chats as files: JSON, which keeps everything, and Markdown, which people read. Knows nothing of the page. */

import { newId } from "./id.js";
import { MessageTree } from "./tree.js";

const FORMAT = "petals-chat";
const VERSION = 1;
const MAX_MESSAGES = 100_000; // of an imported file: far more than a person writes, few enough to be kept
const MAX_TITLE = 200; // characters
// Stands before each message of a Markdown file, invisible where it is shown: headings may be part of messages.
const MARK = /^<!-- petals-chat: (user|assistant) -->$/;
const ESCAPED = /^<!-- (\\*)petals-chat: /gm; // a line of a message that would be taken for a mark has one "\" more
const UNESCAPED = /^<!-- \\(\\*)petals-chat: /gm;

/** A file could not be read as chats; the message says why, for people. */
export class ImportError extends Error {
  name = "ImportError";
}

/**
 * @param {{chat: import("./chat-store.js").Chat, messages: import("./tree.js").Message[]}[]} chats
 * @returns {string}
 */
export function toJson(chats) {
  const bare = chats.map(({ chat, messages }) => {
    const { id: _, deleted: __, ...rest } = chat;
    return { ...rest, messages: messages.map(({ chat: ___, point: ____, ...message }) => message) };
  });
  return JSON.stringify({ format: FORMAT, version: VERSION, exported: new Date().toISOString(), chats: bare }, null, 2);
}

/** The path that is shown, as Markdown. */
export function toMarkdown({ chat, messages }) {
  const parts = [`# ${chat.title.replaceAll("\n", " ")}`];
  if (chat.system) parts.push(`> ${chat.system.replaceAll("\n", "\n> ")}`);
  for (const { role, model, text } of new MessageTree(messages, chat.selected).path()) {
    const heading = role === "user" ? "You" : (model ?? "Model").replaceAll("\n", " ");
    parts.push(`## ${heading}\n<!-- petals-chat: ${role} -->`, text.replace(ESCAPED, "<!-- \\$1petals-chat: ").trim());
  }
  return parts.join("\n\n") + "\n";
}

/**
 * Read a file that was exported here.
 *
 * @param {string} text
 * @param {Record<string, [number, number]>} bounds of the settings that there are
 * @returns {{chat: object, messages: object[]}[]} with new ids, so that nothing that is kept is overwritten
 * @throws {ImportError}
 */
export function parse(text, bounds) {
  const content = text.replace(/^\uFEFF/, "");
  const found = /^\s*[{[]/.test(content) ? fromJson(content, bounds) : [fromMarkdown(content)];
  if (!found.length) throw new ImportError("There is no chat in this file.");
  return found.map(withNewIds);
}

function fromJson(text, bounds) {
  let file;
  try {
    file = JSON.parse(text);
  } catch (error) {
    throw new ImportError(`This file is not valid JSON: ${error.message}`);
  }
  if (file?.format !== FORMAT || !Array.isArray(file.chats)) {
    throw new ImportError("This file was not exported by Petals Chat.");
  }
  if (file.version !== VERSION) throw new ImportError(`This file is of version ${file.version}; this page reads ${VERSION}.`);
  return file.chats.map((chat, index) => readChat(chat, index, bounds));
}

function readChat(value, index, bounds) {
  const where = `chat ${index + 1}`;
  const chat = expectObject(value, where);
  const messages = expect(chat.messages, Array.isArray, `${where}: messages must be a list`);
  if (messages.length > MAX_MESSAGES) throw new ImportError(`${where}: more than ${MAX_MESSAGES} messages`);
  const now = Date.now();
  return {
    chat: {
      title: text(chat.title, `${where}: title`).slice(0, MAX_TITLE),
      created: time(chat.created, now),
      updated: time(chat.updated, now),
      model: text(chat.model ?? "", `${where}: model`),
      system: chat.system == null ? null : text(chat.system, `${where}: system`),
      settings: within(bounds, numbers(chat.settings ?? {}, `${where}: settings`)),
      selected: texts(chat.selected ?? {}, `${where}: selected`),
      forgotten: chat.forgotten == null ? null : text(chat.forgotten, `${where}: forgotten`),
    },
    messages: messages.map((message, i) => readMessage(message, `${where}, message ${i + 1}`)),
  };
}

function readMessage(value, where) {
  const message = expectObject(value, where);
  const isRole = (role) => role === "user" || role === "assistant";
  const states = ["done", "stopped", "failed", "refused", "interrupted"];
  const read = {
    id: text(message.id, `${where}: id`),
    parent: message.parent == null ? null : text(message.parent, `${where}: parent`),
    role: expect(message.role, isRole, `${where}: role must be "user" or "assistant"`),
    text: text(message.text, `${where}: text`),
    created: time(message.created, Date.now()),
    // What was running when it was exported has been cut off.
    state: states.includes(message.state) ? message.state : message.state === "running" ? "interrupted" : "done",
  };
  if (read.role === "assistant") {
    read.model = text(message.model ?? "", `${where}: model`);
    read.stopSequence = message.stopSequence == null ? null : text(message.stopSequence, `${where}: stopSequence`);
    const { tokens, perSecond, firstToken, position } = numbers(message.stats ?? {}, `${where}: stats`);
    read.stats = { tokens, perSecond, firstToken, position };
  }
  return read;
}

function fromMarkdown(content) {
  const lines = content.split(/\r?\n/);
  const messages = [];
  const now = Date.now();
  const system = [];
  let title = "";
  let current = null;
  for (const [i, line] of lines.entries()) {
    const role = MARK.exec(line)?.[1];
    if (role) {
      const by = (lines[i - 1] ?? "").replace(/^## /, "");
      const model = role === "assistant" ? { model: by, stopSequence: null, stats: {} } : {};
      if (current) current.lines.pop(); // the heading of this message
      current = { role, lines: [], ...model };
      messages.push(current);
    } else if (current) {
      current.lines.push(line);
    } else if (!title && line.startsWith("# ")) {
      title = line.slice(2).trim();
    } else if (line.startsWith(">")) {
      system.push(line.replace(/^> ?/, ""));
    }
  }
  if (!messages.length) {
    throw new ImportError("This file was not exported by Petals Chat: it has no line that tells whose a message is.");
  }
  messages.forEach((message, i) => {
    if (message.role !== (i % 2 ? "assistant" : "user")) {
      throw new ImportError(`Message ${i + 1} must be by ${i % 2 ? "the model" : "you"}: questions and answers take turns.`);
    }
  });
  return {
    chat: {
      title: title.slice(0, MAX_TITLE),
      created: now,
      updated: now,
      model: "",
      system: system.join("\n") || null,
      settings: {},
      selected: {},
      forgotten: null,
    },
    messages: messages.map(({ lines: own, ...message }, i) => ({
      id: String(i),
      parent: i ? String(i - 1) : null,
      text: own.join("\n").trim().replace(UNESCAPED, "<!-- $1petals-chat: "),
      created: now + i,
      state: "done",
      ...message,
    })),
  };
}

function withNewIds({ chat, messages }) {
  const chatId = newId();
  const ids = new Map(messages.map(({ id }) => [id, newId()]));
  if (ids.size < messages.length) throw new ImportError(`In the chat "${chat.title}" two messages have the same id.`);
  const renamed = messages.map((message) => ({
    ...message,
    id: ids.get(message.id),
    parent: message.parent === null ? null : ids.get(message.parent),
    chat: chatId,
  }));
  const roles = new Map(renamed.map(({ id, role }) => [id, role]));
  for (const { parent, role } of renamed) {
    if (parent === undefined) throw new ImportError(`In the chat "${chat.title}" a message follows one that is not there.`);
    if ((parent === null ? "assistant" : roles.get(parent)) === role) {
      throw new ImportError(`In the chat "${chat.title}" questions and answers do not take turns.`);
    }
  }
  const selected = Object.entries(chat.selected)
    .map(([parent, child]) => [parent === "" ? "" : ids.get(parent), ids.get(child)])
    .filter(([parent, child]) => parent !== undefined && child !== undefined);
  return {
    chat: {
      ...chat,
      id: chatId,
      title: chat.title || "Imported chat",
      selected: Object.fromEntries(selected),
      forgotten: ids.get(chat.forgotten) ?? null,
      deleted: null,
    },
    messages: renamed,
  };
}

function expect(value, test, complaint) {
  if (!test(value)) throw new ImportError(`This file cannot be read: ${complaint}.`);
  return value;
}

function expectObject(value, where) {
  return expect(value, (it) => it !== null && typeof it === "object" && !Array.isArray(it), `${where} must be an object`);
}

function text(value, where) {
  return expect(value, (it) => typeof it === "string", `${where} must be a text`);
}

function time(value, otherwise) {
  return Number.isFinite(value) && value > 0 ? value : otherwise;
}

function numbers(value, where) {
  const entries = Object.entries(expectObject(value, where)).filter(([, number]) => Number.isFinite(number));
  return Object.fromEntries(entries);
}

/** Those that there are, within their bounds: nothing else goes to the server. */
function within(bounds, found) {
  const known = Object.entries(bounds).filter(([name, [least, most]]) => found[name] >= least && found[name] <= most);
  return Object.fromEntries(known.map(([name]) => [name, found[name]]));
}

function texts(value, where) {
  const entries = Object.entries(expectObject(value, where)).filter(([, item]) => typeof item === "string");
  return Object.fromEntries(entries);
}

/** Let the browser save a file. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
  URL.revokeObjectURL(url);
}
