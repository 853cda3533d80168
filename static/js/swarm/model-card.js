/** A model on the page of the swarm: its state, its blocks and the servers that hold them. Updated in place. */

import { copyButton } from "../shared/copy.js";
import { element, setText } from "../shared/dom.js";
import { number, plural, range, shortPeer, stateLabel } from "../shared/words.js";

const MOST_LEVELS = 3; // of servers per block that are drawn apart
const DENSE = 60; // blocks, from which on there is little room between them
const TICK_STEPS = [1, 2, 5, 10, 20, 50, 100];
const MOST_TICKS = 8; // for which there is room on a phone

const precise = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

/**
 * Neighbours that are alike, together.
 *
 * @template T
 * @param {T[]} values
 * @returns {{start: number, end: number, value: T}[]} ranges [start, end)
 */
export function runs(values) {
  const found = [];
  values.forEach((value, index) => {
    const last = found.at(-1);
    if (last?.value === value) last.end = index + 1;
    else found.push({ start: index, end: index + 1, value });
  });
  return found;
}

/** "block 4", or "blocks 0–3, 7". */
function blocksOf(ranges) {
  const one = ranges.length === 1 && ranges[0].end - ranges[0].start === 1;
  return `${one ? "block" : "blocks"} ${ranges.map(range).join(", ")}`;
}

/** What the strip shows, in words. */
export function describeBlocks(counts) {
  const parts = runs(counts).map((run) => `${range(run)}: ${run.value ? plural(run.value, "server") : "none"}`);
  return `Servers per block. ${parts.join("; ")}.`;
}

export class ModelCard {
  #announce;
  #model = null; // as it was shown last
  #title = element("h2");
  #state = element("p", { className: "state" });
  #detail = element("p", { className: "detail" });
  #progress = element("progress", { max: 1, hidden: true });
  #facts = element("dl", { className: "facts" });
  #factsShown = "";
  #strip = element("div", { className: "strip" });
  #ruler = element("div", { className: "ruler", ariaHidden: "true" });
  #map = element("div", { className: "map", hidden: true }, this.#strip, this.#ruler);
  #servers;

  /** @param {(words: string) => void} announce */
  constructor(id, announce) {
    this.#announce = announce;
    this.#title.id = `${id}-title`;
    this.#strip.setAttribute("role", "img");
    this.#servers = new ServerTable(this.#title.id);
    const head = element("div", { className: "head" }, this.#title, this.#state);
    this.node = element("section", { className: "model" });
    this.node.setAttribute("aria-labelledby", this.#title.id);
    this.node.append(head, this.#detail, this.#progress, this.#facts, this.#map, this.#servers.node);
  }

  show(model) {
    setText(this.#title, model.title);
    this.#title.title = model.name;
    setText(this.#state, stateLabel(model.state));
    this.node.dataset.state = model.state;
    setText(this.#detail, outlook(model));
    this.#showProgress(model);
    this.#showFacts(model);
    this.#showBlocks(model.blocks);
    this.#servers.show(model.servers, model.blocks.length);
    this.#tell(model);
    this.#model = model;
  }

  #showProgress({ state, title, progress }) {
    this.#progress.hidden = state !== "loading";
    if (progress === null) this.#progress.removeAttribute("value");
    else this.#progress.value = progress;
    this.#progress.ariaLabel = `Loading ${title}`;
  }

  #showFacts(model) {
    const facts = factsOf(model);
    const shown = JSON.stringify(facts);
    if (shown === this.#factsShown) return;
    this.#factsShown = shown;
    this.#facts.replaceChildren(
      ...facts.map(([name, value, link]) => {
        const inside = link ? element("a", { href: link, textContent: value, rel: "external" }) : value;
        return element("div", {}, element("dt", { textContent: name }), element("dd", {}, inside));
      }),
    );
  }

  #showBlocks(counts) {
    this.#map.hidden = counts.length === 0;
    if (this.#strip.childElementCount !== counts.length) this.#draw(counts.length);
    counts.forEach((count, block) => {
      const cell = this.#strip.children[block];
      const level = String(Math.min(count, MOST_LEVELS));
      if (cell.dataset.level !== level) cell.dataset.level = level;
      const words = `Block ${block}: ${count ? plural(count, "server") : "no server"}`;
      if (cell.title !== words) cell.title = words;
    });
    const words = describeBlocks(counts);
    if (this.#strip.ariaLabel !== words) this.#strip.ariaLabel = words;
  }

  #draw(count) {
    this.#strip.replaceChildren(...Array.from({ length: count }, () => element("span", { className: "cell" })));
    this.#map.toggleAttribute("data-dense", count > DENSE);
    this.#ruler.replaceChildren(
      ...ticks(count).map((block) => {
        const tick = element("span", { textContent: String(block) });
        tick.style.setProperty("--at", String((block + 0.5) / count));
        return tick;
      }),
    );
  }

  /** What has changed, for those who do not see it. */
  #tell(model) {
    const before = this.#model;
    if (!before) return;
    if (before.state !== model.state) {
      this.#announce(`${model.title}: ${stateLabel(model.state)}. ${model.state === "ready" ? "" : outlook(model)}`);
      return;
    }
    const news = [
      [without(model.servers, before.servers), "joined"],
      [without(before.servers, model.servers), "left"],
    ].filter(([servers]) => servers.length);
    const words = news.map(([servers, verb]) => `${plural(servers.length, "server")} ${verb}`);
    if (words.length) this.#announce(`${model.title}: ${words.join(", ")}.`);
  }
}

function without(servers, others) {
  const known = new Set(others.map(({ peer_id: peerId }) => peerId));
  return servers.filter(({ peer_id: peerId }) => !known.has(peerId));
}

/** One sentence on the state: how well the model is held, or what it waits for. */
function outlook({ state, message, blocks: counts }) {
  if (state === "blocks_missing" && counts.length) {
    const missing = runs(counts).filter(({ value }) => value === 0);
    return `No server holds ${blocksOf(missing)}. Answers wait until one does.`;
  }
  if (state !== "ready" || !counts.length) return message ? sentence(message) : "";
  const least = Math.min(...counts);
  if (least > 1) return `Every block is held by ${plural(least, "server")} or more: each of them may go.`;
  const alone = runs(counts.map((count) => count === 1)).filter(({ value }) => value);
  const all = alone.length === 1 && alone[0].end - alone[0].start === counts.length;
  const which = all ? "Each block is" : `${blocksOf(alone).replace("block", "Block")} ${isOne(alone) ? "is" : "are"}`;
  return `${which} held by one server only: when it goes, answers wait for another.`;
}

function isOne(ranges) {
  return ranges.length === 1 && ranges[0].end - ranges[0].start === 1;
}

function sentence(message) {
  const begun = message[0].toUpperCase() + message.slice(1);
  return /[.!?…]$/.test(begun) ? begun : `${begun}.`;
}

function factsOf(model) {
  const facts = [];
  if (model.size) facts.push(["Parameters", model.size]);
  if (model.num_blocks) facts.push(["Blocks", number(model.num_blocks)]);
  if (model.context_length) facts.push(["Longest session", plural(model.context_length, "token")]);
  if (model.licence) facts.push(["Licence", model.licence]);
  facts.push(["Model", model.name, model.link]);
  return facts;
}

/** Blocks to number below the strip: some round ones, and the last. */
function ticks(count) {
  const step = TICK_STEPS.find((size) => count / size <= MOST_TICKS) ?? TICK_STEPS.at(-1);
  const round = Array.from({ length: Math.ceil(count / step) }, (_, index) => index * step);
  const clear = round.filter((block) => block === 0 || count - 1 - block > step / 2);
  return clear.includes(count - 1) ? clear : [...clear, count - 1];
}

// One column per entry. The roles are written out because the rows are drawn as grids, which takes them away.
const COLUMNS = [
  { name: "Server" },
  { name: "Blocks", text: (server) => range(server) },
  {
    name: "Throughput",
    hint: "In requests per second, as the server announces it: in private swarms 1, unless it was given another",
    text: ({ throughput }) => `${precise.format(throughput)} req/s`,
  },
  {
    name: "Free tokens",
    hint: "Attention cache that is left on the server, in tokens of sessions",
    // Announced as keys and values of a token in a block.
    text: ({ cache_tokens_left: left, start, end }) =>
      left === null ? "not reported" : number(Math.floor(left / 2 / Math.max(end - start, 1))),
  },
  { name: "Precision", text: ({ torch_dtype: dtype }) => dtype ?? "not reported" },
  { name: "Version", hint: "Of petals", text: ({ version }) => version ?? "not reported" },
  { name: "Ping", hint: "There and back from this app, as measured with some of the servers", text: ({ ping }) => latency(ping) },
];

function latency(seconds) {
  return seconds === null ? "unknown" : `${precise.format(seconds * 1000)} ms`;
}

class ServerTable {
  #body = element("tbody");
  #none = element("p", { className: "none", textContent: "No server of this model is known.", hidden: true });
  #table = element("table", { hidden: true });
  #rows = new Map(); // by peer id

  constructor(titleId) {
    const names = COLUMNS.map(({ name, hint = "" }) => {
      const cell = element("th", { scope: "col", textContent: name, title: hint });
      cell.setAttribute("role", "columnheader");
      return cell;
    });
    const head = element("thead", {}, element("tr", {}, ...names));
    this.#table.append(head, this.#body);
    this.#table.setAttribute("role", "table");
    this.#table.setAttribute("aria-labelledby", titleId);
    for (const group of [head, this.#body]) group.setAttribute("role", "rowgroup");
    head.firstChild.setAttribute("role", "row");
    this.node = element("div", { className: "servers" }, this.#table, this.#none);
  }

  show(servers, blockCount) {
    this.#table.hidden = servers.length === 0;
    this.#none.hidden = servers.length > 0 || blockCount === 0;
    const present = new Set(servers.map(({ peer_id: peerId }) => peerId));
    for (const [peerId, row] of this.#rows) {
      if (present.has(peerId)) continue;
      row.node.remove();
      this.#rows.delete(peerId);
    }
    servers.forEach((server, index) => {
      const row = this.#rows.get(server.peer_id) ?? this.#add(server);
      row.show(server, blockCount);
      // Moving a row would take the focus from it: only where it has to.
      const there = this.#body.children[index];
      if (there !== row.node) this.#body.insertBefore(row.node, there ?? null);
    });
  }

  #add(server) {
    const row = new ServerRow(server.peer_id);
    this.#rows.set(server.peer_id, row);
    return row;
  }
}

class ServerRow {
  #name = element("span", { className: "name" });
  #cells = [];

  constructor(peerId) {
    this.shortId = shortPeer(peerId);
    const copy = copyButton(() => peerId, {
      label: "Copy id",
      className: "plain small",
      name: `Copy id ${this.shortId}`,
    });
    copy.title = peerId;
    const head = element("th", { scope: "row", title: peerId }, this.#name, copy);
    head.setAttribute("role", "rowheader");
    this.node = element("tr", { data: { peer: peerId } }, head);
    this.node.setAttribute("role", "row");
    for (const { name } of COLUMNS.slice(1)) {
      const cell = element("td", { data: { name } });
      cell.setAttribute("role", "cell");
      this.#cells.push(cell);
      this.node.append(cell);
    }
  }

  show(server, blockCount) {
    setText(this.#name, server.name ? `${server.name} ${this.shortId}` : this.shortId);
    this.#cells.forEach((cell, index) => setText(cell, COLUMNS[index + 1].text(server)));
    this.node.style.setProperty("--start", String(server.start / blockCount));
    this.node.style.setProperty("--share", String((server.end - server.start) / blockCount));
  }
}
