/**
 * A model's answer, shown as Markdown while it streams. marked finds out what the text says (its lexer only); the page
 * is built from that here, out of a fixed set of elements: no markup of the model's gets in but as text.
 */

import { copyButton } from "../shared/copy.js";
import { element } from "../shared/dom.js";
import { mathOptions, typeset } from "./math.js";

const HIDDEN_MS = 250; // between renderings while the page is hidden and gets no frames
const PROTOCOLS = new Set(["http:", "https:", "mailto:"]);

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
    const shapes = marked ? new Source(this.#source, { changed: this.#changed }).shapes() : [plain(this.#source)];
    patch(this.#element, this.#pieces, shapes, { always: true });
  }

  #renderTail() {
    const { at, pieces, lead } = this.#tail;
    const text = lead + this.#source.slice(at);
    const options = { links: this.#links, streaming: true, changed: this.#changed };
    const tail = new Source(decided(text), options);
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
    const { tokens } = new Source(lines, { links: this.#links, streaming: true });
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

const hasShape = ({ type }) => type !== "space" && type !== "def";

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

/**
 * What is written within a line, as it will look when what is open at its end is closed: code, strong text, a link. So
 * nothing jumps when that comes.
 */
function foreseen(text) {
  let code = "";
  let strong = false;
  for (const { 0: mark, index } of text.matchAll(/\\.|`+|\*\*/gs)) {
    const [before = " ", after = " "] = [text[index - 1], text[index + 2]];
    if (mark[0] === "`") code = code === mark ? "" : code || mark;
    else if (mark === "**" && !code && strong) strong = /\s/.test(before);
    else if (mark === "**" && !code) strong = /\S/.test(after) && !/[\p{L}\p{N}]/u.test(before);
  }
  const start = code ? text + code : text.replace(/!?\[([^[\]\n]*)(?:\](?:\([^()\s]*)?)?$/, "$1");
  return strong ? `${start.trimEnd()}**` : start;
}

/**
 * A piece is a node on the page and what it was made of. A shape is what a piece is to be:
 * {kind, raw, make(), tune?(piece), parts?(), from?}. Pieces of one kind can be made into one another by `tune` and by
 * changing their parts; if `raw` is the same, the piece is right already. `from`: how many settled parts come before.
 */
function patch(parent, pieces, shapes, { from = 0, always = false } = {}) {
  shapes.forEach((shape, i) => {
    let piece = pieces[from + i];
    if (piece?.kind !== shape.kind) {
      const fresh = { kind: shape.kind, raw: null, node: shape.make(), parts: [] };
      if (piece) piece.node.replaceWith(fresh.node);
      else parent.append(fresh.node);
      pieces[from + i] = piece = fresh;
    }
    if (piece.raw === shape.raw && !always) return;
    piece.raw = shape.raw;
    shape.tune?.(piece);
    if (shape.parts) patch(piece.node, piece.parts, shape.parts(), { from: shape.from, always });
  });
  for (const { node } of pieces.splice(from + shapes.length)) node.remove();
}

function box(tag, raw, parts, properties = {}) {
  const make = () => element(tag, properties);
  return { kind: tag + JSON.stringify(properties), raw, make, parts };
}

function text(raw) {
  return { kind: "text", raw, make: () => document.createTextNode(""), tune: ({ node }) => write(node, raw) };
}

function plain(source) {
  return box("div", source, () => [text(source)], { className: "plain" });
}

/** Change a text by what was added to it, if that is all: a selection within stays. */
function write(node, text) {
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}

/** A text, lexed. What stands within lines is lexed only when it is asked for. */
class Source {
  #lexer;
  #inline;
  #streaming;
  #changed;

  constructor(text, { links = {}, streaming = false, changed = null }) {
    this.#streaming = streaming;
    this.#changed = changed;
    this.#lexer = new marked.Lexer(marked.defaults);
    this.#lexer.streaming = streaming;
    Object.assign(this.#lexer.tokens.links, links);
    this.tokens = this.#lexer.blockTokens(text, this.#lexer.tokens);
    const queue = this.#lexer.inlineQueue;
    const end = streaming && queue.at(-1);
    const guess = end && text.replace(/\n$/, "").endsWith(end.src) ? foreseen(end.src) : end?.src;
    /** Whether something is shown otherwise than it stands there. */
    this.guessed = guess !== end?.src;
    if (this.guessed) end.src = guess;
    this.#inline = new Map(queue.map(({ tokens, src }) => [tokens, src]));
  }

  /** The shapes of the text's blocks. `tail`: what comes before the first of them. */
  shapes(tail) {
    return this.tokens.filter(hasShape).map((token, i) => {
      const shape = this.#block(token, i === 0 ? tail : undefined);
      if (token.type === "code" || token.type === "math") return shape;
      // Its direction is that of its text; within a block it is the same, so that lists keep their markers.
      return { ...shape, make: () => Object.assign(shape.make(), { dir: "auto" }) };
    });
  }

  #blocks(tokens) {
    return tokens.filter((token) => hasShape(token) && token.type !== "checkbox").map((token) => this.#block(token));
  }

  #block(token, tail) {
    const { type, raw } = token;
    const lines = () => this.#lines(token.tokens);
    switch (type) {
      case "heading": // the page has the first two levels
        return box(`h${Math.min(token.depth + 2, 6)}`, raw, lines);
      case "blockquote":
        return box("blockquote", raw, () => this.#blocks(token.tokens));
      case "list":
        return this.#list(token, tail);
      case "table":
        return this.#table(token, tail);
      case "code":
        return this.#code(token);
      case "hr":
        return box("hr", raw);
      case "html":
        return box("p", raw, () => [text(raw.trimEnd())], { className: "html" });
      case "math":
        return this.#math(token, "div");
      default: // paragraph, and text in a list
        return box("p", raw, lines);
    }
  }

  #list({ raw, ordered, start, loose, items }, { parts = 0, loose: looseBefore = false } = {}) {
    const tune = ({ node }) => {
      if (ordered && !parts) node.start = start;
      node.className = loose || looseBefore ? "loose" : "";
    };
    return { ...box(ordered ? "ol" : "ul", raw, () => items.map((item) => this.#item(item))), tune, from: parts };
  }

  #item({ raw, task, checked, tokens }) {
    const blocks = () => this.#blocks(tokens);
    if (!task) return box("li", raw, blocks);
    const name = checked ? "Done" : "To do";
    const mark = { type: "checkbox", disabled: true, defaultChecked: checked, ariaLabel: name };
    return box("li", raw, () => [box("input", "", null, mark), ...blocks()], { className: "task" });
  }

  #table({ raw, header, rows }, { parts = 0 } = {}) {
    const cell = (tag, { text, align, tokens }) => {
      const properties = { className: align ? `to-${align}` : "", ...(tag === "th" && { scope: "col" }) };
      return box(tag, text, () => this.#lines(tokens), properties);
    };
    const row = (tag, cells) => box("tr", cells.map(({ text }) => text).join("|"), () => cells.map((each) => cell(tag, each)));
    const head = () => [row("th", header)];
    const body = () => rows.map((cells) => row("td", cells));
    const table = () => [box("thead", row("th", header).raw, head), { ...box("tbody", raw, body), from: parts }];
    const scroll = { className: "table", role: "region", ariaLabel: "Table", tabIndex: 0 };
    return box("div", raw, () => [box("table", raw, table)], scroll);
  }

  #code({ raw, lang, text }) {
    const language = lang?.match(/^\S*/)[0] ?? "";
    const closed = /\n *(?:`{3,}|~{3,}) *\n?$/.test(raw) || !this.#streaming;
    const make = () => {
      const code = element("code", {}, document.createTextNode(""));
      const copy = copyButton(() => code.textContent, { name: "Copy code" });
      const head = element("div", {}, element("span", { textContent: language }), copy);
      return element("div", { className: "code", dir: "ltr" }, head, element("pre", { tabIndex: 0 }, code));
    };
    const tune = (piece) => {
      const code = piece.node.lastChild.firstChild;
      if (code.textContent !== text) {
        if (piece.highlighted) code.replaceChildren(document.createTextNode(""));
        piece.highlighted = false;
        write(code.firstChild, text);
      }
      if (!closed || piece.highlighted || !language) return;
      piece.highlighted = true;
      import("./highlight.js").then(({ highlight }) => highlight(code, language, this.#changed));
    };
    return { kind: `code ${language}`, raw, make, tune };
  }

  #math({ raw, source, display }, tag) {
    const properties = { className: display ? "math display" : "math", dir: "ltr" };
    if (source === null) return box(tag, raw, () => [text(raw)], properties);
    const make = () => {
      const node = element(tag, { ...properties, textContent: raw.trim() });
      typeset(node, source.trim(), display, this.#changed);
      return node;
    };
    return { kind: `math ${display} ${source}`, raw, make };
  }

  #lines(tokens, inLink = false) {
    const src = this.#inline.get(tokens);
    if (src !== undefined) {
      this.#inline.delete(tokens);
      Object.assign(this.#lexer.state, { inLink: false, inRawBlock: false });
      this.#lexer.inlineTokens(src, tokens);
    }
    return tokens.filter(({ type }) => type !== "checkbox").map((token) => this.#phrase(token, inLink));
  }

  #phrase(token, inLink) {
    const { type, raw } = token;
    const within = () => this.#lines(token.tokens, inLink);
    switch (type) {
      case "strong":
      case "em":
      case "del":
        return box(type, raw, within);
      case "codespan":
        return box("code", raw, () => [text(token.text)], { dir: "ltr" });
      case "link":
      case "image":
        return this.#link(token, inLink);
      case "math":
        return this.#math(token, "span");
      case "br":
        return box("br", raw);
      case "html": // of all elements that a model writes, this one has a use: in tables there is no other way
        return /^<br\s*\/?>$/i.test(raw) ? box("br", raw) : text(raw);
      case "escape":
        return text(token.text);
      default:
        return text(decode(token.text));
    }
  }

  /** Nothing is loaded from elsewhere: an image is a link to it. */
  #link({ type, raw, href, title, autolink, text: label, tokens }, inLink) {
    const url = inLink ? null : address(autolink ? href : decode(href));
    const parts = () => {
      if (autolink || !label) return [text(label || href)];
      return this.#lines(tokens, true);
    };
    if (!url) return box("span", raw, parts);
    const properties = { href: url, target: "_blank", rel: "noopener noreferrer nofollow" };
    if (type === "image") properties.className = "image";
    if (title) properties.title = decode(title);
    return box("a", raw, parts, properties);
  }
}

function address(href) {
  const url = URL.canParse(href) ? new URL(href) : null;
  return PROTOCOLS.has(url?.protocol) ? url.href : null;
}

// The names that texts use of the 2,000 that HTML knows; the last character is what the name stands for.
const NAMES = `amp& lt< gt> quot" apos' nbsp\u00a0 ensp\u2002 emsp\u2003 thinsp\u2009 shy\u00ad zwj\u200d zwnj\u200c copy© reg® trade™
hellip… mdash— ndash– lsquo‘ rsquo’ ldquo“ rdquo” laquo« raquo» bull• middot· sect§ para¶ deg° microµ euro€ pound£ yen¥ cent¢
times× divide÷ plusmn± minus− ne≠ le≤ ge≥ asymp≈ equiv≡ infin∞ sum∑ prod∏ int∫ radic√ part∂ nabla∇ isin∈ cap∩ cup∪ sub⊂ sup⊃
forall∀ exist∃ and∧ or∨ not¬ larr← uarr↑ rarr→ darr↓ harr↔ rArr⇒ hArr⇔ frac12½ frac14¼ frac34¾ sup1¹ sup2² sup3³ check✓
alphaα betaβ gammaγ deltaδ epsilonε thetaθ lambdaλ muμ piπ rhoρ sigmaσ tauτ phiφ omegaω DeltaΔ SigmaΣ OmegaΩ`;
const ENTITIES = new Map(NAMES.split(/[ \n]+/).map((entry) => [entry.slice(0, -1), entry.at(-1)]));

/** Replace character references; those that are not known stay. */
function decode(text) {
  if (!text.includes("&")) return text;
  return text.replace(/&(?:#(\d{1,7})|#[xX]([\da-fA-F]{1,6})|(\w+));/g, (reference, decimal, hexadecimal, name) => {
    if (name) return ENTITIES.get(name) ?? reference;
    const code = decimal ? Number(decimal) : Number.parseInt(hexadecimal, 16);
    return code && code <= 0x10ffff ? String.fromCodePoint(code) : "\ufffd";
  });
}
