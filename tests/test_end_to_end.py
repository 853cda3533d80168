"""The whole product as a new user meets it: started as `make run` does, SmolLM2 answers over HTTP and in a browser."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.support.browser import browser_page
from tests.support.client import call, websocket
from tests.support.processes import Program

QUESTION = "What is the capital of France?"
# SmolLM2's chat format, as the README shows it.
INPUTS = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
ANSWER_TIMEOUT = 60_000  # milliseconds; an answer takes about a second on two idle cores
# Lets the page take the likeliest tokens: what a model so small samples may be anything, and without an end.
WITHOUT_SAMPLING = """
const send = WebSocket.prototype.send;
WebSocket.prototype.send = function (message) {
  send.call(this, message.replace('"model_defaults":true,', ""));
};
"""


@pytest.fixture
def page(default_program: Program) -> Iterator[Page]:
    with browser_page() as page:
        page.add_init_script(WITHOUT_SAMPLING)
        page.goto(default_program.url)
        yield page


def test_http(default_program: Program) -> None:
    form = {"inputs": INPUTS, "max_new_tokens": 16}
    status, _, body = call(default_program.url, "/api/v1/generate", form=form)
    assert (status, body) == (200, {"ok": True, "outputs": "The capital of France is Paris."})


def test_websocket(default_program: Program) -> None:
    with websocket(default_program.url.replace("http", "ws") + "/api/v2/generate") as ws:
        ws.open(512)
        replies = ws.generate(inputs=INPUTS, max_new_tokens=1, stop_sequence="<|im_end|>")
        assert "".join(reply["outputs"] for reply in replies) == "The capital of France is Paris."


def test_chat_in_the_browser(page: Page) -> None:
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    expect(page.locator("body[data-state=ready]")).to_be_attached(timeout=ANSWER_TIMEOUT)
    page.fill("#prompt", QUESTION)
    page.press("#prompt", "Enter")
    answers = page.locator("article.message[data-role=assistant]")
    expect(answers.first.locator(".text")).to_contain_text("Paris", timeout=ANSWER_TIMEOUT)
    expect(answers.first.locator(".meta")).to_contain_text("tokens/s", timeout=ANSWER_TIMEOUT)
    expect(page.locator("#model")).to_contain_text("SmolLM2-135M-Instruct")
    expect(page.locator("body[data-state=ready]")).to_be_attached(timeout=ANSWER_TIMEOUT)
    page.fill("#prompt", "What is the capital of Germany?")
    page.click("#send")
    expect(answers.nth(1).locator(".text")).to_contain_text("Berlin", timeout=ANSWER_TIMEOUT)
    if path := os.environ.get("SCREENSHOT"):
        page.screenshot(path=Path(path))
    assert errors == []


def test_stop_and_new_chat_in_the_browser(page: Page) -> None:
    expect(page.locator("body[data-state=ready]")).to_be_attached(timeout=ANSWER_TIMEOUT)
    page.fill("#prompt", "Write a very long story about a river, with many chapters.")
    page.click("#send")
    answer = page.locator("article.message[data-role=assistant] .text")
    expect(answer).not_to_be_empty(timeout=ANSWER_TIMEOUT)
    page.click("#stop")
    expect(page.locator("body[data-state=ready]")).to_be_attached(timeout=ANSWER_TIMEOUT)
    page.fill("#prompt", QUESTION)
    page.press("#prompt", "Enter")
    expect(page.locator("article.message[data-role=assistant]")).to_have_count(2, timeout=ANSWER_TIMEOUT)
    page.keyboard.press("Escape")  # without effect if the answer has ended
    expect(page.locator("body[data-state=ready]")).to_be_attached(timeout=ANSWER_TIMEOUT)
    page.click("#new-chat")
    expect(page.locator("article.message")).to_have_count(0)
