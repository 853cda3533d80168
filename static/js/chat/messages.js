/** The messages on the page, and what can be done with each of them. */

import { copyButton } from "../shared/copy.js";
import { $, element, icon, iconButton, isComposing, setText, textButton } from "../shared/dom.js";
import { MarkdownView } from "../markdown/view.js";
import { blocks, describe, range, serverName } from "../shared/words.js";

const AT_END_PX = 48; // this close to the end of the messages counts as reading along
const META_MS = 200; // between two looks at the figures below a running answer: faster they cannot be read
const LABELLED = 6; // servers of a route that have their names written in it

/**
 * @typedef {object} MessageActions
 * @property {(id: string) => void} regenerate
 * @property {(id: string) => void} proceed let the model write on
 * @property {(id: string, text: string) => Promise<boolean>} edit tells whether the text was taken
 * @property {(id: string) => void} select show the branch of this message
 */

export class MessageList {
  #list = $("messages");
  #actions;
  #views = new Map();
  #following = true;
  #top = 0; // where it was scrolled to last

  /** @param {MessageActions} actions */
  constructor(actions) {
    this.#actions = actions;
    this.#list.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    // Scrolling up says it before there is a distance to the end that would.
    this.#list.addEventListener("wheel", ({ deltaY }) => deltaY < 0 && this.#canScroll && this.#setFollowing(false), { passive: true });
    $("latest").addEventListener("click", () => this.follow());
    new ResizeObserver(() => this.#grown()).observe(this.#list);
  }

  /**
   * Show these messages and no others. Those that are shown already stay as they are.
   *
   * @param {import("./tree.js").MessageTree} tree
   * @param {string | null} forgotten the question from which on the model reads
   */
  show(tree, forgotten) {
    const path = tree.path();
    const ids = new Set(path.map(({ id }) => id));
    for (const [id, view] of this.#views) {
      if (ids.has(id)) continue;
      view.close();
      this.#views.delete(id);
    }
    $("empty").hidden = path.length > 0;
    let before = $("empty");
    for (const message of path) {
      const view = this.#views.get(message.id) ?? this.#add(message);
      view.update(message, tree.siblings(message.id), message.id === forgotten);
      if (before.nextElementSibling !== view.article) before.after(view.article);
      before = view.article;
    }
    const last = path.at(-1);
    for (const [id, view] of this.#views) view.article.classList.toggle("last", id === last?.id);
    this.#setFollowing(this.#following);
    this.#grown();
  }

  /** @returns {AnswerView | QuestionView | undefined} */
  get(id) {
    return this.#views.get(id);
  }

  /** Scroll to the end, and stay there while text arrives, until the reader scrolls up. */
  follow() {
    this.#setFollowing(true);
    this.#grown();
  }

  #add(message) {
    const View = message.role === "user" ? QuestionView : AnswerView;
    const view = new View(message, this.#actions, () => this.#grown());
    this.#views.set(message.id, view);
    return view;
  }

  /** Who scrolls up reads there; who comes back to the end follows again. A window of another size is neither. */
  #scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.#list;
    if (scrollHeight - scrollTop - clientHeight < AT_END_PX) this.#setFollowing(true);
    else if (scrollTop < this.#top) this.#setFollowing(false);
    this.#top = scrollTop;
  }

  get #isEmpty() {
    return !$("empty").hidden;
  }

  get #canScroll() {
    return this.#list.scrollHeight > this.#list.clientHeight;
  }

  #setFollowing(following) {
    this.#following = following;
    $("latest").hidden = following || this.#isEmpty;
  }

  #grown() {
    if (this.#following) this.#list.scrollTop = this.#isEmpty ? 0 : this.#list.scrollHeight;
  }
}

/** What questions and answers have in common: branches, copying, editing. */
class MessageView {
  #branches = element("span", { className: "branches", role: "group", ariaLabel: "Versions", hidden: true });
  #siblings = [];

  constructor(message, label, actions, grown) {
    this.message = message;
    this.actions = actions;
    this.grown = grown;
    this.text = element("div", { className: "text" });
    this.tools = element("div", { className: "tools", role: "group", ariaLabel: "What to do with this message" });
    this.boundary = element("p", { className: "boundary", hidden: true, textContent: "The model reads from here on." });
    this.article = element("article", { className: "message", ariaLabel: label, data: { role: message.role, id: message.id } });
    this.tools.append(this.#branches, copyButton(() => this.message.text, { label: "Copy", className: "plain small" }));
    const heading = element("h2", { className: "visually-hidden", textContent: label });
    this.article.append(this.boundary, heading, this.text, this.tools);
  }

  update(message, siblings, isBoundary) {
    this.message = message;
    this.boundary.hidden = !isBoundary;
    if (String(siblings) === String(this.#siblings)) return;
    this.#siblings = siblings;
    const here = siblings.indexOf(message.id);
    const step = (name, label, to) => {
      const button = iconButton(name, label, () => this.actions.select(siblings[to]));
      button.disabled = !siblings[to];
      return button;
    };
    const place = element("span", { textContent: `${here + 1}/${siblings.length}` });
    this.#branches.replaceChildren(
      step("previous", "Previous version", here - 1),
      place,
      step("next", "Next version", here + 1),
    );
    this.#branches.hidden = siblings.length < 2;
  }

  /** Let the text be written anew; it becomes a branch of its own. */
  edit() {
    if (this.article.querySelector(".editor")) return;
    const field = element("textarea", { value: this.message.text, ariaLabel: "Edit the message", dir: "auto" });
    const save = element("button", { type: "submit", textContent: this.message.role === "user" ? "Send" : "Save" });
    const editor = element("form", { className: "editor" }, field, textButton("Cancel", () => end()), save);
    const fit = () => {
      field.style.height = "auto";
      field.style.height = `${field.scrollHeight + 2}px`;
    };
    const end = () => {
      editor.remove();
      this.text.hidden = this.tools.hidden = false;
      $("prompt").focus();
    };
    field.addEventListener("input", fit);
    field.addEventListener("keydown", (event) => {
      if (isComposing(event)) return;
      if (event.key === "Escape") {
        event.preventDefault(); // it does not stop an answer as well
        end();
      } else if (event.key === "Enter" && !event.shiftKey && this.message.role === "user") {
        event.preventDefault();
        editor.requestSubmit();
      }
    });
    editor.addEventListener("submit", async (event) => {
      event.preventDefault();
      const text = field.value.trim();
      if (!text || text === this.message.text || (await this.actions.edit(this.message.id, text))) end();
    });
    this.text.hidden = this.tools.hidden = true;
    this.text.after(editor);
    fit();
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  /** Who steps through the versions by keyboard goes on from here. */
  focusVersions() {
    this.#branches.querySelector("button:enabled")?.focus();
  }

  close() {
    this.article.remove();
  }
}

class QuestionView extends MessageView {
  constructor(message, actions, grown) {
    super(message, "You wrote", actions, grown);
    this.text.dir = "auto";
    this.text.textContent = message.text;
    this.tools.append(iconButton("edit", "Edit", () => this.edit()));
  }
}

/** An answer on the page, from waiting for its first text to its end. */
class AnswerView extends MessageView {
  #markdown;
  #meta = element("p", { className: "meta" });
  #route = element("div", { className: "route" });
  #events = element("ul", { className: "events" });
  #note = element("p", { className: "note" });
  #regenerate;
  #proceed;
  #notice = null;
  #actionsOfNotice = []; // of its buttons
  #metaTimer = 0;

  constructor(message, actions, grown) {
    super(message, `${message.model || "The model"} answered`, actions, grown);
    this.#markdown = new MarkdownView(this.text, { changed: grown });
    this.#regenerate = iconButton("again", "Regenerate", () => actions.regenerate(this.message.id));
    this.#proceed = textButton("Continue", () => actions.proceed(this.message.id), "plain small");
    this.tools.append(iconButton("edit", "Edit", () => this.edit()), this.#regenerate, this.#proceed);
    const figures = element("div", { className: "figures" }, this.#meta, this.#route);
    this.tools.before(this.#note, figures, this.#events);
  }

  update(message, siblings, isBoundary) {
    super.update(message, siblings, isBoundary);
    const running = message.state === "running";
    this.article.ariaBusy = String(running);
    this.article.dataset.state = message.state;
    this.tools.inert = running;
    const cutOff = ["stopped", "failed", "interrupted"].includes(message.state) || message.stats?.reason === "length";
    this.#proceed.hidden = !(cutOff && message.text);
    if (!running) this.#markdown.end();
    if (message.text !== this.#markdown.text) this.#markdown.set(message.text);
    this.showStats();
  }

  append(text) {
    this.#markdown.append(text);
    this.#metaTimer ||= setTimeout(() => this.showStats(), META_MS);
  }

  /** What the answer waits for, in words; empty when its text comes. */
  note(words) {
    setText(this.#note, words);
  }

  showStats() {
    clearTimeout(this.#metaTimer);
    this.#metaTimer = 0;
    const { stats = {}, state } = this.message;
    setText(this.#meta, describe({ ...stats, stopped: state === "stopped" }));
    this.#showRoute(stats.route ?? []);
    this.#showEvents(stats.events ?? []);
  }

  /**
   * Say something below the answer, with buttons to do something about it: [label, action or address] each. What is said
   * already is not said again; its buttons then do the new actions.
   */
  notice(words, ...buttons) {
    this.#actionsOfNotice = buttons.map(([, action]) => action);
    const key = JSON.stringify([words, buttons.map(([label]) => label)]);
    if (this.#notice?.dataset.key === key) return;
    this.clearNotice();
    this.#notice = element("div", { className: "notice", role: "alert", data: { key } }, element("p", { textContent: words }));
    buttons.forEach(([label, action], i) => {
      const isLink = typeof action === "string";
      const button = isLink
        ? element("a", { href: action, textContent: label })
        : textButton(label, () => this.#actionsOfNotice[i]());
      this.#notice.append(button);
    });
    this.tools.before(this.#notice);
    this.grown();
  }

  clearNotice() {
    this.#notice?.remove();
    this.#notice = null;
  }

  close() {
    this.#markdown.close();
    clearTimeout(this.#metaTimer);
    super.close();
  }

  /** The blocks in order, each server's as long as its share. */
  #showRoute(route) {
    const key = JSON.stringify(route);
    if (this.#route.dataset.key === key) return;
    this.#route.dataset.key = key;
    const words = route.map((server) => `${blocks(server)} on ${serverName(server)}`);
    this.#route.role = route.length ? "img" : null;
    this.#route.ariaLabel = route.length ? `The way through the swarm: ${words.join(", ")}` : null;
    this.#route.title = words.join("\n");
    this.#route.replaceChildren(
      ...route.map((server) => {
        const part = element("span", { className: "span" });
        part.style.flexGrow = server.end - server.start;
        if (route.length <= LABELLED) part.textContent = `${range(server)} ${serverName(server)}`;
        return part;
      }),
    );
  }

  #showEvents(events) {
    events.forEach((event, i) => {
      const item = this.#events.children[i] ?? this.#events.appendChild(element("li", {}, icon("healing"), element("span")));
      item.classList.toggle("healed", event.healed);
      setText(item.lastElementChild, event.words);
    });
  }
}
