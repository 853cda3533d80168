/** The list of chats, and what can be done with them. */

import { $, element, iconButton, isComposing, isFreeEscape, setText, textButton } from "../shared/dom.js";
import { ago } from "../shared/words.js";

const SEARCH_MS = 150; // after the last key: all messages are looked through
const UNDO_MS = 10_000; // to bring a deleted chat back

/**
 * @typedef {object} SidebarActions
 * @property {() => void} newChat
 * @property {(id: string) => void} open
 * @property {(id: string, title: string) => void} rename
 * @property {(id: string) => void} remove
 * @property {(id: string | null, format: "json" | "md") => void} exportChat null: all
 * @property {(file: File) => void} importFile
 * @property {(text: string) => Promise<Set<string>>} search the ids of the chats that hold it
 */

export class Sidebar {
  #actions;
  #items = new Map();
  #chats = [];
  #shown = null; // the ids that were found; null: all
  #current = null;
  #answering = new Set();
  #searchTimer = 0;
  #drawLater = false;
  #narrow = matchMedia("(max-width: 52rem)");

  /** @param {SidebarActions} actions */
  constructor(actions) {
    this.#actions = actions;
    $("new-chat").addEventListener("click", () => (this.close(), actions.newChat()));
    $("export-all").addEventListener("click", () => actions.exportChat(null, "json"));
    $("import").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => {
      for (const file of $("file").files) actions.importFile(file);
      $("file").value = "";
    });
    $("search").addEventListener("input", () => {
      clearTimeout(this.#searchTimer);
      this.#searchTimer = setTimeout(() => this.#search(), SEARCH_MS);
    });
    $("toggle-sidebar").addEventListener("click", () => this.#toggle());
    $("close-sidebar").addEventListener("click", () => this.close());
    $("backdrop").addEventListener("click", () => this.close());
    document.addEventListener("keydown", (event) => isFreeEscape(event) && this.close() && event.preventDefault());
    this.#narrow.addEventListener("change", () => this.#setOpen(false));
    this.#setOpen(false);
  }

  /** Show these chats, newest first. */
  show(chats, current, answering) {
    this.#chats = chats;
    this.#current = current;
    this.#answering = answering;
    if ($("search").value.trim()) this.#search(); // new chats may hold it as well
    else this.#draw();
  }

  /** On narrow screens, where the list lies over the chat: put it away. Returns whether it lay there. */
  close() {
    const open = this.#narrow.matches && $("sidebar").classList.contains("open");
    if (open) {
      this.#setOpen(false);
      $("toggle-sidebar").focus();
    }
    return open;
  }

  async #search() {
    const text = $("search").value.trim();
    const shown = text ? await this.#actions.search(text) : null;
    if ($("search").value.trim() !== text) return;
    this.#shown = shown;
    this.#draw();
  }

  #draw() {
    // What is being typed or chosen there is not taken away; it is drawn when that is over.
    this.#drawLater = $("chats").querySelector("input, :popover-open") !== null;
    if (this.#drawLater) return;
    const chats = this.#chats.filter(({ id }) => !this.#shown || this.#shown.has(id));
    const rows = [];
    let group = "";
    for (const chat of chats) {
      const when = ago(chat.updated);
      if (when !== group) rows.push(element("li", { className: "when", textContent: (group = when) }));
      rows.push(this.#item(chat));
    }
    const wanted = new Set(chats.map(({ id }) => id));
    for (const id of this.#items.keys()) if (!wanted.has(id)) this.#items.delete(id);
    const focused = document.activeElement;
    $("chats").replaceChildren(...rows);
    if (focused?.isConnected && focused !== document.activeElement) focused.focus();
    setText($("no-chats"), this.#shown ? "No chat holds this." : "Your chats are kept in this browser.");
    $("no-chats").hidden = chats.length > 0;
    $("export-all").disabled = !this.#chats.length;
  }

  #item(chat) {
    const item = this.#items.get(chat.id) ?? this.#newItem(chat.id);
    const open = item.querySelector(".open");
    if (open) setText(open.lastElementChild, chat.title);
    if (open) open.ariaCurrent = chat.id === this.#current ? "page" : null;
    item.classList.toggle("answering", this.#answering.has(chat.id));
    item.querySelector(".more")?.setAttribute("aria-label", `What to do with “${chat.title}”`);
    return item;
  }

  #newItem(id) {
    const open = element("button", { type: "button", className: "open plain" }, element("span", { dir: "auto" }));
    open.addEventListener("click", () => (this.close(), this.#actions.open(id)));
    const menu = element("div", { className: "menu", popover: "auto" });
    const more = iconButton("more", "What to do with this chat", () => {});
    more.classList.add("more");
    more.popoverTargetElement = menu;
    const entry = (label, action) => textButton(label, () => (menu.hidePopover(), action()), "plain");
    menu.append(
      entry("Rename", () => this.#rename(id, item)),
      entry("Export as Markdown", () => this.#actions.exportChat(id, "md")),
      entry("Export as JSON", () => this.#actions.exportChat(id, "json")),
      entry("Delete", () => this.#actions.remove(id)),
    );
    menu.addEventListener("toggle", ({ newState }) => {
      if (newState !== "open") {
        if (this.#drawLater) this.#draw();
        return;
      }
      const { bottom, right } = more.getBoundingClientRect();
      menu.style.top = `${Math.min(bottom, innerHeight - menu.offsetHeight - 8)}px`;
      menu.style.left = `${Math.max(8, right - menu.offsetWidth)}px`;
      menu.firstElementChild.focus();
    });
    const item = element("li", { className: "chat", data: { id } }, open, more, menu);
    this.#items.set(id, item);
    return item;
  }

  #rename(id, item) {
    const chat = this.#chats.find((each) => each.id === id);
    const field = element("input", { type: "text", value: chat.title, maxLength: 200, ariaLabel: "Name of the chat", dir: "auto" });
    const open = item.querySelector(".open");
    let ended = false;
    const end = (keep, { focus = true } = {}) => {
      if (ended) return;
      ended = true;
      field.replaceWith(open);
      if (focus) open.focus();
      if (this.#drawLater) this.#draw();
      const title = field.value.trim();
      if (keep && title && title !== chat.title) this.#actions.rename(id, title);
    };
    field.addEventListener("keydown", (event) => {
      if (isComposing(event)) return;
      if (event.key === "Enter") {
        event.preventDefault(); // else it would press the button that has the focus then
        end(true);
      }
      if (event.key === "Escape") {
        event.preventDefault(); // it does not stop an answer as well
        end(false);
      }
    });
    field.addEventListener("blur", () => end(true, { focus: false }));
    open.replaceWith(field);
    field.select();
    field.focus();
  }

  #toggle() {
    if (this.#narrow.matches) {
      this.#setOpen(!$("sidebar").classList.contains("open"));
    } else {
      document.body.classList.toggle("without-sidebar");
      this.#tell();
    }
  }

  /** On narrow screens the list is over the chat, which then cannot be reached. */
  #setOpen(open) {
    $("sidebar").classList.toggle("open", open);
    $("backdrop").hidden = !open;
    $("chat").inert = open;
    this.#tell();
    if (open) $("close-sidebar").focus();
  }

  #tell() {
    const open = this.#narrow.matches
      ? $("sidebar").classList.contains("open")
      : !document.body.classList.contains("without-sidebar");
    $("toggle-sidebar").ariaExpanded = String(open);
    $("sidebar").inert = !open;
  }
}

/** A line that goes by itself, with something that can be undone or nothing. */
export class Toast {
  #timer = 0;
  #gone = () => {};

  constructor() {
    // Who reads slowly or is on the way to the button keeps it.
    for (const kind of ["pointerenter", "focusin"]) $("toast").addEventListener(kind, () => clearTimeout(this.#timer));
    for (const kind of ["pointerleave", "focusout"]) $("toast").addEventListener(kind, () => this.#wait());
  }

  /**
   * @param {string} words
   * @param {{undo?: () => void, gone?: () => void}} [options] `gone` is called when it can no more be undone
   */
  show(words, { undo, gone = () => {} } = {}) {
    this.#end();
    this.#gone = gone;
    const parts = [element("p", { textContent: words })];
    if (undo) {
      parts.push(
        textButton("Undo", () => {
          this.#gone = () => {};
          this.#end();
          undo();
        }),
      );
    }
    $("toast").replaceChildren(...parts);
    if (undo) parts[1].focus(); // what had the focus is gone
    this.#wait();
  }

  #wait() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#end(), UNDO_MS);
  }

  #end() {
    clearTimeout(this.#timer);
    const gone = this.#gone;
    this.#gone = () => {};
    $("toast").replaceChildren();
    gone();
  }
}
