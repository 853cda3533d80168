"""One way to run an answer: what holds for it is the same through every door."""

import dataclasses
import logging
from collections.abc import Callable, Iterator

import pytest

from admission.callers import Usage
from generation.parameters import GenerationParams
from openai_api.answers import Answers, Task
from swarm.waiter import PATIENT
from tests.conftest import LiveApp
from tests.support.client import websocket
from tests.test_http_api import generated
from tests.test_openai_api import ENDLESS, complete
from tests.test_session import wait_until

PROMPT, TOKENS = "The quick brown fox", 6


@pytest.fixture
def texts_are_logged(live_app: LiveApp, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    settings = dataclasses.replace(live_app.service.settings, LOG_TEXTS=True)
    monkeypatch.setattr(live_app.service, "settings", settings)
    yield


def over_http(app: LiveApp) -> list[str]:
    return [generated(app, inputs=PROMPT, max_new_tokens=TOKENS)]


def over_websocket(app: LiveApp) -> list[str]:
    with websocket(app.websocket_url) as ws:
        ws.open()
        # In rounds: several responses, and one answer.
        replies = ws.generate(inputs=PROMPT, max_new_tokens=2, stop_sequence="\0", max_answer_tokens=TOKENS)
        assert len(replies) > 1
        return ["".join(reply["outputs"] for reply in replies)]


def over_openai(app: LiveApp) -> list[str]:
    body = {"model": app.model_name, "prompt": PROMPT, "max_tokens": TOKENS, "logit_bias": ENDLESS}
    return [choice["text"] for choice in complete(app, n=2, **body)["choices"]]


@pytest.mark.usefixtures("texts_are_logged")
@pytest.mark.parametrize("ask", [over_http, over_websocket, over_openai])
def test_texts_are_logged_alike(
    live_app: LiveApp, caplog: pytest.LogCaptureFixture, ask: Callable[[LiveApp], list[str]]
) -> None:
    """The prompt once, and each answer as one line, if the operator wants that."""
    with caplog.at_level(logging.INFO, "service"):
        answers = ask(live_app)
        # The client has the last of it a moment before the answer has ended here.
        wait_until(lambda: sum("outputs" in line for line in caplog.messages) >= len(answers), "nothing was logged")
    lines = [line for line in caplog.messages if line.startswith(("inputs: ", "outputs: "))]
    assert lines == [f"inputs: {PROMPT!r}", *(f"outputs: {answer!r}" for answer in answers)]


@pytest.mark.parametrize("ask", [over_http, over_websocket, over_openai])
def test_texts_are_not_logged_unless_asked_for(
    live_app: LiveApp, caplog: pytest.LogCaptureFixture, ask: Callable[[LiveApp], list[str]]
) -> None:
    with caplog.at_level(logging.DEBUG):
        ask(live_app)
    assert not any(PROMPT in record.getMessage() for record in caplog.records if record.name == "service")


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize(("scored", "budget"), [(False, 3), (True, 3), (True, 0)])
def test_all_tokens_of_prompt_and_answers_are_spent(
    live_app: LiveApp, monkeypatch: pytest.MonkeyPatch, scored: bool, budget: int, choices: int
) -> None:
    service, spent = live_app.service, list[int]()
    caller, model = service.access.caller(None), service.models.find(live_app.model_name).loaded
    monkeypatch.setattr(caller, "reserve", lambda tokens, least: Usage(spent.append))
    token_ids = model.tokenizer.encode(f"Nobody has said {scored} {budget} {choices}")
    params = GenerationParams(logprobs=0 if scored else None, logit_bias=((2, -100.0),))
    task = Task(token_ids, budget, 64, params, choices, scored, keep_warm=False)
    assert list(Answers(service, caller, model, [task], PATIENT).events())
    wait_until(lambda: spent != [], "the usage was not closed")
    assert spent == [len(token_ids) + budget * choices]
