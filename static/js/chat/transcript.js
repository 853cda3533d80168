/** How a conversation becomes model input. Knows nothing of the page or of the network. */

/**
 * How a model wants to be spoken to.
 *
 * @typedef {object} ChatFormat
 * @property {string} system the system prompt of chats that have none of their own
 * @property {string} first the first turn where there is a system prompt: "{system}", "{text}"
 * @property {string} alone the same where there is none; empty: `user`
 * @property {string} user a question, "{text}" standing for its text; ends where the answer begins
 * @property {string} turn_end what stands between an answer and the next question
 * @property {string[]} stop the texts that end an answer
 */

/**
 * A part of a transcript.
 *
 * @typedef {object} Piece
 * @property {string} text
 * @property {boolean} plain whether somebody has written it: special tokens in it are characters
 */

const PLAIN_BETWEEN = ["\ufdd2", "\ufdd3"]; // two noncharacters: no text that is meant for others has them

/**
 * The conversation exactly as it is to stand in the model's context, up to where the answer goes on.
 *
 * @param {import("./tree.js").Message[]} path from a question on; the last message is the answer to be written
 * @param {ChatFormat} format
 * @param {string} model its name: what ended another model's answers is not part of the context
 * @param {string} [system] the system prompt; default: the model's own
 * @returns {Piece[]}
 */
export function transcript(path, format, model, system = format.system) {
  const pieces = [];
  let ended = ""; // what of the way to the next turn is in the context already
  for (const { question, answer } of turns(path)) {
    if (pieces.length === 0) {
      pieces.push(...filled(system ? format.first : format.alone || format.user, { system, text: question }));
    } else {
      const turn = filled(format.turn_end + format.user, { text: question });
      pieces.push(...(textOf(turn).startsWith(ended) ? after(turn, ended.length) : turn));
    }
    ended = (answer.model === model && answer.stopSequence) || "";
    pieces.push({ text: answer.text, plain: true }, { text: ended, plain: false });
  }
  return pieces;
}

/** A template whose "{name}" are replaced by texts that somebody has written. */
function filled(template, texts) {
  const parts = template.split(/\{(system|text)\}/); // every other one is a name
  return parts.map((part, i) => (i % 2 ? { text: texts[part], plain: true } : { text: part, plain: false }));
}

/** @param {Piece[]} pieces */
export function textOf(pieces) {
  return pieces.map(({ text }) => text).join("");
}

/** What comes after so many characters. */
function after(pieces, length) {
  const left = [];
  for (const { text, plain } of pieces) {
    left.push({ text: text.slice(length), plain });
    length = Math.max(0, length - text.length);
  }
  return left;
}

/**
 * The protocol's inputs for what comes after so many characters.
 *
 * @param {Piece[]} pieces
 */
export function inputsAfter(pieces, length) {
  const [begin, end] = PLAIN_BETWEEN;
  const safe = (text) => text.replaceAll(begin, "\ufffd").replaceAll(end, "\ufffd");
  const written = after(pieces, length).filter(({ text }) => text);
  const inputs = written.map(({ text, plain }) => (plain ? begin + safe(text) + end : text)).join("");
  return { inputs, plain_between: PLAIN_BETWEEN };
}

/**
 * Questions with their answers. A question that got no answer is asked along with the next one, so that nothing that was
 * written is lost, unless the server refused it: it would be refused again.
 */
function turns(path) {
  const found = [];
  let waiting = [];
  for (let i = 0; i + 1 < path.length; i += 2) {
    const [question, answer] = [path[i], path[i + 1]];
    waiting.push(question.text);
    const isLast = i + 2 >= path.length;
    if (answer.text || isLast) {
      found.push({ question: waiting.join("\n\n"), answer });
      waiting = [];
    } else if (answer.state === "refused") {
      waiting.pop();
    }
  }
  return found;
}

/**
 * Where the model shall begin to read so that about half of its context is free again.
 *
 * @param {import("./tree.js").Message[]} path
 * @param {number} limit tokens
 * @param {string | null} forgotten where it begins now; null: with the first message
 * @returns {string | null} the id of a later question, or null if there is nothing more that could be left out
 */
export function forgetUpTo(path, limit, forgotten) {
  const first = Math.max(0, path.findIndex(({ id }) => id === forgotten));
  const total = path.findLast(({ stats }) => stats?.position)?.stats.position ?? 0;
  for (let i = first; i + 2 < path.length; i += 2) {
    const before = path[i + 1].stats?.position;
    if (before && total - before <= limit / 2) return path[i + 2].id;
  }
  const last = path.findLastIndex(({ role }) => role === "user");
  return last > first ? path[last].id : null;
}
