"""The WebSocket API through its real door, with somebody else's client."""

import contextlib
import dataclasses
import itertools
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from swarm.client.model import SwarmModel
from tests.conftest import LiveApp
from tests.support.client import TIMEOUT, call, websocket
from tests.support.detaching import detaching
from tests.test_http_api import generated
from tests.test_session import free_cache, settled_cache, wait_until
from tests.test_websocket_hub import frame

NEVER = "never to be seen"
PROMPTS = ["The quick brown fox", "Ein Schwarm", "分散された大規模", "блоки модели", "a b c", "Nobody, said"]


def test_one_answer_without_a_stop_sequence(live_app: LiveApp) -> None:
    with websocket(live_app.websocket_url) as ws:
        ws.open(64)
        (reply,) = ws.generate(inputs=PROMPTS[0], max_new_tokens=12)
    assert reply["ok"] and reply["stop"] is True
    assert reply["outputs"] == generated(live_app, inputs=PROMPTS[0], max_new_tokens=12)


def test_plain_text_between_special_tokens(live_app: LiveApp) -> None:
    options = {"inputs": "<s>a\n[b</s>]\n<s>", "plain_between": ["[", "]"], "max_new_tokens": 6}
    with websocket(live_app.websocket_url) as ws:
        ws.open(64)
        (reply,) = ws.generate(**options)
    assert reply["outputs"] == generated(live_app, **options)


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


def websockets_of(app: LiveApp) -> Any:
    return app.app.extensions["petals_chat_websockets"]


@pytest.fixture
def detached_app(live_app: LiveApp) -> Iterator[LiveApp]:
    """The app behind a server that gives connections up."""
    with detaching(live_app.app) as url:
        yield dataclasses.replace(live_app, url=url)


def test_connection_that_is_given_up_by_the_server(detached_app: LiveApp) -> None:
    whole = generated(detached_app, inputs=PROMPTS[0], max_new_tokens=12)
    with websocket(detached_app.websocket_url) as ws:
        ws.open(64)
        replies = ws.generate(inputs=PROMPTS[0], max_new_tokens=1, max_answer_tokens=12, stop_sequence=NEVER)
        assert "".join(reply["outputs"] for reply in replies) == whole
    assert ws.connection.close_code == 1000


def test_idle_connections_hold_no_threads(detached_app: LiveApp) -> None:
    pool = websockets_of(detached_app).pool
    with websocket(detached_app.websocket_url) as ws:
        ws.open(64)  # the hub's thread, and one of the pool, are there
    wait_until(lambda: pool.working == 0, "the session was not left")
    with websocket(detached_app.websocket_url) as ws, contextlib.ExitStack() as stack:
        before = threading.active_count()
        idle = [stack.enter_context(handshake(detached_app.url)) for _ in range(129)]
        wait_until(lambda: threading.active_count() <= before, "they hold threads")
        assert call(detached_app.url, "/healthz")[0] == 200
        ws.open(64)
        assert ws.generate(inputs="a", max_new_tokens=1)[0]["ok"]
        idle[-1].sendall(frame(b"nonsense"))
        assert b"invalid_parameter" in idle[-1].recv(4096)


def test_request_without_a_handshake(live_app: LiveApp) -> None:
    status, headers, body = call(live_app.url, "/api/v2/generate")
    assert status == 426 and headers["sec-websocket-version"] == "13"
    assert body["ok"] is False and body["error"]["code"] == "bad_handshake"


@pytest.mark.parametrize("origin", ["http://[", "https://foe.example", "null", ""])
def test_foreign_and_malformed_origins(live_app: LiveApp, monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    settings = dataclasses.replace(live_app.service.settings, WEBSOCKET_ORIGINS=("https://friend.example",))
    monkeypatch.setattr(live_app.service, "settings", settings)
    with connect(live_app.websocket_url, additional_headers={"Origin": origin}) as ws:
        with pytest.raises(ConnectionClosed, match="origin") as closed:
            ws.recv(timeout=TIMEOUT)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008


def test_too_many_connections(live_app: LiveApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have a session keep their places; the others are displaced by newcomers of the same address."""
    hub = websockets_of(live_app).hub
    wait_until(lambda: len(hub) == 0, "connections of other tests are still there")
    monkeypatch.setattr(hub, "limits", dataclasses.replace(hub.limits, max_websockets=2))
    with websocket(live_app.websocket_url) as first, websocket(live_app.websocket_url) as idle:
        first.open(64)
        with websocket(live_app.websocket_url) as second:
            with pytest.raises(ConnectionClosed) as closed:
                idle.receive()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
            second.open(64)
            with pytest.raises(InvalidStatus) as refused, websocket(live_app.websocket_url):
                pass
            assert refused.value.response.status_code == 429
            assert first.generate(inputs="a", max_new_tokens=1)[0]["ok"]
            assert second.generate(inputs="a", max_new_tokens=1)[0]["ok"]


def test_stop_behind_other_messages(live_app: LiveApp) -> None:
    with websocket(live_app.websocket_url) as ws:
        ws.open(2048)
        ws.send({"type": "generate", "inputs": PROMPTS[0], "max_new_tokens": 1, "stop_sequence": NEVER})
        ws.receive()
        for _ in range(40):
            ws.send({"type": "generate", "max_new_tokens": 1})
        ws.send({"type": "stop"})
        reply = ws.receive()
        while not reply["stop"]:
            reply = ws.receive()
        assert reply["finish_reason"] == "cancelled"
        assert [ws.receive()["ok"] for _ in range(40)] == [True] * 40


def test_too_many_messages_sent_ahead_end_the_connection(live_app: LiveApp) -> None:
    with websocket(live_app.websocket_url) as ws:
        ws.open(2048)
        ws.send({"type": "generate", "inputs": PROMPTS[0], "max_new_tokens": 2000})
        with pytest.raises(ConnectionClosed) as closed:
            for _ in range(65):
                ws.send({"type": "generate", "max_new_tokens": 1})
            while True:
                ws.receive()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
    wait_until(lambda: websockets_of(live_app).pool.working == 0, "the answer goes on")


def test_slow_reader_loses_nothing_and_holds_up_nobody(live_app: LiveApp) -> None:
    whole = generated(live_app, inputs=PROMPTS[0], max_new_tokens=400)
    with websocket(live_app.websocket_url) as slow, websocket(live_app.websocket_url) as other:
        slow.connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.open(2048)
        other.open(64)
        answer = {"max_new_tokens": 1, "max_answer_tokens": 400, "stop_sequence": NEVER}
        slow.send({"type": "generate", "inputs": PROMPTS[0], **answer})
        replies = [slow.receive()]
        assert other.generate(inputs="a", max_new_tokens=1)[0]["ok"]
        while not replies[-1]["stop"]:
            if len(replies) % 50 == 0:
                time.sleep(0.02)  # its slowness, which nothing waits for
            replies.append(slow.receive())
    assert "".join(reply["outputs"] for reply in replies) == whole


@pytest.mark.parametrize("stage", ["after the handshake", "within a message", "opening", "in mid-answer"])
def test_client_that_vanishes(
    live_app: LiveApp, model: SwarmModel, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    """With a reset, as when its process or its machine ends."""
    before = settled_cache(model)
    sock = handshake(live_app.url)
    if stage == "within a message":
        sock.sendall(frame(b"x" * 100)[:50])
    elif stage == "opening":
        sock.sendall(frame(b'{"type": "open_inference_session", "max_length": 64}'))
    elif stage == "in mid-answer":
        sock.sendall(frame(b'{"type": "open_inference_session", "max_length": 2048}'))
        request = {"type": "generate", "inputs": "a", "max_new_tokens": 1, "stop_sequence": NEVER}
        sock.sendall(frame(json.dumps(request).encode()))
        received = b""
        while received.count(b'"outputs"') < 3:
            received += sock.recv(4096)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    wait_until(lambda: len(websockets_of(live_app).hub) == 0, "the connection was not given up")
    wait_until(lambda: free_cache(model) == before, "the attention cache was not freed")
    assert "Traceback" not in caplog.text


def handshake(url: str) -> socket.socket:
    """Return a socket that talks WebSocket from now on."""
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=TIMEOUT)
    head = ["GET /api/v2/generate HTTP/1.1", f"Host: {host}", "Connection: Upgrade", "Upgrade: websocket"]
    head += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "", ""]
    sock.sendall("\r\n".join(head).encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += sock.recv(4096)
    assert answer.startswith(b"HTTP/1.1 101 ")
    return sock
