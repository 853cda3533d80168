/** The page. The only module that touches the DOM; text from the model enters it as text and never as markup. */

const AT_END_PX = 48; // this close to the end of the messages counts as reading along

const $ = (id) => document.getElementById(id);

function element(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export function pageConfig() {
  return JSON.parse($("config").textContent);
}

export class View {
  #prompt = $("prompt");
  #messages = $("messages");
  #canSend = false;
  #following = true;

  /** @param {{send(text: string): void, stop(): void, newChat(): void, selectModel(name: string): void}} actions */
  constructor(actions) {
    this.#listenToComposer(actions);
    $("new-chat").addEventListener("click", actions.newChat);
    $("model").addEventListener("change", (event) => actions.selectModel(event.target.value));
    document.addEventListener("keydown", (event) => event.key === "Escape" && actions.stop());
    this.#listenToScrolling();
  }

  /**
   * @param {"loading" | "ready" | "answering" | "error"} state
   * @param {string} status the same in words
   * @param {boolean} canSend whether a message can be sent
   */
  show(state, status, canSend) {
    const answering = state === "answering";
    document.body.dataset.state = state;
    this.status(status);
    this.#canSend = canSend;
    $("send").hidden = answering;
    $("stop").hidden = !answering;
    $("stop").disabled = false;
    this.#updateSend();
  }

  status(text) {
    if ($("status").textContent !== text) $("status").textContent = text;
  }

  /** Show that the wish to stop was heard; the answer may take a moment to end. */
  stopping() {
    $("stop").disabled = true;
    this.status("Stopping…");
  }

  /** The model that is in the selection, which a browser may have kept over a reload. */
  get selectedModel() {
    return $("model").value;
  }

  placeholder(text) {
    this.#prompt.placeholder = text;
  }

  /** Say it to those who listen to the page. */
  announce(text) {
    $("announcer").textContent = text;
  }

  addQuestion(text) {
    this.announce(""); // the next answer may be the same, and is to be told all the same
    this.#add("user", "You wrote", element("div", { className: "text", textContent: text }));
    this.follow();
  }

  /** @param {string} by the model's title */
  addAnswer(by) {
    const text = document.createTextNode("");
    const meta = element("p", { className: "meta" });
    const article = this.#add("assistant", `${by} answered`, element("div", { className: "text" }, text), meta);
    return new AnswerView({ article, text, meta }, () => this.#followIfFollowing());
  }

  /** Nothing in earlier messages can be acted on any longer. */
  retireNotices() {
    for (const button of this.#messages.querySelectorAll(".notice button")) button.remove();
  }

  clear() {
    for (const message of this.#messages.querySelectorAll(".message")) message.remove();
    $("empty").hidden = false;
    this.announce("");
    this.follow();
    this.focus();
  }

  focus() {
    // Where fingers are used, the focus would bring up a keyboard over half of the answer.
    if (matchMedia("(pointer: fine)").matches) this.#prompt.focus();
  }

  /** Scroll to the end, and stay there while text arrives, until the reader scrolls up. */
  follow() {
    this.#messages.scrollTop = this.#isEmpty ? 0 : this.#messages.scrollHeight;
    this.#setFollowing(true);
  }

  get #isEmpty() {
    return !$("empty").hidden;
  }

  #add(role, label, ...children) {
    $("empty").hidden = true;
    const article = element("article", { className: "message", ariaLabel: label }, ...children);
    article.dataset.role = role;
    this.#messages.append(article);
    this.#followIfFollowing();
    return article;
  }

  #listenToComposer({ send, stop }) {
    const submit = (text) => (send(text), this.focus());
    const submitPrompt = () => {
      const text = this.#prompt.value.trim();
      if (!this.#canSend || !text) return;
      this.#prompt.value = "";
      this.#promptChanged();
      submit(text);
    };
    $("composer").addEventListener("submit", (event) => (event.preventDefault(), submitPrompt()));
    this.#prompt.addEventListener("input", () => this.#promptChanged());
    this.#prompt.addEventListener("keydown", (event) => {
      // While an input method composes a character, Enter chooses it.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      submitPrompt();
    });
    $("stop").addEventListener("click", () => (stop(), this.focus()));
    for (const example of document.querySelectorAll(".example")) {
      example.addEventListener("click", () => submit(example.textContent));
    }
  }

  #listenToScrolling() {
    const list = this.#messages;
    const atEnd = () => list.scrollHeight - list.scrollTop - list.clientHeight < AT_END_PX;
    list.addEventListener("scroll", () => this.#setFollowing(atEnd()), { passive: true });
    $("latest").addEventListener("click", () => this.follow());
    new ResizeObserver(() => this.#followIfFollowing()).observe(list);
  }

  #promptChanged() {
    this.#prompt.style.height = "auto";
    this.#prompt.style.height = `${this.#prompt.scrollHeight}px`;
    this.#updateSend();
  }

  #updateSend() {
    $("send").disabled = !this.#canSend || !this.#prompt.value.trim();
    for (const example of document.querySelectorAll(".example")) example.disabled = !this.#canSend;
  }

  #setFollowing(following) {
    this.#following = following;
    $("latest").hidden = following || this.#isEmpty;
  }

  #followIfFollowing() {
    if (this.#following) this.follow();
  }
}

/** An answer on the page, from waiting for its first text to its end. */
class AnswerView {
  #parts;
  #grown;

  /** @param {() => void} grown called when the answer has become longer */
  constructor(parts, grown) {
    this.#parts = parts;
    this.#grown = grown;
    this.#setBusy(true);
  }

  append(text) {
    this.#parts.text.appendData(text);
    this.#grown();
  }

  meta(text) {
    this.#parts.meta.textContent = text;
    this.#grown();
  }

  end() {
    this.#setBusy(false);
  }

  /** Say something below the answer, with a button to do something about it. */
  notice(text, label, action) {
    const button = element("button", { type: "button", className: "quiet", textContent: label });
    button.addEventListener("click", action);
    const notice = element("div", { className: "notice", role: "alert" }, element("p", { textContent: text }), button);
    this.#parts.article.append(notice);
    this.#grown();
  }

  /** Wait for the answer anew. */
  restart() {
    this.#parts.text.data = "";
    this.meta("");
    this.#parts.article.querySelector(".notice")?.remove();
    this.#setBusy(true);
  }

  #setBusy(busy) {
    this.#parts.article.ariaBusy = String(busy);
  }
}
