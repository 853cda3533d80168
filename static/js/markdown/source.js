/**
 * What a text in Markdown says, as shapes for patch.js. marked finds it out (its lexer only); the page is built from that
 * here, out of a fixed set of elements: no markup of the model's gets in but as text.
 */

import { copyButton } from "../shared/copy.js";
import { element } from "../shared/dom.js";
import { decode } from "./entities.js";
import { typeset } from "./math.js";
import { box, text, write } from "./patch.js";

const PROTOCOLS = new Set(["http:", "https:", "mailto:"]);

export const hasShape = ({ type }) => type !== "space" && type !== "def";

/** A text, lexed. What stands within lines is lexed only when it is asked for. */
export class Source {
  #lexer;
  #inline;
  #streaming;
  #changed;

  /** @param {object} marked its Lexer, and its defaults with the options of math.js */
  constructor(marked, text, { links = {}, streaming = false, changed = null }) {
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
