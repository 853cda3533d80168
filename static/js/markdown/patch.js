/** Brings what stands on the page to what is to stand there, and leaves alone what is right already. */

import { element } from "../shared/dom.js";

/**
 * A piece is a node on the page and what it was made of. A shape is what a piece is to be:
 * {kind, raw, make(), tune?(piece), parts?(), from?}. Pieces of one kind can be made into one another by `tune` and by
 * changing their parts; if `raw` is the same, the piece is right already. `from`: how many settled parts come before.
 */
export function patch(parent, pieces, shapes, { from = 0, always = false } = {}) {
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

export function box(tag, raw, parts, properties = {}) {
  const make = () => element(tag, properties);
  return { kind: tag + JSON.stringify(properties), raw, make, parts };
}

export function text(raw) {
  return { kind: "text", raw, make: () => document.createTextNode(""), tune: ({ node }) => write(node, raw) };
}

export function plain(source) {
  return box("div", source, () => [text(source)], { className: "plain" });
}

/** Change a text by what was added to it, if that is all: a selection within stays. */
export function write(node, text) {
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}
