/** The command by which another machine joins the swarm. */

import { copyButton } from "../shared/copy.js";
import { $, element, setText } from "../shared/dom.js";
import { runs } from "./model-card.js";

const LOOPBACK = /^\/(ip4\/127\.|ip6\/::1\/|dns[46]?\/localhost\/)/;
const PLAIN = /^[\w@%+=:,./-]+$/; // what no shell reads as anything else

const NOTES = {
  none: "The addresses of this swarm are not known yet.",
  public: "The machine joins the public swarm and computes for everybody in it.",
  ownLoopback:
    "This swarm listens on this machine only: other machines cannot reach it, and the command works here alone. To let " +
    "others in, start the program with SWARM_HOST_MADDRS=/ip4/0.0.0.0/tcp/31330; docs/swarms.md says more.",
  loopback: "These addresses are this machine’s own: the command works here alone.",
  reachable: "The machine has to reach these addresses, and this one has to reach it.",
};

export class Joining {
  #ownSwarm;
  #state = null;

  /** @param {boolean} ownSwarm whether the program that serves this page has founded the swarm */
  constructor(ownSwarm) {
    this.#ownSwarm = ownSwarm;
    $("join-model").addEventListener("change", () => this.#write());
    const button = copyButton(() => $("join-command").textContent, { label: "Copy" });
    button.id = "join-copy";
    $("join-command").after(button);
  }

  show(state) {
    this.#state = state;
    this.#offer(state.models);
    $("join").hidden = state.models.length === 0;
    this.#write();
  }

  #offer(models) {
    const select = $("join-model");
    const offered = [...select.options].map(({ value }) => value);
    if (offered.join("\n") === models.map(({ name }) => name).join("\n")) return;
    const chosen = select.value;
    select.replaceChildren(...models.map(({ name, title }) => element("option", { value: name, textContent: title })));
    if (offered.includes(chosen)) select.value = chosen;
  }

  #write() {
    const model = this.#state?.models.find(({ name }) => name === $("join-model").value);
    if (!model) return;
    const { peers, note } = this.#peers(this.#state.initial_peers);
    setText($("join-command").firstElementChild, command(model, peers));
    $("join-copy").disabled = peers.length === 0;
    const copied = /^[/.~]/.test(model.name) ? " It needs a copy of the model’s directory, with the same name." : "";
    setText($("join-note"), note + copied);
  }

  /** Those that other machines can reach, if there are any. */
  #peers(peers) {
    if (peers.length === 0) return { peers, note: NOTES.none };
    if (peers.includes("public")) return { peers, note: NOTES.public };
    const reachable = peers.filter((peer) => !LOOPBACK.test(peer));
    if (reachable.length) return { peers: reachable, note: NOTES.reachable };
    return { peers, note: this.#ownSwarm ? NOTES.ownLoopback : NOTES.loopback };
  }
}

/** With the first blocks that nobody holds, where others are held already. */
function command({ name, blocks }, peers) {
  const parts = [`.venv/bin/python -m swarm.server ${quote(name)}`];
  const missing = runs(blocks).find(({ value }) => value === 0);
  if (missing && blocks.some((count) => count > 0)) parts.push(`--blocks ${missing.start}:${missing.end}`);
  if (peers.length) parts.push(`--initial-peers ${peers.map(quote).join(" ")}`);
  return parts.join(" \\\n  ");
}

function quote(word) {
  return PLAIN.test(word) ? word : "'" + word.replaceAll("'", "'\\''") + "'";
}
