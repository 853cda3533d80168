/** What a person asks for in the open chat. Each action returns whether it could be done. */

const noStats = () => ({ tokens: 0, events: [] });

export class Asking {
  #chats;
  #answering;
  #models;
  #page;

  /** @param {object} page `refresh()`, `follow()` the last message, `focus()` what is written, `view(id)` */
  constructor(chats, answering, models, page) {
    this.#chats = chats;
    this.#answering = answering;
    this.#models = models;
    this.#page = page;
  }

  get #open() {
    return this.#chats.open;
  }

  get possible() {
    return this.#models.ready && !this.#answering.run && !this.#answering.elsewhere;
  }

  send(text) {
    if (!this.possible) return false;
    let { last } = this.#open;
    if (!last) this.#chats.begin(text);
    // An imported chat may end with a question: it is asked along with this one.
    if (last?.role === "user") last = this.#open.add({ parent: last.id, role: "assistant", text: "", state: "failed", stats: {} });
    this.#page.follow();
    this.#ask(last?.id ?? null, text);
    return true;
  }

  #ask(parent, text) {
    this.#answer(this.#open.add({ parent, role: "user", text, state: "done" }));
  }

  #answer(question) {
    const fields = { role: "assistant", text: "", state: "running", stopSequence: null, stats: noStats() };
    this.#answering.write(this.#open.add({ parent: question.id, ...fields }));
  }

  regenerate(id) {
    if (!this.possible) return;
    const { tree } = this.#open;
    this.#answer(tree.get(tree.get(id).parent));
    this.#page.focus();
  }

  /**
   * Let the model write on where it ended or was cut off. What got no answer is asked again in its place: that is no branch
   * worth keeping.
   */
  proceed(id) {
    const answer = this.#open.tree.get(id);
    if (!answer || !this.possible) return;
    // Another model has its own way to end an answer.
    Object.assign(answer, { state: "running", stopSequence: null, model: this.#open.chat.model, error: null });
    if (!answer.text) answer.stats = noStats();
    this.#answering.write(answer);
    this.#page.focus();
  }

  async edit(id, text) {
    const before = this.#open;
    const { run } = this.#answering;
    if (run) {
      // Who asks something else does not want this answer.
      this.#page.stop();
      await run.ended;
    }
    const { parent, role, model } = before.tree.get(id) ?? {};
    if (this.#open !== before || !role || (role === "user" && !this.possible)) return false;
    if (role === "user") {
      this.#ask(parent, text);
      return true;
    }
    const edited = before.add({ parent, role, text, state: "done", stopSequence: null, model, stats: {} });
    await this.#chats.keep(before, [edited]);
    this.#page.refresh();
    return true;
  }

  editLast() {
    const question = this.#open.path.findLast(({ role }) => role === "user");
    if (question) this.#page.view(question.id).edit();
  }

  async select(id) {
    if (this.#answering.run || this.#answering.elsewhere) return;
    this.#open.tree.select(id);
    this.#page.refresh();
    this.#page.view(id).focusVersions();
    await this.#chats.keep(this.#open, []);
  }

  /** Let the model read from a later question on, below which an answer may be wanting. */
  async forget(id, from) {
    const answer = this.#open.tree.get(id);
    if (!answer || !this.possible) return;
    const { chat, path } = this.#open;
    // How long what is left of them is will be known with the next answer.
    for (const message of path) if (message.stats) message.stats.position = 0;
    chat.forgotten = from;
    await this.#chats.keep(this.#open, path);
    this.#page.refresh();
    if (answer.text) this.#page.focus();
    else this.proceed(id);
  }
}
