/** The page of the swarm: asks again and again, and shows what the app reports. */

import { Announcer } from "../shared/announcer.js";
import { $, pageConfig, setText } from "../shared/dom.js";
import { pause } from "../shared/pause.js";
import { fetchState } from "../shared/swarm-state.js";
import { Joining } from "./join.js";
import { ModelCard } from "./model-card.js";
import { number, plural } from "../shared/words.js";

const POLL_MS = 2_000;
const FIRST_RETRY_S = 2;
const LAST_RETRY_S = 30;
const LONGEST_MS = 2 ** 31 - 1; // that a timer can wait

const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });

class SwarmPage {
  #pageToken;
  #joining;
  #announcer = new Announcer();
  #cards = new Map(); // by the model's name
  #updated = null; // when the app last reported something
  #failures = 0; // in a row
  #waking = new AbortController();

  constructor({ page_token: pageToken, own_swarm: ownSwarm }) {
    this.#pageToken = pageToken;
    this.#joining = new Joining(ownSwarm);
    const wake = () => this.#waking.abort();
    document.addEventListener("visibilitychange", wake);
    window.addEventListener("online", wake);
    $("try-now").addEventListener("click", wake);
  }

  /** Go on for as long as the page is open; nothing is asked while nobody can see it. */
  async follow() {
    for (;;) {
      while (document.hidden) await this.#rest(LONGEST_MS);
      try {
        this.#show(await fetchState(this.#pageToken));
        await this.#rest(POLL_MS);
      } catch (error) {
        await this.#fail(error);
      }
    }
  }

  /** Wait, until there is a reason to ask at once. Returns whether there was one. */
  async #rest(ms) {
    this.#waking = new AbortController();
    try {
      await pause(ms, this.#waking.signal);
      return false;
    } catch {
      return true;
    }
  }

  #show(state) {
    if (this.#failures) this.#announcer.say("The app can be reached again.");
    this.#failures = 0;
    this.#updated = new Date();
    document.body.dataset.state = "current";
    setText($("freshness"), `Updated ${clock.format(this.#updated)}`);
    $("try-now").hidden = true;
    this.#showTotals(state);
    for (const model of state.models) this.#card(model.name).show(model);
    this.#dropOthers(state.models);
    this.#joining.show(state);
  }

  #showTotals({ models, sessions }) {
    const peers = new Set(models.flatMap(({ servers }) => servers.map(({ peer_id: peerId }) => peerId)));
    setText($("server-count"), number(peers.size));
    setText($("ready-count"), `${models.filter(({ state }) => state === "ready").length} of ${models.length}`);
    setText($("session-count"), `${number(sessions.open)} of ${number(sessions.max)}`);
  }

  #card(name) {
    if (!this.#cards.has(name)) {
      const card = new ModelCard(`model-${this.#cards.size + 1}`, (words) => this.#announcer.say(words));
      this.#cards.set(name, card);
      $("models").append(card.node);
    }
    return this.#cards.get(name);
  }

  #dropOthers(models) {
    const names = new Set(models.map(({ name }) => name));
    for (const [name, card] of this.#cards) {
      if (names.has(name)) continue;
      card.node.remove();
      this.#cards.delete(name);
    }
  }

  /** Say why nothing new is shown, and wait longer after each failure in a row. */
  async #fail(error) {
    // The program was started anew, perhaps as another version: so is the page, unless that has not helped before.
    if (error.status === 401 && this.#updated) location.reload();
    const words = error.status ? `The app refuses: ${error.message}` : "The app cannot be reached.";
    if (!error.status && !["TypeError", "TimeoutError"].includes(error.name)) console.error(error);
    document.body.dataset.state = "stale";
    if (!this.#failures) this.#announcer.say(words);
    $("try-now").hidden = false;
    const seconds = Math.min(FIRST_RETRY_S * 2 ** this.#failures, LAST_RETRY_S);
    this.#failures += 1;
    const since = this.#updated ? ` Below is how it was at ${clock.format(this.#updated)}.` : "";
    for (let left = seconds; left > 0; left -= 1) {
      setText($("freshness"), `${words}${since} Next try in ${plural(left, "second")}.`);
      if (await this.#rest(1_000)) break;
    }
    setText($("freshness"), `${words}${since} Trying…`);
  }
}

new SwarmPage(pageConfig()).follow();
