/** The API key that the page asks for once. The server keeps whose it is in a cookie, which no script can read. */

import { $, setText } from "./dom.js";
import { fetchState } from "./swarm-state.js";

const PATH = "page/key";
const LIMIT_MS = 10_000;

/** The form of templates/key_form.html. */
export class KeyForm {
  /** @param {() => void} onSignedIn called each time that a key was accepted */
  constructor(onSignedIn) {
    $("key-form").addEventListener("submit", async (event) => {
      event.preventDefault();
      $("key-send").disabled = true;
      const trouble = await signIn($("key").value.trim());
      $("key-send").disabled = false;
      this.#say(trouble);
      if (trouble) {
        $("key").focus();
        $("key").select();
      } else {
        $("key").value = "";
        onSignedIn();
      }
    });
    $("key").addEventListener("input", () => this.#say(""));
  }

  #say(trouble) {
    $("key").ariaInvalid = trouble ? "true" : null;
    setText($("key-trouble"), trouble);
  }
}

let dialog = null;
let then = null; // what to do once a key was accepted

/**
 * Ask for a key in a dialog over the chat, if the server wants one: somebody may have signed in meanwhile.
 *
 * @param {() => void} action what to do once a key was accepted
 */
export async function askForKey(action) {
  try {
    await fetchState("");
  } catch (error) {
    if (error.status !== 401) return;
    then = action;
    dialog ??= wire($("key-dialog"));
    if (!dialog.open) dialog.showModal();
  }
}

function wire(node) {
  new KeyForm(() => {
    node.close();
    then();
  });
  $("key-later").addEventListener("click", () => node.close());
  return node;
}

/** @returns {Promise<string>} why it is not accepted; empty: it is */
async function signIn(key) {
  if (!navigator.cookieEnabled) return "This browser keeps no cookies for this page, and so no key.";
  try {
    const response = await ask("POST", JSON.stringify({ key }));
    if (response.ok) return "";
    if (response.status === 401) return "This key is not known here.";
    if (response.status === 429) return `Too many tries. Try again in ${response.headers.get("Retry-After") ?? "some"} seconds.`;
    const body = await response.json().catch(() => null); // a proxy's own page is no JSON
    return body?.error?.message ?? `The server answered ${response.status}.`;
  } catch {
    return "The server cannot be reached.";
  }
}

/** Let the browser forget the key. The chats stay. */
async function signOut() {
  try {
    const response = await ask("DELETE");
    if (response.ok) location.reload();
    else setText($("sign-out"), `Not signed out: ${response.status}`);
  } catch {
    setText($("sign-out"), "Not signed out: no server");
  }
}

function ask(method, body) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  return fetch(PATH, { method, headers, body, signal: AbortSignal.timeout(LIMIT_MS), cache: "no-store" });
}

$("sign-out")?.addEventListener("click", signOut);
