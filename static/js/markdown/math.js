/** Formulas: how they stand in Markdown (extensions of marked), and KaTeX, which is loaded with the first of them. */

import { whenIdle } from "./idle.js";

const VENDOR = "../../../vendor/katex/";
const MAX_SOURCE = 5000; // characters; no formula is longer, and KaTeX takes a frame for one of this length
// Sizes in em, expansions of macros: what a formula may take of the page and of its time. No links, no outside images.
const OPTIONS = { throwOnError: true, trust: false, strict: "ignore", maxSize: 20, maxExpand: 200 };
// Those of KaTeX would set inline styles, which the pages forbid.
const MACROS = { "\\pmb": "\\boldsymbol{#1}", "\\fcolorbox": "\\textcolor{#1}{}\\colorbox{#2}{#3}" };

// $$…$$, \[…\], \(…\) and $…$. "$5 and $10" is text: no space inside of the dollars, no digit after them.
const DISPLAY = /\$\$((?:\\[^]|[^\\$])+?)\$\$|\\\[([^]+?)\\\]/.source;
const PHRASE = /\\\(([^]+?)\\\)|\$(?!\s)((?:\\.|[^\\\n$\x60])+)(?<!\s)\$(?!\d)/.source; // \x60: a backtick
const INLINE = DISPLAY + "|" + PHRASE;
const BLOCK_START = new RegExp("^ {0,3}(?:" + DISPLAY + ")[ \\t]*(?:\\n|$)");
const INLINE_START = new RegExp("^(?:" + INLINE + ")");
const INLINE_ANYWHERE = new RegExp(INLINE, "g");
const UNCLOSED = /^ {0,3}(?:\$\$|\\\[)(?:(?!\$\$|\\\]|\n[ \t]*\n)[^])*$/;
const BLANK_LINE = /\n[ \t]*\n/;

/** Options of marked that make `math` tokens: {raw, source, display}; source is null while the formula is unclosed. */
export const mathOptions = {
  extensions: [
    {
      name: "math",
      level: "block",
      start: (text) => text.match(/\n {0,3}(?:\$\$|\\\[)/)?.index + 1,
      tokenizer(text) {
        const match = BLOCK_START.exec(text);
        if (match && !BLANK_LINE.test(match[0].trimEnd())) return token(match, match[1] ?? match[2], true);
        const unclosed = this.lexer.streaming && UNCLOSED.exec(text);
        if (unclosed) return token(unclosed, null, true);
      },
    },
    {
      name: "math",
      level: "inline",
      start: (text) => text.indexOf("$"),
      tokenizer(text) {
        const match = (text[0] === "$" || text[0] === "\\") && INLINE_START.exec(text);
        if (!match) return;
        const display = match[1] ?? match[2];
        return token(match, display ?? match[3] ?? match[4], display !== undefined);
      },
    },
  ],
  hooks: {
    // A star within a formula neither begins nor ends emphasis.
    emStrongMask: (text) => text.replace(INLINE_ANYWHERE, (formula) => "[" + "a".repeat(formula.length - 2) + "]"),
  },
};

function token([raw], source, display) {
  return { type: "math", raw, source, display };
}

let katex = null;

// A formula too wide for the page can be scrolled by its own, with keys as well. Here nothing waits for the layout.
const widths = new ResizeObserver((entries) => {
  for (const { target } of entries) if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
});

/** Show a formula in an element, which shows its source until then. */
export function typeset(element, source, display, changed) {
  if (source.length > MAX_SOURCE) return;
  katex ??= load();
  katex.then((loaded) => {
    if (!loaded) return;
    whenIdle(() => {
      const shown = element.textContent;
      try {
        loaded.render(source, element, { ...OPTIONS, macros: { ...MACROS }, displayMode: display });
      } catch {
        element.textContent = shown; // what KaTeX does not know; its own way to say so needs inline styles
      }
      if (display) widths.observe(element);
    }, changed);
  });
}

async function load() {
  const href = new URL(`${VENDOR}katex.min.css`, import.meta.url).href;
  document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
  try {
    await import(`${VENDOR}katex.min.js`);
    return globalThis.katex;
  } catch (error) {
    console.warn("formulas are shown as their source", error);
    return null;
  }
}
