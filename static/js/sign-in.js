/** The page that asks for a key before there is another one. */

import { pageConfig } from "./shared/dom.js";
import { KeyForm } from "./shared/key.js";
import { fetchState } from "./shared/swarm-state.js";
import { recall, remember } from "./shared/web-storage.js";

const ASKED = "asked-again";
const ONCE_MS = 10_000; // in this time no page is asked for twice

/** Whoever follows a link of another site comes without the cookie (SameSite=Strict). From here it goes along. */
async function askAgain() {
  if (pageConfig().key || Date.now() - recall("sessionStorage", ASKED) < ONCE_MS) return;
  try {
    await fetchState("");
  } catch {
    return; // not signed in
  }
  remember("sessionStorage", ASKED, String(Date.now()));
  location.replace(location.pathname);
}

document.body.dataset.state = "current";
new KeyForm(() => location.reload());
askAgain();
