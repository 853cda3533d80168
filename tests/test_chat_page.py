"""The chat page in a real browser, before the real app and a real swarm: everything that a person can do there."""

import contextlib
import dataclasses
import functools
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, expect
from transformers import PreTrainedTokenizerBase

from admission.keys import hash_key
from models.catalog import DIALOGUE, KNOWN_MODELS, ModelConfig
from swarm.local import LocalSwarm
from tests.conftest import LiveApp, serve, tiny_server
from tests.support.browser import axe_violations, open_browser
from tests.support.client import websocket
from tests.support.processes import ROOT
from tests.support.tiny import make_tiny_bloom, make_tokenizer
from tests.test_session import wait_until

QUESTION = "Who said that?"
TIMEOUT = 30_000  # milliseconds; a tiny model answers in less than one second on an idle machine
LONG_ANSWER = 440  # tokens; goes on after a page has come back, and fits into the session that a chat begins with
XSS = json.loads((ROOT / "tests/xss.json").read_text())
PAGE_KEY = "the long secret of the page"
ANSWER = "article[data-role=assistant]"
# The page sends what somebody has written between these.
PLAIN_BETWEEN = ["\ufdd2", "\ufdd3"]
UNMARKED = str.maketrans("", "", "".join(PLAIN_BETWEEN))
# Everything that the page has kept.
KEPT = """
() => new Promise((resolve, reject) => {
  const opening = indexedDB.open("petals-chat");
  opening.onerror = () => reject(opening.error);
  opening.onsuccess = () => {
    const transaction = opening.result.transaction(["chats", "messages"]);
    const chats = transaction.objectStore("chats").getAll();
    const messages = transaction.objectStore("messages").getAll();
    transaction.oncomplete = () => (opening.result.close(), resolve([chats.result, messages.result]));
  };
})
"""
AT_END = """
() => {
  const { scrollHeight, scrollTop, clientHeight } = document.getElementById("messages");
  return scrollHeight - scrollTop - clientHeight < 60;
}
"""
# What would have to be scrolled sideways.
TOO_WIDE = """
() => [...document.querySelectorAll("body, #chat, header, #messages, #composer, article")]
  .filter((node) => node.scrollWidth > node.clientWidth + 1)
  .map((node) => node.id || node.tagName)
"""
NOTE_SHIFTS = """
() => {
  window.shifts = [];
  const name = ({ node }) => node?.className ?? node?.nodeName;
  const note = ({ value, sources }) => window.shifts.push({ value, what: sources.map(name).join() });
  new PerformanceObserver((list) => list.getEntries().forEach(note)).observe({ type: "layout-shift" });
}
"""
RICH = """# Title

- [x] one
- two

| a | b |
|---|--:|
| 1 | 2 |

```python
def f(): return 'x'  # y
```

> a [link](https://example.org) $x^2$
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def chat_app(live_app: LiveApp) -> Iterator[LiveApp]:
    """The app, which computes one answer at a time, with a model whose sessions are short to begin with."""
    name = live_app.model_name
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KNOWN_MODELS, name, ModelConfig(name, DIALOGUE, title="Tiny", session_length=640))
        settings = dataclasses.replace(
            live_app.service.settings,
            WARM_SESSIONS=8,
            MAX_CONCURRENT_GENERATIONS=1,
            MAX_QUEUE=4,
            QUEUE_TIMEOUT=20.0,
            DRAFTING="off",  # what a tiny model repeats would be written before a person can press a button
        )
        with serve(settings) as live:
            yield live


class Proxy:
    """A way to the app that can be cut."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.open: list[socket.socket] = []
        self.refusing = threading.Event()
        self.refused = 0  # connections
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if self.refusing.is_set():
                client.close()
                self.refused += 1
                continue
            server = socket.create_connection(("127.0.0.1", self.target))
            self.open += [client, server]
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=ends, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # cut, or one side has gone: the other one is shut down below
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            # Closing alone would tell nobody while the other thread waits for data.
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def cut(self) -> None:
        """Let all connections break, as a network does."""
        while self.open:
            end = self.open.pop()
            with contextlib.suppress(OSError):  # it has ended before
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()
        self.cut()


class Chat:
    """What a person does on the page, and sees."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.sent: list[dict[str, Any]] = []
        self.errors: list[str] = []
        page.on("websocket", lambda ws: ws.on("framesent", lambda data: self.sent.append(json.loads(data))))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._note)

    def _note(self, message: ConsoleMessage) -> None:
        # Of the models here one has failed, which /readyz tells by its status; and Flask's own server, unlike gunicorn,
        # answers a WebSocket that was closed with a line of HTTP.
        expected = message.location["url"].endswith("/readyz") or message.text.endswith("Invalid frame header")
        if message.type == "error" and not expected:
            self.errors.append(message.text)

    @property
    def answers(self) -> Locator:
        return self.page.locator(ANSWER)

    def ready(self) -> None:
        expect(self.page.locator("body[data-state=ready]")).to_be_attached(timeout=TIMEOUT)

    def answering(self, minimum: int = 1) -> None:
        """Wait until an answer has so many tokens."""
        self.page.wait_for_function(
            "(minimum) => parseInt([...document.querySelectorAll('.meta')].at(-1)?.textContent) >= minimum",
            arg=minimum,
            timeout=TIMEOUT,
        )

    def resumed(self, times: int) -> None:
        """Wait until the page has taken up its session again, for the first time, the second time, ..."""

        def count() -> int:
            self.page.title()  # Playwright tells what was sent while it is asked for something
            return [message["type"] for message in self.sent].count("resume_inference_session")

        wait_until(lambda: count() == times, f"not resumed {times} times", timeout=TIMEOUT / 1000)

    def settle(self, **values: Any) -> None:
        """Change settings by hand."""
        self.page.click("#settings-button")
        for name, value in values.items():
            self.page.fill(f"#set-{name}" if name != "system" else "#system", str(value))
        self.page.click("#settings button:text-is('Done')")

    def ask(self, text: str = QUESTION, *, wait: bool = True) -> None:
        before = self.answers.count()
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")
        expect(self.answers).to_have_count(before + 1)
        if wait:
            expect(self.answers.last).to_have_attribute("aria-busy", "false", timeout=TIMEOUT)
            self.ready()

    def kept(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        chats, messages = self.page.evaluate(KEPT)
        return chats, sorted(messages, key=lambda message: message["created"])

    def texts(self, role: str = "assistant") -> list[str]:
        return [message["text"] for message in self.kept()[1] if message["role"] == role]

    def inputs(self) -> list[str]:
        """What the model was to read, without what tells apart who has written it."""
        return [message["inputs"].translate(UNMARKED) for message in self.sent if message["type"] == "generate"]


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(
        viewport={"width": 1100, "height": 760},
        color_scheme="light",
        permissions=["clipboard-read", "clipboard-write"],
        reduced_motion="reduce",  # drawing what moves takes a sixth of the processor's time
    )
    context.set_default_timeout(TIMEOUT)
    yield context
    context.close()


@pytest.fixture
def chat(context: BrowserContext, chat_app: LiveApp) -> Iterator[Chat]:
    chat = Chat(context.new_page())
    chat.page.goto(chat_app.url)
    chat.ready()
    chat.settle(temperature=0, max_answer_tokens=24)
    yield chat
    assert chat.errors == []


PROMPT = DIALOGUE.begin + DIALOGUE.user.replace("{text}", QUESTION)


@functools.cache
def completed(app: LiveApp, inputs: str, tokens: int) -> str:
    """How a program hears the model go on with a text, greedily."""
    with websocket(app.websocket_url) as ws:
        ws.open(1024)
        replies = ws.generate(inputs=inputs, max_new_tokens=1, stop_sequence=DIALOGUE.stop[0], max_answer_tokens=tokens)
    return "".join(reply["outputs"] for reply in replies)


# The conversation


def test_a_conversation(chat: Chat, chat_app: LiveApp) -> None:
    page = chat.page
    page.fill("#prompt", "two")
    page.press("#prompt", "Shift+Enter")
    page.keyboard.type("lines")
    page.press("#prompt", "Enter")
    expect(page.locator("article[data-role=user] .text")).to_have_text("two\nlines", use_inner_text=True)
    chat.ready()
    assert chat.texts() == [completed(chat_app, PROMPT.replace(QUESTION, "two\nlines"), 24)]
    expect(chat.answers.first.locator(".meta")).to_have_text(
        re.compile(r"^24 tokens · [\d.]+ tokens/s · first token after [\d.]+ s$")
    )
    expect(page.locator("#count")).to_have_text(re.compile(r"^\d+ of 2,048 tokens$"))
    chat.ask("And then?")
    # The second question goes to the same session, which has all that is before it.
    assert chat.inputs()[1].strip().startswith("Human: And then?")
    assert [message["type"] for message in chat.sent].count("open_inference_session") == 1
    chat.answers.first.hover()
    chat.answers.first.get_by_role("button", name="Copy", exact=True).last.click()
    assert page.evaluate("navigator.clipboard.readText()") == chat.texts()[0]


def test_branches(chat: Chat) -> None:
    page = chat.page
    chat.settle(temperature=1, seed=5)
    chat.ask("One question")
    chat.answers.first.get_by_role("button", name="Regenerate").click()
    chat.answering(24)
    chat.ready()
    first, second = chat.texts()
    assert first != second
    place = chat.answers.first.locator(".branches span")
    expect(place).to_have_text("2/2")
    chat.answers.first.get_by_role("button", name="Previous version").click()
    expect(place).to_have_text("1/2")
    # What is asked now follows the first answer.
    chat.ask("Next")
    sent = [message for message in chat.sent if message["type"] in ("generate", "open_inference_session")]
    assert first in sent[-1]["inputs"] and second not in sent[-1]["inputs"]
    question = page.locator("article[data-role=user]").first
    question.hover()
    question.get_by_role("button", name="Edit").click()
    question.locator("textarea").fill("Another question")
    question.locator("textarea").press("Enter")
    expect(page.locator("article[data-role=user]")).to_have_count(1)
    expect(page.locator("article[data-role=user] .text")).to_have_text("Another question")
    chat.ready()
    expect(page.locator("article[data-role=user] .branches span")).to_have_text("2/2")
    page.locator("article[data-role=user]").hover()
    page.locator("article[data-role=user]").get_by_role("button", name="Previous version").click()
    expect(page.locator("article")).to_have_count(4)
    page.reload()
    expect(page.locator("article")).to_have_count(4)
    expect(page.locator("article[data-role=user] .text").first).to_have_text("One question")
    # An answer that is edited is a branch as well, and what the model reads from then on.
    chat.ready()
    last = chat.answers.last
    last.get_by_role("button", name="Edit").click()
    last.locator("textarea").fill("My own words")
    last.get_by_role("button", name="Save").click()
    expect(chat.answers.last.locator(".text")).to_have_text("My own words")
    chat.ask("Well?")
    assert "AI:My own words" in chat.inputs()[-1]


def test_stop_and_continue(chat: Chat, chat_app: LiveApp) -> None:
    chat.settle(max_answer_tokens=300)
    chat.ask(wait=False)
    chat.answering(10)
    chat.page.click("#stop")
    expect(chat.answers.first.locator(".meta")).to_contain_text("stopped")
    chat.ready()
    (part,) = chat.texts()
    assert 0 < len(part) < len(completed(chat_app, PROMPT, 300))
    chat.settle(max_answer_tokens=40)
    chat.answers.first.get_by_role("button", name="Continue").click()
    chat.ready()
    wait_until(lambda: len(chat.texts()[0]) > len(part), "nothing was added")
    assert completed(chat_app, PROMPT, 340).startswith(chat.texts()[0])


def test_keys(chat: Chat) -> None:
    page = chat.page
    chat.settle(max_answer_tokens=900)
    chat.ask(wait=False)
    chat.answering(5)
    page.keyboard.press("Escape")
    expect(chat.answers.first.locator(".meta")).to_contain_text("stopped")
    chat.ready()
    page.press("#prompt", "ArrowUp")
    editor = page.locator("article[data-role=user] textarea")
    expect(editor).to_be_focused()
    expect(editor).to_have_value(QUESTION)
    page.keyboard.press("Escape")
    expect(editor).to_have_count(0)
    page.keyboard.press("Control+/")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    page.keyboard.press("Control+/")
    expect(page.get_by_role("dialog", name="Keys")).to_be_hidden()
    page.keyboard.press("Control+k")
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#prompt")).to_be_focused()
    # Everything can be reached with Tab alone, and says what it is.
    page.keyboard.press("Tab")
    names = set()
    for _ in range(30):
        names.add(page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent.trim()"))
        page.keyboard.press("Tab")
    for name in ("New chat  Ctrl K", "Search chats", "Import", "The swarm", "List of chats", "Settings of this chat"):
        assert any(name.split()[0] in each for each in names), (name, names)


def test_scrolling_follows_unless_the_reader_scrolls_up(chat: Chat) -> None:
    page = chat.page
    chat.settle(max_answer_tokens=700)
    page.set_viewport_size({"width": 400, "height": 420})
    chat.ask(wait=False)
    chat.answering(200)
    assert page.evaluate(AT_END)
    page.locator("#messages").hover()
    page.mouse.wheel(0, -400)
    expect(page.locator("#latest")).to_be_visible()
    where = page.evaluate("document.getElementById('messages').scrollTop")
    chat.answering(400)
    assert page.evaluate("document.getElementById('messages').scrollTop") <= where
    page.click("#latest")
    expect(page.locator("#latest")).to_be_hidden()
    chat.answering(500)
    assert page.evaluate(AT_END)
    page.click("#stop")
    chat.ready()


# Chats


def test_chats_are_kept(chat: Chat) -> None:
    page = chat.page
    chat.ask("About bees")
    page.click("#new-chat")
    chat.ask("About swarms")
    chats = page.locator("#chats .open")
    expect(chats).to_have_text(["About swarms", "About bees"])
    page.reload()
    chat.ready()
    expect(page.locator("h1")).to_have_text("About swarms")
    expect(page.locator("article")).to_have_count(2)
    chats.nth(1).click()
    expect(page.locator("article[data-role=user] .text")).to_have_text("About bees")
    # Where it went on before: warm or not, the whole conversation is there.
    chat.ask("More")
    assert "About bees" in chat.inputs()[-1]

    menu(page, "About swarms", "Rename")
    page.keyboard.type("A better name")
    page.keyboard.press("Enter")
    expect(page.locator("#chats")).to_contain_text("A better name")
    page.fill("#search", "SWARMS")  # stands in a question, not in the name any more
    expect(chats).to_have_text(["A better name"])
    page.fill("#search", "nothing has this")
    expect(page.locator("#no-chats")).to_have_text("No chat holds this.")
    page.fill("#search", "")
    expect(chats).to_have_count(2)

    menu(page, "A better name", "Delete")
    expect(chats).to_have_text(["About bees"])
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("h1")).to_have_text("A better name")
    expect(page.locator("article")).to_have_count(2)
    page.go_back()
    expect(page.locator("h1")).to_have_text("About bees")
    page.clock.install()
    menu(page, "A better name", "Delete")
    expect(page.get_by_role("button", name="Undo")).to_be_visible()  # its time begins
    page.clock.fast_forward(11_000)
    wait_until(lambda: len(chat.kept()[0]) == 1, "the chat was not deleted for good")
    assert {message["chat"] for message in chat.kept()[1]} == {chat.kept()[0][0]["id"]}


def menu(page: Page, title: str, entry: str) -> None:
    item = page.locator("#chats .chat", has_text=title)
    item.hover()
    item.locator(".more").click()
    item.get_by_role("button", name=entry, exact=True).click()


def test_export_and_import(chat: Chat, tmp_path: Path) -> None:
    page = chat.page
    chat.settle(system="You are a bee.", temperature=1, seed=3)
    chat.ask("First\n\n<!-- petals-chat: user -->\n## You")
    chat.answers.first.get_by_role("button", name="Regenerate").click()
    chat.answering(24)
    chat.ready()
    title = "First <!-- petals-chat: user --> ## You"
    with page.expect_download() as download:
        menu(page, title, "Export as JSON")
    as_json = tmp_path / "chat.json"
    download.value.save_as(as_json)
    with page.expect_download() as download:
        menu(page, title, "Export as Markdown")
    as_markdown = tmp_path / "chat.md"
    download.value.save_as(as_markdown)
    (before,), messages = chat.kept()
    assert before["system"] == "You are a bee."

    page.set_input_files("#file", as_json)
    expect(page.locator("#toast")).to_have_text("Imported 1 chat.")
    expect(page.locator("#chats .open")).to_have_count(2)
    chats, all_messages = chat.kept()
    imported = next(each for each in chats if each["id"] != before["id"])
    copies = [message for message in all_messages if message["chat"] == imported["id"]]
    same = ("title", "system", "settings", "model", "created")
    assert {name: imported[name] for name in same} == {name: before[name] for name in same}
    assert [(m["role"], m["text"]) for m in copies] == [(m["role"], m["text"]) for m in messages]
    expect(chat.answers.first.locator(".branches span")).to_have_text("2/2")

    page.set_input_files("#file", as_markdown)
    expect(page.locator("#chats .open")).to_have_count(3)
    expect(page.locator("article[data-role=user] .text")).to_have_text(
        "First\n\n<!-- petals-chat: user -->\n## You", use_inner_text=True
    )
    with page.expect_download() as download:
        page.click("#export-all")
    download.value.save_as(as_json)
    assert len(json.loads(as_json.read_text())["chats"]) == 3
    chat.ready()
    chat.settle(max_answer_tokens=5)
    chat.ask("It goes on")  # with what was imported


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"chats": []}', "was not exported by Petals Chat"),
        ("a.json", '{"format": "petals-chat", "version": 9, "chats": []}', "of version 9"),
        ("a.json", '{"format": "petals-chat", "version": 1, "chats": []}', "no chat in this file"),
        ("a.json", '{"format": "petals-chat", "version": 1, "chats": [7]}', "chat 1 must be an object"),
        (
            "a.json",
            '{"format": "petals-chat", "version": 1, "chats": [{"title": "t", "messages": [{"id": 1}]}]}',
            "chat 1, message 1: id must be a text",
        ),
        (
            "a.json",
            '{"format": "petals-chat", "version": 1, "chats": [{"title": "t", "messages": '
            '[{"id": "1", "parent": null, "role": "assistant", "text": ""}]}]}',
            "do not take turns",
        ),
        ("a.md", "# Only a title", "no line that tells whose a message is"),
        ("a.png", "\x89PNG", "no line that tells whose a message is"),
    ],
)
def test_files_that_cannot_be_imported(chat: Chat, tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    chat.page.set_input_files("#file", tmp_path / name)
    expect(chat.page.locator("#toast")).to_contain_text(f"{name} was not imported.")
    expect(chat.page.locator("#toast")).to_contain_text(reason)
    assert chat.kept() == ([], [])


# Nothing is lost


def test_reload_in_mid_answer(chat: Chat, chat_app: LiveApp) -> None:
    chat.settle(max_answer_tokens=LONG_ANSWER)
    chat.ask(wait=False)
    chat.answering(20)
    chat.page.reload()
    chat.resumed(1)
    chat.page.reload()
    expect(chat.answers.first).to_have_attribute("aria-busy", "false", timeout=TIMEOUT)
    chat.ready()
    assert chat.texts() == [completed(chat_app, PROMPT, LONG_ANSWER)]
    # The second time as well it was the same answer, and the session goes on after it.
    chat.resumed(2)
    assert len(chat.inputs()) == 1
    chat.settle(max_answer_tokens=5)
    chat.ask("And then?")
    assert chat.inputs()[-1].strip().startswith("Human: And then?")


def test_connection_lost_in_mid_answer(context: BrowserContext, chat_app: LiveApp) -> None:
    proxy = Proxy(int(chat_app.url.rpartition(":")[2]))
    chat = Chat(context.new_page())
    chat.page.goto(f"http://127.0.0.1:{proxy.port}")
    chat.ready()
    chat.settle(temperature=0, max_answer_tokens=LONG_ANSWER)
    chat.ask(wait=False)
    chat.answering(20)
    proxy.cut()
    chat.resumed(1)
    proxy.cut()
    chat.ready()
    assert chat.texts() == [completed(chat_app, PROMPT, LONG_ANSWER)]
    chat.resumed(2)
    proxy.close()


def test_an_answer_is_waited_for_as_long_as_it_is_kept(
    context: BrowserContext, chat_app: LiveApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server says how long it keeps an answer without its connection; a minute is only the default."""
    settings = dataclasses.replace(chat_app.service.settings, RESUME_TIMEOUT=300.0)
    monkeypatch.setattr(chat_app.service, "settings", settings)
    proxy = Proxy(int(chat_app.url.rpartition(":")[2]))
    chat = Chat(context.new_page())
    chat.page.clock.install()
    chat.page.goto(f"http://127.0.0.1:{proxy.port}")
    chat.ready()
    chat.settle(temperature=0, max_answer_tokens=LONG_ANSWER)
    chat.ask(wait=False)
    chat.answering(20)
    proxy.refusing.set()
    proxy.cut()
    expect(chat.page.locator("#status")).to_contain_text("The connection was lost")
    for _ in range(2):  # past the minute, and then past the wait for the server, after which the page looks at the time
        chat.page.clock.fast_forward(100_000)
        wait_until(lambda most=proxy.refused + 2: proxy.refused > most, "it has given up")
    proxy.refusing.clear()
    chat.ready()
    assert chat.texts() == [completed(chat_app, PROMPT, LONG_ANSWER)]
    proxy.close()


def test_answer_that_nobody_has_kept(chat: Chat, chat_app: LiveApp) -> None:
    chat.settle(max_answer_tokens=600)
    chat.ask(wait=False)
    chat.answering(40)
    wait_until(lambda: chat.texts()[0] != "", "nothing of the answer is kept")
    page = chat.page
    page.goto("about:blank")
    # The server gives the answer up, as it does when its time is over.
    for session_id in list(chat_app.service.sessions._sessions):
        chat_app.service.sessions.close(session_id)
    page.go_back()
    notice = chat.answers.first.locator(".notice")
    expect(notice).to_contain_text("The answer was interrupted")
    chat.settle(max_answer_tokens=60)
    (part,) = chat.texts()
    assert part
    notice.get_by_role("button", name="Continue").click()
    expect(chat.answers.first).to_have_attribute("data-state", "done")
    # Another session reads what there is of the answer, and goes on after it.
    assert chat.texts() == [part + completed(chat_app, PROMPT + part, 60)]


def test_two_windows(chat: Chat, context: BrowserContext, chat_app: LiveApp) -> None:
    chat.settle(max_answer_tokens=300)
    chat.ask(wait=False)
    chat.answering(10)
    other = Chat(context.new_page())
    other.page.goto(chat.page.url)
    expect(other.page.locator("#status")).to_have_text("Another window writes here")
    expect(other.page.locator("#send")).to_be_disabled()
    chat.ready()
    other.ready()
    assert chat.texts() == [completed(chat_app, PROMPT, 300)]
    assert not other.sent
    other.settle(max_answer_tokens=5)
    other.ask("From the other window")
    expect(chat.answers).to_have_count(2)
    menu(other.page, QUESTION, "Delete")
    expect(chat.page.locator("article")).to_have_count(0)
    expect(chat.page.locator("#toast")).to_contain_text("deleted in another window")


def test_another_model_does_not_end_the_wait_for_another_window(
    chat: Chat, context: BrowserContext, chat_app: LiveApp
) -> None:
    chat.settle(max_answer_tokens=600)
    chat.ask(wait=False)
    chat.answering(10)
    other = Chat(context.new_page())
    other.page.goto(chat.page.url)
    status = other.page.locator("#status")
    expect(status).to_have_text("Another window writes here")
    other.page.click("#model-button")
    for name in ("/nowhere/missing-model", chat_app.model_name):
        other.page.check(f"#models input[value='{name}']")
    other.page.keyboard.press("Escape")
    expect(status).to_have_text("Another window writes here")
    expect(other.page.locator("#send")).to_be_disabled()
    expect(chat.page.locator("#stop")).to_be_visible()  # it is still being written
    chat.page.click("#stop")
    other.ready()


def test_a_chat_that_cannot_be_read_is_not_taken_for_deleted(chat: Chat, context: BrowserContext) -> None:
    chat.ask()
    other = context.new_page()
    other.goto(chat.page.url)
    expect(other.locator("article")).to_have_count(2)
    other.evaluate("() => { IDBObjectStore.prototype.get = () => { throw new Error('the disk is gone'); }; }")
    chat.ask("Something that the other window is told of")
    expect(other.locator("#toast")).to_contain_text("could not keep or read your chats")
    expect(other.locator("h1")).to_have_text(QUESTION)
    expect(other.locator("article")).to_have_count(2)


def test_editing_while_an_answer_comes(chat: Chat) -> None:
    chat.settle(max_answer_tokens=600)
    chat.ask(wait=False)
    chat.answering(10)
    chat.page.press("#prompt", "ArrowUp")
    chat.settle(max_answer_tokens=5)
    chat.page.fill("article[data-role=user] textarea", "Something else")
    chat.page.press("article[data-role=user] textarea", "Enter")
    expect(chat.page.locator("article[data-role=user] .text")).to_have_text("Something else")
    chat.ready()
    expect(chat.page.locator("article[data-role=user] .branches span")).to_have_text("2/2")
    states = [message["state"] for message in chat.kept()[1] if message["role"] == "assistant"]
    assert states == ["stopped", "done"]


def test_answers_go_on_in_other_chats(chat: Chat, chat_app: LiveApp) -> None:
    page = chat.page
    chat.settle(max_answer_tokens=300)
    chat.ask(wait=False)
    chat.answering(10)
    page.click("#new-chat")
    expect(page.locator("#chats .answering")).to_have_count(1)
    expect(page.locator("#chats .answering")).to_have_count(0, timeout=TIMEOUT)
    page.locator("#chats .open").click()
    chat.ready()
    assert chat.texts() == [completed(chat_app, PROMPT, 300)]


def test_killed_server(context: BrowserContext, live_app: LiveApp, tiny_bloom: Path) -> None:
    with LocalSwarm() as local:
        for name in ("server-0", "server-1"):
            local.start_server(dataclasses.replace(tiny_server(tiny_bloom, "0:4"), public_name=name))
        settings = dataclasses.replace(
            live_app.service.settings, MODELS=(live_app.model_name,), INITIAL_PEERS=tuple(local.swarm.initial_peers)
        )
        with serve(settings) as app:
            state = app.service.models.find(app.model_name).loaded.state
            assert state.wait(lambda: len(state.servers()) == 2, 60)
            chat = Chat(context.new_page())
            chat.page.goto(app.url)
            chat.ready()
            chat.settle(temperature=0, max_answer_tokens=400)
            chat.ask(wait=False)
            chat.answering(30)
            route = chat.answers.first.locator(".route")
            expect(route).to_have_attribute("aria-label", re.compile("blocks 0–3 on server-[01]$"))
            used = int((route.get_attribute("aria-label") or "")[-1])
            local.servers[used].process.kill()
            healed = chat.answers.first.locator(".events .healed")
            expect(healed).to_contain_text(f"server-{used} with blocks 0–3 was lost")
            expect(healed).to_contain_text(f"server-{1 - used} took over")
            expect(route).to_have_attribute("aria-label", re.compile(f"server-{1 - used}$"))
            chat.ready()
            assert chat.texts() == [completed(app, PROMPT, 400)]


# Models and settings


def test_only_what_was_changed_is_sent(chat: Chat) -> None:
    page = chat.page
    page.click("#settings-button")
    page.click("#reset-all")
    page.fill("#set-max_answer_tokens", "12")
    page.click("#settings button:text-is('Done')")
    streaming = {"max_new_tokens", "stop_sequence", "extra_stop_sequences"}
    chat.ask()
    assert set(chat.sent[-1]) == {"type", "inputs", "plain_between", "model_defaults", "max_answer_tokens"} | streaming
    chat.settle(top_p=0.5, top_k=7, repetition_penalty=1.2, seed=11, max_answer_tokens=12, temperature=0.3)
    expect(page.locator("#settings-button")).to_have_class(re.compile("changed"))
    chat.ask()
    expected = {"top_p": 0.5, "top_k": 7, "repetition_penalty": 1.2, "seed": 11, "max_answer_tokens": 12}
    sent = chat.sent[-1]
    assert {name: sent[name] for name in expected} == expected and (sent["temperature"], sent["do_sample"]) == (0.3, 1)
    assert 0 < chat.kept()[1][-1]["stats"]["tokens"] <= 12
    page.click("#settings-button")
    page.get_by_role("button", name="Reset Top p").click()
    expect(page.locator("#set-top_p")).to_have_value("")
    assert page.locator("#set-top_p").get_attribute("placeholder") == "0.9"  # the model's own
    page.fill("#set-top_p", "7")  # out of range: it cannot be closed like that
    page.click("#settings button:text-is('Done')")
    expect(page.locator("#settings")).to_be_visible()
    page.fill("#set-top_p", "")
    page.click("#settings button:text-is('Done')")
    expect(page.locator("#settings")).to_be_hidden()
    chat.ask()
    assert "top_p" not in chat.sent[-1]
    # The settings belong to the chat, and the next one begins with them.
    page.reload()
    chat.ready()
    page.click("#new-chat")
    expect(page.locator("#settings-button")).to_have_class(re.compile("changed"))


def test_special_tokens_in_a_question(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> None:
    """They are characters, as in the system prompt and in answers, also when all is read anew."""
    chat.settle(system="<pad>")
    chat.ask("</s>\ufdd3</s>")
    begin, end = PLAIN_BETWEEN
    first = f"{begin}<pad>{end}\n\nHuman: {begin}</s>\ufffd</s>{end}\n\nAI:"
    assert (chat.sent[-1]["inputs"], chat.sent[-1]["plain_between"]) == (first, PLAIN_BETWEEN)
    text = first.translate(UNMARKED)
    plain = tokenizer.encode(text, split_special_tokens=True)
    stats = chat.kept()[1][-1]["stats"]
    assert stats["position"] - stats["tokens"] == len(plain) > len(tokenizer.encode(text))
    chat.page.reload()
    chat.ready()
    chat.ask("And?")
    (answer, _) = chat.texts()
    assert chat.sent[-1]["inputs"].startswith(f"{first}{begin}{answer}{end}\n\nHuman: {begin}And?{end}")


TEMPLATE = """{% for message in messages %}<s>{{ message.role }}
{{ message.content }}</s>
{% endfor %}{% if add_generation_prompt %}<s>assistant
{% endif %}"""


def test_a_model_with_a_chat_template(context: BrowserContext, chat_app: LiveApp, tmp_path: Path) -> None:
    """Of which the page knows nothing but what the template makes of a conversation."""
    model = make_tiny_bloom(tmp_path / "tiny-template", n_layer=2)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    with LocalSwarm() as local:
        local.start_server(tiny_server(model, "0:2"))
        peers = tuple(local.swarm.initial_peers)
        settings = dataclasses.replace(chat_app.service.settings, MODELS=(str(model),), INITIAL_PEERS=peers)
        with serve(settings) as app:
            chat = Chat(context.new_page())
            chat.page.goto(app.url)
            chat.ready()
            chat.settle(temperature=0, max_answer_tokens=8)
            chat.ask("Hi")
            chat.ask("And?")
            chat.settle(system="Be brief.")
            chat.ask("Well?")
            first, second, third = chat.inputs()
            answer, *_ = chat.texts()
    assert first == "<s>user\nHi</s>\n<s>assistant\n"
    assert "</s>\n<s>user\nAnd?</s>\n<s>assistant\n".endswith(second)
    assert third.startswith(f"<s>system\nBe brief.</s>\n<s>user\nHi</s>\n<s>assistant\n{answer}</s>\n<s>user\nAnd?</s>")
    assert chat.errors == []


def test_system_prompt(chat: Chat) -> None:
    chat.settle(system="You are $& a {text} bee.")
    chat.ask("Hello $1 {system}")
    assert chat.inputs() == ["You are $& a {text} bee.\n\nHuman: Hello $1 {system}\n\nAI:"]


def test_models(chat: Chat) -> None:
    page = chat.page
    page.click("#model-button")
    picker = page.get_by_role("dialog", name="Model")
    rows = picker.locator("#models li")
    expect(rows).to_have_count(2)
    expect(rows.first.locator(".state")).to_have_text("Ready")
    expect(rows.first.locator(".facts")).to_contain_text("reads 2,048 tokens")
    expect(rows.nth(1).locator(".state")).to_contain_text("The model does not answer: ")
    rows.nth(1).locator("input").check()
    picker.get_by_role("button", name="Done").click()
    expect(page.locator("body[data-state=error] #status")).to_contain_text("The model does not answer")
    expect(page.locator("#send")).to_be_disabled()
    page.click("#model-button")
    rows.first.locator("input").check()
    page.keyboard.press("Escape")
    chat.ready()
    chat.ask()


def test_sessions_grow_unnoticed(chat: Chat, chat_app: LiveApp) -> None:
    chat.settle(max_answer_tokens=600)
    chat.ask()
    _, grown = chat.inputs()
    assert chat.texts()[0].startswith(grown.removeprefix(PROMPT)) and grown.startswith(PROMPT)
    before, after = (message["max_answer_tokens"] for message in chat.sent if message["type"] == "generate")
    assert (before, grown + completed(chat_app, grown, after)) == (600, PROMPT + chat.texts()[0])
    assert chat.kept()[1][-1]["stats"]["tokens"] == 600
    lengths = [message["max_length"] for message in chat.sent if message["type"] == "open_inference_session"]
    assert lengths == [1024] or lengths == sorted(lengths) and len(lengths) > 1, lengths


def test_a_full_chat_offers_a_choice(chat: Chat, tmp_path: Path) -> None:
    page = chat.page
    long = "The quick brown fox jumps over the lazy dog. " * 75
    messages: list[dict[str, Any]] = [
        {"id": str(i), "parent": str(i - 1) if i else None, "role": role, "text": long, "stats": {"position": position}}
        for i, (role, position) in enumerate([("user", 0), ("assistant", 1500), ("user", 0), ("assistant", 2000)])
    ]
    for message, created in zip(messages, range(1, 9), strict=False):
        message["created"] = created
    file = tmp_path / "long.json"
    file.write_text(
        json.dumps({"format": "petals-chat", "version": 1, "chats": [{"title": "Long", "messages": messages}]})
    )
    page.set_input_files("#file", file)
    expect(page.locator("h1")).to_have_text("Long")
    chat.ready()
    chat.settle(temperature=0, max_answer_tokens=10)
    expect(page.locator("#tokens")).to_have_class(re.compile("nearly-full"))
    chat.ask(wait=False)
    notice = chat.answers.last.locator(".notice")
    expect(notice).to_contain_text("no room left for your message: the model can read 2,048 tokens")
    expect(notice.get_by_role("button", name="New chat")).to_be_visible()
    notice.get_by_role("button", name="Go on without the oldest messages").click()
    expect(page.locator(".boundary:visible")).to_have_count(1)
    chat.answering(10)
    chat.ready()
    assert chat.inputs()[-1].count(long) < 4
    page.reload()
    expect(page.locator(".boundary:visible")).to_have_count(1)
    # A chat that is full when it is opened offers the same.
    messages[-1]["stats"]["position"] = 2048
    file.write_text(
        json.dumps({"format": "petals-chat", "version": 1, "chats": [{"title": "Full", "messages": messages}]})
    )
    page.set_input_files("#file", file)
    expect(chat.answers.last.locator(".notice")).to_contain_text("This chat is full")
    page.reload()
    expect(chat.answers.last.locator(".notice")).to_contain_text("This chat is full")
    expect(page.locator("#send")).to_be_disabled()


def test_slow_answers_say_why(chat: Chat) -> None:
    page = chat.page
    chat.settle(max_answer_tokens=900)
    page.clock.install()
    chat.ask(wait=False)
    chat.answering(20)
    page.clock.fast_forward(200_000)
    notice = chat.answers.first.locator(".notice")
    expect(notice).to_contain_text("tokens a second. Each token passes 2 servers one after the other")
    assert notice.get_by_role("link", name="How to add a machine").get_attribute("href") == "swarm#add"
    page.click("#stop")
    chat.ready()


def test_place_in_the_queue(chat: Chat, chat_app: LiveApp) -> None:
    with websocket(chat_app.websocket_url) as ws:
        ws.open(1024)
        ws.send({"type": "generate", "inputs": "a", "max_new_tokens": 1, "stop_sequence": "never to be seen"})
        assert ws.receive()["ok"]
        chat.ask(wait=False)
        expect(chat.answers.first.locator(".note")).to_have_text("In the queue: you are next")
        ws.send({"type": "stop"})
        while not ws.receive()["stop"]:
            pass  # what was sent before it stopped
        chat.answering(24)
    expect(chat.answers.first.locator(".note")).to_be_empty()
    chat.ready()


def test_failures_are_shown_in_words_and_can_be_retried(chat: Chat, chat_app: LiveApp) -> None:
    sessions = chat_app.service.sessions
    places, sessions._places.places = sessions.max_sessions, 0
    sessions._places.timeout = 0.2
    try:
        chat.ask(wait=False)
        notice = chat.answers.first.locator(".notice")
        expect(notice).to_contain_text("The server says: all 0 inference sessions are taken")
    finally:
        sessions._places.places = places
        sessions._places.timeout = 20.0
    notice.get_by_role("button", name="Retry").click()
    chat.answering(24)
    chat.ready()
    expect(notice).to_have_count(0)
    expect(chat.answers).to_have_count(1)


def test_a_notice_is_said_once(chat: Chat, chat_app: LiveApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the page looked at its chat again the notice was another one: read out again, and without the focus."""
    hub = chat_app.app.extensions["petals_chat_websockets"].hub
    monkeypatch.setattr(hub, "limits", dataclasses.replace(hub.limits, max_message=1000))
    page = chat.page
    chat.ask("word " * 300, wait=False)
    notice = chat.answers.first.locator(".notice")
    expect(notice).to_contain_text("a message may have at most 1000 bytes")
    notice.evaluate("(node) => { window.notice = node; }")
    page.click("#model-button")
    for name in ("/nowhere/missing-model", chat_app.model_name):
        page.check(f"#models input[value='{name}']")
    page.keyboard.press("Escape")
    chat.ready()
    assert page.evaluate("window.notice.isConnected")
    monkeypatch.undo()
    notice.get_by_role("button", name="Retry").click()
    chat.answering()
    chat.ready()
    expect(notice).to_have_count(0)


def test_a_message_that_the_server_does_not_take_is_reported_once(
    chat: Chat, chat_app: LiveApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken for a lost connection, and sent again and again."""
    hub = chat_app.app.extensions["petals_chat_websockets"].hub
    monkeypatch.setattr(hub, "limits", dataclasses.replace(hub.limits, max_message=1000))
    chat.ask("word " * 300, wait=False)
    notice = chat.answers.first.locator(".notice")
    expect(notice).to_contain_text("a message may have at most 1000 bytes")


# Looks and access


def test_themes(chat: Chat) -> None:
    page = chat.page
    background = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    assert light != dark
    page.get_by_role("radio", name="Light").check()
    assert page.evaluate(background) == light
    page.reload()
    assert page.evaluate(background) == light
    expect(page.get_by_role("radio", name="Light")).to_be_checked()
    page.get_by_role("radio", name="System").check()
    assert page.evaluate(background) == dark
    page.emulate_media(reduced_motion="reduce")
    chat.ready()
    assert page.evaluate("document.getAnimations().length") == 0


@pytest.mark.parametrize("width", [360, 2560])
def test_widths(chat: Chat, width: int) -> None:
    page = chat.page
    chat.ask("مرحبا بالعالم " * 30 + "verylongword" * 60)
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate(TOO_WIDE) == []
    text = page.locator("article[data-role=user] .text")
    assert text.evaluate("(node) => getComputedStyle(node).direction") == "rtl"
    if width == 360:
        expect(page.locator("#sidebar")).to_be_hidden()
        page.click("#toggle-sidebar")
        expect(page.locator("#chats .open")).to_be_visible()
        assert page.evaluate("document.getElementById('chat').inert")
        page.keyboard.press("Escape")
        expect(page.locator("#sidebar")).to_be_hidden()
        expect(page.locator("#toggle-sidebar")).to_be_focused()


def test_on_a_narrow_screen(chat: Chat) -> None:
    page = chat.page
    chat.ask("A question that is long enough to fill a line that says that its chat was deleted")
    page.set_viewport_size({"width": 360, "height": 740})
    page.click("#settings-button")
    # No name of a setting reaches under its field.
    names = page.locator(".parameter label")
    assert names.evaluate_all("(labels) => labels.every((label) => label.scrollWidth <= label.clientWidth)")
    page.keyboard.press("Escape")
    page.click("#toggle-sidebar")
    page.locator("#chats .more").click()
    entries = page.locator(".menu:popover-open")
    expect(entries).to_be_visible()
    page.keyboard.press("Escape")
    expect(entries).to_have_count(0)
    expect(page.locator("#sidebar")).to_be_visible()  # Escape closes one thing at a time
    menu(page, "A question", "Delete")
    toast = page.locator("#toast")
    expect(toast).to_contain_text("Deleted")
    assert toast.evaluate("(node) => node.getBoundingClientRect().width") == 328  # all but its margins
    latest = page.locator("#latest")  # hidden in an empty chat
    top = latest.evaluate("(node) => { node.hidden = false; return node.getBoundingClientRect().top; }")
    assert toast.evaluate("(node) => node.getBoundingClientRect().bottom") <= top


def test_nothing_jumps_while_an_answer_comes(chat: Chat) -> None:
    page = chat.page
    chat.settle(max_answer_tokens=150)
    page.evaluate(NOTE_SHIFTS)
    chat.ask()
    assert sum(shift["value"] for shift in page.evaluate("window.shifts")) < 0.01, page.evaluate("window.shifts")


def test_the_answer_is_said_to_screen_readers(chat: Chat) -> None:
    chat.ask()
    said = "".join(chat.page.locator("#announcer").inner_text().split())
    (text,) = chat.texts()
    assert said == "Ready" + "".join(text.split())
    assert chat.page.locator("#announcer").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_obstacles(chat: Chat, scheme: Any, tmp_path: Path) -> None:
    page = chat.page
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    assert axe_violations(page) == []
    file = tmp_path / "rich.json"
    messages = [
        {"id": "q", "parent": None, "role": "user", "text": "?", "created": 1},
        {"id": "a", "parent": "q", "role": "assistant", "text": RICH, "created": 2, "state": "interrupted"},
    ]
    file.write_text(
        json.dumps({"format": "petals-chat", "version": 1, "chats": [{"title": "Rich", "messages": messages}]})
    )
    page.set_input_files("#file", file)
    expect(page.locator(".katex").first).to_be_visible()
    chat.ready()
    chat.settle(max_answer_tokens=5)
    chat.ask()
    assert axe_violations(page) == []
    for opener in ("#settings-button", "#model-button"):
        page.click(opener)
        assert axe_violations(page) == []
        page.keyboard.press("Escape")
    page.keyboard.press("Control+/")
    assert axe_violations(page) == []
    page.keyboard.press("Escape")
    page.set_viewport_size({"width": 360, "height": 700})
    page.click("#toggle-sidebar")
    assert axe_violations(page) == []


def test_weight_and_outside_requests(context: BrowserContext, chat_app: LiveApp) -> None:
    page = context.new_page()
    sizes: dict[str, int] = {}  # bytes that are sent
    page.on("requestfinished", lambda request: sizes.__setitem__(request.url, request.sizes()["responseBodySize"]))
    chat = Chat(page)
    page.goto(chat_app.url)
    chat.ready()
    chat.settle(temperature=0, max_answer_tokens=24)
    chat.ask()
    assert all(url.startswith(chat_app.url) for url in sizes)
    code = {url: size for url, size in sizes.items() if re.search(r"\.(js|css)$", url)}
    assert any("marked" in url for url in code)
    assert not any("katex" in url or "/vendor/highlight" in url for url in code)  # only when they are needed
    # What a person may come to need as well, but for math and highlighting.
    others = sum(
        len(chat_app.app.test_client().get(f"/static/js/{name}", headers={"Accept-Encoding": "gzip"}).data)
        for name in ("chat/transfer.js",)
        if not any(url.endswith(name) for url in code)
    )
    assert sum(code.values()) + others < 100_000, code


# Safety


def test_text_can_do_no_harm(chat: Chat, tmp_path: Path) -> None:
    page = chat.page
    page.on("dialog", lambda dialog: chat.errors.append(f"dialog: {dialog.message}"))
    messages: list[dict[str, Any]] = []
    for text in XSS:
        for role in ("user", "assistant"):
            number = len(messages)
            parent = str(number - 1) if number else None
            messages.append({"id": str(number), "parent": parent, "role": role, "text": text, "created": number + 1})
            messages[-1]["model"] = text
    chats = [{"title": text, "model": text, "messages": messages[:2]} for text in XSS]
    chats[0]["messages"] = messages
    file = tmp_path / "xss.json"
    file.write_text(json.dumps({"format": "petals-chat", "version": 1, "chats": chats}))
    before = page.url
    page.set_input_files("#file", file)
    items = page.locator("#chats .chat")
    expect(items).to_have_count(len(XSS))
    expect(page.locator(ANSWER)).to_have_count(len(XSS))
    with page.expect_download() as download:
        items.first.scroll_into_view_if_needed()
        items.first.hover()
        items.first.locator(".more").click()
        page.locator(".menu:popover-open").get_by_text("Export as Markdown").click()
    download.value.save_as(tmp_path / "xss.md")
    page.set_input_files("#file", tmp_path / "xss.md")
    expect(items).to_have_count(len(XSS) + 1)
    assert page.evaluate("window.__xss") is None
    assert page.url.split("#")[0] == before.split("#")[0]
    assert page.locator("#messages :is(script, iframe, object, embed, img, form, style)").count() == 0


def test_content_security_policy(chat_app: LiveApp) -> None:
    for path in ("/", "/swarm"):
        policy = chat_app.app.test_client().get(path).headers["Content-Security-Policy"]
        directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
        assert directives["default-src"] == "'none'"
        assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"
        assert "unsafe" not in policy


# A key


@pytest.fixture(scope="module")
def keyed_app(live_app: LiveApp, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApp]:
    """The app with API keys, for which its page asks."""
    name = live_app.model_name
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps([{"key": PAGE_KEY, "name": "page", "models": ["*"]}]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KNOWN_MODELS, name, ModelConfig(name, DIALOGUE, title="Tiny", session_length=640))
        settings = dataclasses.replace(
            live_app.service.settings, MODELS=(name,), NON_PUBLIC_MODELS=(name,), API_KEYS_FILE=str(keys)
        )
        with serve(settings) as live:
            yield live


def sign_in(page: Page, key: str) -> None:
    page.fill("#key", key)
    page.press("#key", "Enter")


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (360, "dark")])
def test_the_page_asks_for_a_key(
    context: BrowserContext, keyed_app: LiveApp, width: int, scheme: Literal["light", "dark"]
) -> None:
    page = context.new_page()
    page.set_viewport_size({"width": width, "height": 640})
    page.emulate_media(color_scheme=scheme)
    page.goto(keyed_app.url)
    expect(page.locator("#key")).to_be_focused()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert axe_violations(page) == []
    sign_in(page, "wrong")
    expect(page.get_by_role("alert")).to_have_text("This key is not known here.")
    expect(page.locator("#key")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#key")).to_be_focused()
    assert axe_violations(page) == []
    sign_in(page, f" {PAGE_KEY} ")
    chat = Chat(page)
    chat.ready()
    assert page.evaluate("document.cookie") == ""  # no script reads it
    chat.settle(temperature=0, max_answer_tokens=8)
    chat.ask()
    assert not any(message.get("page_token") for message in chat.sent)
    page.reload()  # once is enough
    chat.ready()
    page.goto(f"{keyed_app.url}/swarm")
    expect(page.locator(".model")).to_have_count(1)
    page.goto(keyed_app.url)
    chat.ready()
    if width == 360:
        page.click("#toggle-sidebar")
    page.click("#sign-out")
    expect(page.locator("#key")).to_be_visible()
    page.goto(f"{keyed_app.url}/swarm")
    expect(page.locator("#key")).to_be_visible()
    assert [error for error in chat.errors if "401" not in error] == []


def test_a_link_of_another_site_leads_to_the_page(context: BrowserContext, keyed_app: LiveApp) -> None:
    """Its request has no cookie; who is signed in is not asked again for all that."""
    page = context.new_page()
    page.goto(keyed_app.url)
    sign_in(page, PAGE_KEY)
    Chat(page).ready()
    page.goto(keyed_app.url.replace("127.0.0.1", "localhost"))  # another site, with the same app
    expect(page.locator("#key")).to_be_visible()
    page.evaluate("(url) => { location.href = url; }", keyed_app.url)
    Chat(page).ready()


def signed_in(context: BrowserContext, app: LiveApp) -> Chat:
    """A chat whose page has its key."""
    page = context.new_page()
    page.goto(app.url)
    sign_in(page, PAGE_KEY)
    chat = Chat(page)
    chat.ready()
    return chat


@contextlib.contextmanager
def revoked_key(app: LiveApp, secret: str) -> Iterator[None]:
    """Let another secret be the page's key for the time of a block."""
    access = app.service.access
    keys = access._keys
    try:
        access._keys = [dataclasses.replace(keys[0], digest=hash_key(secret))]
        yield
    finally:
        access._keys = keys


def test_a_key_that_is_revoked_in_mid_use_loses_nothing(context: BrowserContext, keyed_app: LiveApp) -> None:
    chat = signed_in(context, keyed_app)
    page = chat.page
    chat.settle(temperature=0, max_answer_tokens=8)
    with revoked_key(keyed_app, "another long secret"):
        chat.ask(wait=False)
        dialog = page.locator("#key-dialog")
        expect(dialog).to_be_visible()
        expect(page.locator("#key")).to_be_focused()
        assert axe_violations(page) == []
        page.click("#key-later")  # and again when it is tried again
        expect(dialog).to_be_hidden()
        page.get_by_role("button", name="Retry").click()
        expect(dialog).to_be_visible()
        sign_in(page, PAGE_KEY)
        expect(page.locator("#key-trouble")).to_have_text("This key is not known here.")
        sign_in(page, "another long secret")
        expect(dialog).to_be_hidden()
        expect(chat.answers.last.locator(".meta")).to_have_text(re.compile("^8 tokens"))
        chat.ready()
        assert (len(chat.texts("user")), len(chat.texts())) == (1, 1)
    assert [error for error in chat.errors if "401" not in error] == []


def test_who_puts_off_the_key_is_left_alone(context: BrowserContext, keyed_app: LiveApp) -> None:
    """The dialog came back whenever the page looked at its chat again."""
    chat = signed_in(context, keyed_app)
    page = chat.page
    dialog = page.locator("#key-dialog")
    asked: list[str] = []  # before the dialog opens the page asks the server whether it wants a key
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/state") else None)
    with revoked_key(keyed_app, "another long secret"):
        chat.ask(wait=False)
        page.click("#key-later")
        page.press("#prompt", "ArrowUp")
        page.fill("article[data-role=user] textarea", "Something else")
        page.press("article[data-role=user] textarea", "Enter")
        page.click("#key-later")
        asked.clear()
        page.locator("article[data-role=user]").hover()
        page.get_by_role("button", name="Previous version").first.click()
        expect(page.locator("article[data-role=user] .text")).to_have_text(QUESTION)
        expect(chat.answers.last.locator(".notice")).to_contain_text("did not accept the key of this page")
        page.evaluate("fetch('healthz').then((response) => response.text())")
        assert asked == []
        expect(dialog).to_be_hidden()


def test_an_open_page_never_asks_for_a_key(chat: Chat) -> None:
    assert chat.page.locator("#key-form, #key-dialog, #sign-out").count() == 0
