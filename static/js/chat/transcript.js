/** How a conversation becomes model input. Knows nothing of the page or of the network. */

/**
 * How a model wants to be spoken to.
 *
 * @typedef {object} ChatFormat
 * @property {string} system the system prompt of chats that have none of their own
 * @property {string} first the first turn where there is a system prompt: "{system}", "{text}"
 * @property {string} user a question, "{text}" standing for its text; ends where the answer begins
 * @property {string} turn_end what stands between an answer and the next question
 * @property {string[]} stop the texts that end an answer
 */

/**
 * The conversation exactly as it is to stand in the model's context, up to where the answer goes on.
 *
 * @param {import("./tree.js").Message[]} path from a question on; the last message is the answer to be written
 * @param {ChatFormat} format
 * @param {string} model its name: what ended another model's answers is not part of the context
 * @param {string} [system] the system prompt; default: the model's own
 */
export function transcript(path, format, model, system = format.system) {
  let text = "";
  let ended = ""; // what of the way to the next turn is in the context already
  for (const { question, answer } of turns(path)) {
    // Functions, for in a replacement text "$&" and its like would not stand for themselves.
    const asked = format.user.replace("{text}", () => question);
    if (text === "") {
      text = system ? format.first.replace(/\{(system|text)\}/g, (_, name) => (name === "text" ? question : system)) : asked;
    } else {
      const turn = format.turn_end + asked;
      text += turn.startsWith(ended) ? turn.slice(ended.length) : turn;
    }
    ended = (answer.model === model && answer.stopSequence) || "";
    text += answer.text + ended;
  }
  return text;
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
