/** A model's answer, shown as Markdown while it streams. */

import { mathOptions } from "./math.js";
import { patch, plain } from "./patch.js";
import { Source, hasShape } from "./source.js";

const HIDDEN_MS = 250; // between renderings while the page is hidden and gets no frames

let marked = null; // until it is loaded, text is shown as it stands

/** Resolves once Markdown is shown as such, or it has turned out that it cannot be. */
export const ready = import("../../../vendor/marked/marked.esm.js").then(
  ({ Lexer, Marked }) => {
    const { defaults } = new Marked(mathOptions);
    marked = { Lexer, defaults };
  },
  (error) => console.warn("answers are shown as plain text", error),
);

/** Fills an element with a text, which may grow. What is finished stays as it is, nodes included. */
export class MarkdownView {
  #element;
  #changed;
  #text = "";
  #source = ""; // the text that is rendered, with \n only
  #pieces = []; // what the element contains
  #tail = null; // where in all this that begins which can still change
  #links = {}; // reference definitions before the tail
  #guessed = false; // whether something is shown as if it were closed
  #complete = true;
  #frame = 0;
  #timer = 0;
  #closed = false;

  /**
   * @param {HTMLElement} element
   * @param {{changed?: () => void}} options changed: called whenever the element's content has changed
   */
  constructor(element, { changed = () => {} } = {}) {
    this.#element = element;
    element.classList.add("markdown");
    this.#changed = () => this.#closed || changed();
    if (!marked) ready.then(() => this.#closed || (this.#text && this.#render(this.#complete)));
  }

  get text() {
    return this.#text;
  }

  /** Show this text instead, at once. */
  set(text) {
    this.#text = text;
    this.#render(true);
  }

  /** Add to the text; it is shown with the next frame. */
  append(text) {
    this.#text += text;
    if (this.#timer || this.#closed) return;
    const render = () => this.#render(false);
    this.#frame = requestAnimationFrame(render);
    this.#timer = setTimeout(render, HIDDEN_MS);
  }

  /** The text is complete: what was left open is decided. */
  end() {
    if (!this.#complete || this.#timer) this.#render(true);
  }

  /** Show nothing any more. */
  close() {
    this.#closed = true;
    this.#cancel();
  }

  #cancel() {
    cancelAnimationFrame(this.#frame);
    clearTimeout(this.#timer);
    this.#timer = 0;
  }

  #render(complete) {
    if (this.#closed) return;
    this.#cancel();
    // The other half of a line's end may be on its way.
    const text = complete ? this.#text : this.#text.replace(/\r$/, "");
    this.#source = text.includes("\r") ? text.replace(/\r\n?/g, "\n") : text;
    if (complete || this.#complete) this.#start();
    this.#complete = complete;
    try {
      if (complete || !marked) this.#renderAll();
      else this.#renderTail();
    } catch (error) {
      // marked gives up on what is nested without end.
      console.warn("this text is shown as it stands", error);
      this.#start();
      patch(this.#element, this.#pieces, [plain(this.#source)]);
    }
    this.#changed();
  }

  #start() {
    this.#tail = { at: 0, pieces: 0, lead: "", parts: 0, loose: false, lines: 0 };
    this.#links = {};
  }

  /** Everything anew, so that in the end the same is shown however the text came. Nodes that are right are kept. */
  #renderAll() {
    const shapes = marked ? new Source(marked, this.#source, { changed: this.#changed }).shapes() : [plain(this.#source)];
    patch(this.#element, this.#pieces, shapes, { always: true });
  }

  #renderTail() {
    const { at, pieces, lead } = this.#tail;
    const text = lead + this.#source.slice(at);
    const options = { links: this.#links, streaming: true, changed: this.#changed };
    const tail = new Source(marked, decided(text), options);
    patch(this.#element, this.#pieces, tail.shapes(this.#tail), { from: pieces, always: this.#guessed });
    this.#guessed = tail.guessed;
    const lines = text.lastIndexOf("\n") + 1;
    if (at + lines > this.#tail.lines) this.#settle(text.slice(0, lines));
    this.#tail.lines = at + lines;
  }

  /**
   * Move the tail to the last block, and within a list or a table to the last item or row: no more lines can change what
   * comes before. The line that is being written could; it is not among these.
   */
  #settle(lines) {
    const tail = this.#tail;
    const { tokens } = new Source(marked, lines, { links: this.#links, streaming: true });
    const isBlock = ({ type, source }) => type !== "space" && source !== null;
    const last = tokens.findLastIndex(isBlock); // without an unclosed formula: it may turn out to be text of this block
    if (last < 0) return;
    let length = 0; // of what is settled
    for (const token of tokens.slice(0, last)) {
      length += token.raw.length;
      if (token.type === "def") this.#links[token.tag] ??= token;
      if (hasShape(token)) tail.pieces += 1;
    }
    const block = tokens[last];
    const before = tail.lead.length;
    if (last > 0 && tokens.slice(0, last).some(hasShape)) Object.assign(tail, { lead: "", parts: 0, loose: false });
    if (block.type === "list") {
      const items = block.items.slice(0, -1);
      tail.parts += items.length;
      tail.loose ||= items.some(isLoose);
      for (const { raw } of items) length += raw.length;
    } else if (block.type === "table" && block.rows.length > 1) {
      const [head, rule, ...rows] = block.raw.split("\n");
      tail.lead = `${head}\n${rule}\n`;
      tail.parts += block.rows.length - 1;
      length += tail.lead.length;
      for (const row of rows.slice(0, block.rows.length - 1)) length += row.length + 1;
    }
    tail.at += length ? length - before : 0;
  }
}

/** Whether an item makes its list a loose one: as marked does, but for an item with others after it. */
function isLoose({ raw, tokens }) {
  return /\n[ \t]*\n[ \t]*$/.test(raw) || tokens.some(({ type, raw }) => type === "space" && /\n.*\n/.test(raw));
}

/**
 * The text without what at its end could still become anything: "-" a list, a rule or an underline, "|" a table, "**" the
 * beginning or the end of something. A moment later it is known, and nothing had to be shown as two things.
 */
function decided(text) {
  const lastLine = text.slice(text.lastIndexOf("\n") + 1);
  const isOpen = isRow(lastLine) || UNDECIDED.test(lastLine);
  const lines = isOpen ? text.slice(0, text.length - lastLine.length) : text;
  const [, before = "", last] = lines.trimEnd().match(/(?:^|\n)(?:([^\n]*)\n)?([^\n]*)$/);
  const isHead = isRow(last) && !isRow(before); // of a table, perhaps
  return (isHead ? lines.slice(0, lines.lastIndexOf(last)) : lines).replace(/[*_~`\\$]+$/, "");
}

const UNDECIDED = /^[\s>]*(?:[-*+]\s+\[[ xX]?\]?|[-=*+#_`~|:\s]*|\d{1,9}[.)]?)\s*$/;
const isRow = (line) => /^[\s>]*\|/.test(line);
