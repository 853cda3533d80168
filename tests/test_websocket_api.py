"""The WebSocket API through its real door, with somebody else's client."""

import dataclasses
import itertools
import logging

import pytest

from swarm.client import SwarmModel
from tests.client import websocket
from tests.conftest import LiveApp
from tests.test_http_api import generated
from tests.test_session import free_cache, settled_cache, wait_until

PROMPTS = ["The quick brown fox", "Ein Schwarm", "分散された大規模", "блоки модели", "a b c", "Nobody, said"]


def test_one_answer_without_a_stop_sequence(live_app: LiveApp) -> None:
    with websocket(live_app.websocket_url) as ws:
        ws.open(64)
        (reply,) = ws.generate(inputs=PROMPTS[0], max_new_tokens=12)
    assert reply["ok"] and reply["stop"] is True
    assert reply["outputs"] == generated(live_app, inputs=PROMPTS[0], max_new_tokens=12)


@pytest.mark.parametrize(("prompt", "size"), list(itertools.product(PROMPTS, (1, 3))))
def test_streamed_equals_unstreamed(live_app: LiveApp, prompt: str, size: int) -> None:
    """Rounds of ``size`` tokens until a stop sequence, against one response of many tokens."""
    whole = generated(live_app, inputs=prompt, max_new_tokens=40)
    stop = whole[len(whole) * 2 // 3 :][:4] or "\n"
    expected = whole[: whole.index(stop)] if stop in whole else None
    with websocket(live_app.websocket_url) as ws:
        ws.open(128)
        replies = ws.generate(
            inputs=prompt, max_new_tokens=size, stop_sequence=stop, extra_stop_sequences=["never to be seen"]
        )
    text = "".join(reply["outputs"] for reply in replies)
    assert [reply["stop"] for reply in replies] == [False] * (len(replies) - 1) + [True]
    assert all(reply["token_count"] == size for reply in replies[:-1])
    if expected is not None:
        assert text == expected
        assert (replies[-1]["finish_reason"], replies[-1]["stop_sequence"]) == ("stop", stop)
    with websocket(live_app.websocket_url) as ws:
        ws.open(128)
        unstreamed = ws.generate(inputs=prompt, max_new_tokens=120, stop_sequence=stop)
    assert text == "".join(reply["outputs"] for reply in unstreamed)


def test_stream_ends_where_the_session_is_full(live_app: LiveApp) -> None:
    with websocket(live_app.websocket_url) as ws:
        ws.open(32)
        replies = ws.generate(inputs="a b c", max_new_tokens=1, stop_sequence="never to be seen")
        assert replies[-1]["finish_reason"] in ("length", "stop")
        if replies[-1]["finish_reason"] == "length":
            (reply,) = ws.generate(max_new_tokens=1)
            assert reply["error"]["code"] == "too_long"


def test_several_answers_in_one_session(live_app: LiveApp) -> None:
    with websocket(live_app.websocket_url) as ws:
        ws.open(128)
        parts = [ws.generate(inputs=PROMPTS[0], max_new_tokens=10)[0]["outputs"]]
        parts += [ws.generate(max_new_tokens=10)[0]["outputs"] for _ in range(3)]
    assert "".join(parts) == generated(live_app, inputs=PROMPTS[0], max_new_tokens=40)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("{broken", "invalid_parameter"),
        ("[]", "invalid_parameter"),
        ("", "invalid_parameter"),
        (b"\x00\x01", "invalid_parameter"),
        ({"type": "nonsense"}, "invalid_parameter"),
        ({}, "invalid_parameter"),
        ({"type": "open_inference_session", "max_length": 8}, "invalid_parameter"),  # a second time
        ({"type": "generate", "inputs": "a"}, "invalid_parameter"),
        ({"type": "generate", "inputs": "a", "max_new_tokens": -1}, "invalid_parameter"),
        ({"type": "generate", "inputs": "a", "max_new_tokens": 10**9}, "too_long"),
        ({"type": "generate", "inputs": {"a": 1}, "max_new_tokens": 1}, "invalid_parameter"),
        ({"type": "generate", "inputs": "a", "max_new_tokens": 1, "stop_sequence": 5}, "invalid_parameter"),
        ({"type": "generate", "inputs": "a", "max_new_tokens": 1, "extra_stop_sequences": [1]}, "invalid_parameter"),
    ],
)
def test_bad_message_leaves_the_session_usable(live_app: LiveApp, message: object, code: str) -> None:
    whole = generated(live_app, inputs=PROMPTS[0], max_new_tokens=10)
    with websocket(live_app.websocket_url) as ws:
        ws.open(64)
        text = ws.generate(inputs=PROMPTS[0], max_new_tokens=5)[0]["outputs"]
        reply = ws.ask(message)
        assert (reply["ok"], reply["error"]["code"]) == (False, code), reply
        assert reply["error"]["message"] and reply["traceback"].startswith("Traceback")
        text += ws.generate(max_new_tokens=5)[0]["outputs"]
    assert text == whole


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"type": "generate", "inputs": "a", "max_new_tokens": 1}, "invalid_parameter"),  # before opening
        ({"type": "open_inference_session"}, "invalid_parameter"),
        ({"type": "open_inference_session", "max_length": 10**9}, "too_long"),
        ({"type": "open_inference_session", "max_length": 8, "model": "no/such"}, "model_not_found"),
        ({"type": "open_inference_session", "max_length": 8, "model": "/nowhere/missing-model"}, "model_unavailable"),
    ],
)
def test_bad_message_leaves_the_connection_usable(live_app: LiveApp, message: object, code: str) -> None:
    with websocket(live_app.websocket_url) as ws:
        reply = ws.ask(message)
        assert (reply["ok"], reply["error"]["code"]) == (False, code), reply
        ws.open(16)
        assert ws.generate(inputs="a", max_new_tokens=1)[0]["ok"]


def test_stop_ends_the_answer_and_keeps_the_session(live_app: LiveApp) -> None:
    whole = generated(live_app, inputs=PROMPTS[0], max_new_tokens=200)
    with websocket(live_app.websocket_url) as ws:
        ws.open(1024)
        ws.send({"type": "stop"})  # nothing to stop: no answer
        ws.send({"type": "generate", "inputs": PROMPTS[0], "max_new_tokens": 1, "stop_sequence": "never to be seen"})
        replies = [ws.receive()]
        ws.send({"type": "stop"})
        while not replies[-1]["stop"]:
            replies.append(ws.receive())
        text = "".join(reply["outputs"] for reply in replies)
        if replies[-1]["finish_reason"] == "cancelled":
            text += ws.generate(max_new_tokens=20)[0]["outputs"]
    assert whole.startswith(text.rstrip("\ufffd"))


def test_requests_may_be_sent_ahead(live_app: LiveApp) -> None:
    with websocket(live_app.websocket_url) as ws:
        ws.send({"type": "open_inference_session", "max_length": 64})
        for _ in range(3):
            ws.send({"type": "generate", "inputs": "a", "max_new_tokens": 4})
        assert ws.receive() == {"ok": True}
        assert [ws.receive()["ok"] for _ in range(3)] == [True] * 3


@pytest.mark.parametrize("how", ["close", "abort"])
def test_closing_in_mid_answer_frees_the_attention_cache(live_app: LiveApp, model: SwarmModel, how: str) -> None:
    before = settled_cache(model)
    with websocket(live_app.websocket_url) as ws:
        ws.open(2048)
        ws.send({"type": "generate", "inputs": "a b c", "max_new_tokens": 1, "stop_sequence": "never to be seen"})
        ws.receive()
        assert all(now < then for now, then in zip(free_cache(model), before, strict=True))
        if how == "abort":
            ws.connection.socket.close()
    wait_until(lambda: free_cache(model) == before, "the attention cache was not freed")


def test_pings_keep_the_line(live_app: LiveApp, caplog: pytest.LogCaptureFixture) -> None:
    """With the interval of the settings; a shorter one here."""
    hub = live_app.app.extensions["petals_chat_websockets"].hub
    limits = hub.limits
    assert limits.ping_interval == live_app.service.settings.WEBSOCKET_PING_INTERVAL == 25.0
    hub.limits = dataclasses.replace(limits, ping_interval=0.1)
    try:
        with caplog.at_level(logging.DEBUG, "websockets.client"), websocket(live_app.websocket_url) as ws:
            wait_until(lambda: caplog.text.count("< PING") >= 3, "there were no pings")
            ws.open(16)  # and the connection lives
    finally:
        hub.limits = limits
