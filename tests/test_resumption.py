"""Connections that are lost, and sessions that go on without them; news of the swarm for those who want it."""

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from config import Settings
from errors import SessionNotFound
from models.catalog import configured
from service import Service
from swarm.client.model import SwarmModel
from swarm.local import LocalSwarm
from tests.conftest import LiveApp, serve, tiny_server
from tests.support.client import TIMEOUT, Socket, websocket
from tests.test_failover import Chaos
from tests.test_http_api import generated
from tests.test_session import free_cache, settled_cache, wait_until
from web.reply_stream import ReplyStream, Unreachable
from web.websockets import websockets_of

PROMPT = "The quick brown fox"
NEVER = "no such text is ever generated"
TOKENS = 60


@pytest.fixture(scope="module")
def settings(live_app: LiveApp) -> Settings:
    return dataclasses.replace(live_app.service.settings, MODELS=(live_app.model_name,))


@pytest.fixture(scope="module")
def whole(live_app: LiveApp) -> str:
    return generated(live_app, inputs=PROMPT, max_new_tokens=TOKENS)


@pytest.fixture(autouse=True)
def nothing_is_left(live_app: LiveApp) -> Iterator[None]:
    """Sessions that wait for their clients would end in the middle of other tests."""
    yield
    for session_id in list(live_app.service.sessions._sessions):
        with contextlib.suppress(SessionNotFound):
            live_app.service.sessions.close(session_id)


def open_resumable(ws: Socket, max_length: int = 2048, **more: Any) -> str:
    message = {"type": "open_inference_session", "max_length": max_length, "resumable": True, **more}
    reply = ws.ask(message)
    assert set(reply) == {"ok", "session_id", "resume_timeout"} and reply["ok"], reply
    return reply["session_id"]


def resume(ws: Socket, session_id: str, received: int, **more: Any) -> dict[str, Any]:
    return ws.ask({"type": "resume_inference_session", "session_id": session_id, "received": received, **more})


def ask_for_answer(ws: Socket, tokens: int | None = TOKENS, **more: Any) -> None:
    """Have an answer streamed token by token; None: as long as the session allows."""
    bound = {} if tokens is None else {"max_answer_tokens": tokens}
    ws.send({"type": "generate", "inputs": PROMPT, "max_new_tokens": 1, "stop_sequence": NEVER, **bound, **more})


def receive(ws: Socket, count: int) -> list[dict[str, Any]]:
    return [ws.receive() for _ in range(count)]


def receive_all(ws: Socket) -> list[dict[str, Any]]:
    """Return all messages up to the end of the answer."""
    replies = [ws.receive()]
    while replies[-1]["ok"] and not replies[-1].get("stop"):
        replies.append(ws.receive())
    return replies


def text_of(replies: list[dict[str, Any]]) -> str:
    return "".join(reply.get("outputs", "") for reply in replies)


def lose(ws: Socket) -> None:
    """Lose the connection, as a network does."""
    ws.connection.socket.shutdown(socket.SHUT_RDWR)


def reload(ws: Socket) -> None:
    """Close the connection, as a browser does that leaves the page."""
    ws.connection.close(code=1001)


def stream_of(app: LiveApp, session_id: str) -> ReplyStream:
    return websockets_of(app.app).streams.find(session_id)


def wait_until_left(app: LiveApp, session_id: str) -> None:
    wait_until(lambda: not stream_of(app, session_id).attended, "the loss of the connection was not noticed")


def wait_until_idle(app: LiveApp, session_id: str) -> None:
    wait_until(lambda: app.service.sessions.find(session_id).users == 0, "the answer did not end")


@pytest.mark.parametrize("leave", [lose, reload])
def test_answer_goes_on_over_another_connection(live_app: LiveApp, whole: str, leave: Any) -> None:
    with websocket(live_app.websocket_url) as ws:
        session_id = open_resumable(ws)
        ask_for_answer(ws)
        replies = receive(ws, 7)
        leave(ws)
    with websocket(live_app.websocket_url) as ws:
        reply = resume(ws, session_id, 7)
        assert reply["ok"] and reply["answers"] == 1 and reply["responses"] >= 7
        replies += receive_all(ws)
        assert text_of(replies) == whole and len(replies) == TOKENS
        text = ws.generate(max_new_tokens=10)[0]["outputs"]  # and on, as if nothing had been
    assert whole + text == generated(live_app, inputs=PROMPT, max_new_tokens=TOKENS + 10)
    wait_until(lambda: session_id not in live_app.service.sessions._sessions, "the session was not closed")


def test_connection_lost_again_and_again(live_app: LiveApp, whole: str) -> None:
    with websocket(live_app.websocket_url) as ws:
        session_id = open_resumable(ws)
        ask_for_answer(ws)
        replies = receive(ws, 1)
        lose(ws)
    while not replies[-1]["stop"]:
        with websocket(live_app.websocket_url) as ws:
            assert resume(ws, session_id, len(replies))["ok"]
            for _ in range(9):
                if not replies[-1]["stop"]:
                    replies.append(ws.receive())
            (lose if len(replies) % 2 else reload)(ws)
    assert text_of(replies) == whole


def test_answer_that_ended_meanwhile(live_app: LiveApp, whole: str) -> None:
    with websocket(live_app.websocket_url) as ws:
        session_id = open_resumable(ws)
        ask_for_answer(ws)
        ws.receive()
        lose(ws)
        wait_until_left(live_app, session_id)
    wait_until_idle(live_app, session_id)
    with websocket(live_app.websocket_url) as ws:
        assert resume(ws, session_id, 0) == {"ok": True, "answers": 1, "responses": TOKENS}
        assert text_of(receive(ws, TOKENS)) == whole
        assert ws.generate(max_new_tokens=1)[0]["ok"]
        lose(ws)  # it is resumable in its turn
    with websocket(live_app.websocket_url) as ws:
        assert resume(ws, session_id, 1) == {"ok": True, "answers": 2, "responses": 1}


def test_unstreamed_answer(live_app: LiveApp, whole: str) -> None:
    with websocket(live_app.websocket_url) as ws:
        session_id = open_resumable(ws)
        ws.send({"type": "generate", "inputs": PROMPT, "max_new_tokens": TOKENS})
        wait_until(lambda: stream_of(live_app, session_id)._answers == 1, "it does not begin")
        lose(ws)
    with websocket(live_app.websocket_url) as ws:
        assert resume(ws, session_id, 0)["answers"] == 1
        assert text_of(receive_all(ws)) == whole


def test_request_that_was_lost_with_the_connection(live_app: LiveApp) -> None:
    """The client has sent two requests and the server has seen one, whose answer it has: nothing comes again."""
    with websocket(live_app.websocket_url) as ws:
        session_id = open_resumable(ws, 64)
        ws.generate(inputs=PROMPT, max_new_tokens=1)
        lose(ws)
    with websocket(live_app.websocket_url) as ws:
        assert resume(ws, session_id, 0, answers=0)["error"]["code"] == "invalid_parameter"
        assert resume(ws, session_id, 0, answers=2) == {"ok": True, "answers": 1, "responses": 1}
        assert ws.ask({"type": "generate", "max_new_tokens": 2})["token_count"] == 2
        lose(ws)
    with websocket(live_app.websocket_url) as ws:
        assert resume(ws, session_id, 0, answers=2) == {"ok": True, "answers": 2, "responses": 1}
        assert ws.receive()["token_count"] == 2


def test_failures_are_responses(live_app: LiveApp) -> None:
    with websocket(live_app.websocket_url) as ws:
        session_id = open_resumable(ws, 32)
        assert ws.ask({"type": "generate", "inputs": PROMPT})["error"]["code"] == "invalid_parameter"  # not begun
        failure = ws.ask({"type": "generate", "inputs": PROMPT, "max_new_tokens": 100})
        assert failure["error"]["code"] == "too_long"
        lose(ws)
    with websocket(live_app.websocket_url) as ws:
        assert resume(ws, session_id, 0) == {"ok": True, "answers": 1, "responses": 1}
        assert ws.receive() == failure


@pytest.mark.parametrize("answering", [True, False])
def test_taking_over(live_app: LiveApp, whole: str, answering: bool) -> None:
    """The old connection is half open: the client has left it and the server does not know."""
    with websocket(live_app.websocket_url) as old, websocket(live_app.websocket_url) as new:
        session_id = open_resumable(old)
        replies = []
        if answering:
            ask_for_answer(old)
            replies = receive(old, 3)
        assert resume(new, session_id, len(replies))["ok"]
        if not answering:
            ask_for_answer(new)
        replies += receive_all(new)
        assert text_of(replies) == whole
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                old.connection.recv(timeout=TIMEOUT)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "resumed elsewhere")
        assert new.generate(max_new_tokens=1)[0]["ok"]  # the session does not end with the old connection


def test_waiting_for_the_end_of_an_answer_takes_no_thread(live_app: LiveApp) -> None:
    """Connection after connection takes the answer over; what the last one has sent meanwhile is answered then."""
    pool = live_app.app.extensions["petals_chat_websockets"].pool
    wait_until(lambda: pool.working == 0, "something else is going on")
    with contextlib.ExitStack() as stack:
        ws = stack.enter_context(websocket(live_app.websocket_url))
        session_id = open_resumable(ws)
        ask_for_answer(ws, None)
        replies = receive(ws, 1)
        for _ in range(5):
            ws = stack.enter_context(websocket(live_app.websocket_url))
            assert resume(ws, session_id, len(replies))["ok"]
            replies += receive(ws, 3)
            wait_until(lambda: pool.working == 1, "there is more than the thread that computes the answer")
        for _ in range(2):
            ws.send({"type": "generate", "max_new_tokens": 1})
        ws.send({"type": "stop"})
        assert receive_all(ws)[-1]["finish_reason"] == "cancelled"
        assert [reply["token_count"] for reply in receive(ws, 2)] == [1, 1]
        wait_until(lambda: pool.working == 0, "threads are held")
    wait_until(lambda: len(live_app.service.sessions) == 0, "the session was not closed")


def test_stop_after_resuming(live_app: LiveApp) -> None:
    with websocket(live_app.websocket_url) as ws:
        session_id = open_resumable(ws)
        ask_for_answer(ws, None)
        ws.receive()
        lose(ws)
    with websocket(live_app.websocket_url) as ws:
        assert resume(ws, session_id, 1)["ok"]
        ws.send({"type": "stop"})
        assert receive_all(ws)[-1]["finish_reason"] == "cancelled"
        assert ws.generate(max_new_tokens=1)[0]["ok"]


@pytest.mark.parametrize(
    "received", [-1, "many", 1.5, True, None, 2, 10**9], ids=["-1", "text", "1.5", "true", "null", "2", "10**9"]
)
def test_bad_received(live_app: LiveApp, received: object) -> None:
    with websocket(live_app.websocket_url) as ws:
        session_id = open_resumable(ws, 64)
        assert ws.generate(inputs="a", max_new_tokens=1)[0]["ok"]
        lose(ws)
    with websocket(live_app.websocket_url) as ws:
        message = {"type": "resume_inference_session", "session_id": session_id, "received": received}
        assert ws.ask(message)["error"]["code"] == "invalid_parameter"
        assert resume(ws, session_id, 1)["ok"]


def test_session_that_is_not_there(live_app: LiveApp) -> None:
    with websocket(live_app.websocket_url) as ws, websocket(live_app.websocket_url) as other:
        assert resume(ws, "00000000-0000-0000-0000-000000000000", 0)["error"]["code"] == "session_not_found"
        other.open(16)
        (entry,) = live_app.service.sessions._sessions
        assert resume(ws, entry, 0)["error"]["code"] == "session_not_found"  # it is not resumable
        ws.open(16)  # the connection may open a session


def test_sessions_of_other_keys(settings: Settings) -> None:
    with serve(dataclasses.replace(settings, API_KEYS=("one", "two"))) as app:
        with websocket(app.websocket_url) as ws:
            session_id = open_resumable(ws, 64, api_key="one")
            assert ws.generate(inputs="a", max_new_tokens=1)[0]["ok"]
            lose(ws)
        with websocket(app.websocket_url) as ws:
            assert resume(ws, session_id, 0, api_key="two")["error"]["code"] == "session_not_found"
            assert resume(ws, session_id, 0)["error"]["code"] == "invalid_api_key"
            assert resume(ws, session_id, 0, api_key="one")["ok"]


def close_without_code(ws: Socket) -> None:
    with ws.connection.send_context():
        ws.connection.protocol.send_close()


def ask_to_close(ws: Socket) -> None:
    ws.send({"type": "close_inference_session"})
    *answer, reply = [*receive_all(ws), ws.receive()]
    assert answer[-1]["finish_reason"] == "cancelled" and reply == {"ok": True}
    assert ws.ask({"type": "generate", "inputs": "a", "max_new_tokens": 1})["error"]["code"] == "invalid_parameter"
    ws.open(16)


@pytest.mark.parametrize("close", [lambda ws: ws.connection.close(), close_without_code, ask_to_close])
def test_closing_on_purpose_frees_at_once(live_app: LiveApp, model: SwarmModel, close: Any) -> None:
    before = settled_cache(model)
    with websocket(live_app.websocket_url) as ws:
        session_id = open_resumable(ws)
        ask_for_answer(ws, None)
        ws.receive()
        close(ws)
        wait_until(lambda: session_id not in live_app.service.sessions._sessions, "the session was not closed")
        wait_until(lambda: free_cache(model) == before, "the attention cache was not freed")
        with websocket(live_app.websocket_url) as other:
            assert resume(other, session_id, 0)["error"]["code"] == "session_not_found"


def test_what_is_sent_ahead_of_closing_is_answered(live_app: LiveApp) -> None:
    with websocket(live_app.websocket_url) as ws:
        open_resumable(ws)
        for _ in range(3):
            ask_for_answer(ws, None)
        ws.receive()
        ws.send({"type": "close_inference_session"})
        assert [receive_all(ws)[-1]["finish_reason"] for _ in range(3)] == ["cancelled"] * 3
        assert ws.receive() == {"ok": True}
        assert ws.ask({"type": "close_inference_session"}) == {"ok": True}  # there is nothing to close


def test_expiry(settings: Settings) -> None:
    """The answer ends and the session closes, but what was computed is kept for the page that comes later."""
    with serve(dataclasses.replace(settings, RESUME_TIMEOUT=0.5, WARM_SESSIONS=4)) as app:
        with websocket(app.websocket_url) as ws:
            session_id = open_resumable(ws)
            ask_for_answer(ws, None)
            ws.receive()
            stream = stream_of(app, session_id)
            lose(ws)
            wait_until(lambda: not stream.attended, "the loss of the connection was not noticed")
        wait_until(lambda: len(app.service.sessions) == 0, "the session was not closed")
        assert stream._responses[-1][0]["finish_reason"] == "cancelled"
        wait_until(lambda: len(app.service.sessions.memory) == 1, "nothing was kept")
        with websocket(app.websocket_url) as ws:
            assert resume(ws, session_id, 1)["error"]["code"] == "session_not_found"
            ws.open(2048)
            assert ws.generate(inputs=PROMPT, max_new_tokens=1)[0]["ok"]
        with websocket(app.websocket_url) as ws:  # one that does nothing expires as well
            session_id = open_resumable(ws)
            lose(ws)
        wait_until(lambda: len(app.service.sessions) == 0, "the session was not closed")


def test_answers_of_those_who_have_left_make_room(settings: Settings) -> None:
    with serve(dataclasses.replace(settings, MAX_CONCURRENT_GENERATIONS=1, QUEUE_TIMEOUT=30.0)) as app:
        with websocket(app.websocket_url) as ws:
            session_id = open_resumable(ws)
            ask_for_answer(ws, None)
            ws.receive()
            lose(ws)
            wait_until_left(app, session_id)
        with websocket(app.websocket_url) as other:
            other.open(64)
            assert other.generate(inputs="a", max_new_tokens=2)[0]["ok"]
        with websocket(app.websocket_url) as ws:
            reply = resume(ws, session_id, 1)
            assert receive(ws, reply["responses"] - 1)[-1]["finish_reason"] == "cancelled"
            assert ws.generate(max_new_tokens=1)[0]["ok"]


@pytest.mark.parametrize("answering", [True, False])
def test_sessions_of_those_who_have_left_make_room(settings: Settings, answering: bool) -> None:
    with serve(dataclasses.replace(settings, MAX_SESSIONS=2, QUEUE_TIMEOUT=30.0)) as app:
        with websocket(app.websocket_url) as here, websocket(app.websocket_url) as ws:
            here.open(64)
            session_id = open_resumable(ws)
            if answering:
                ask_for_answer(ws, None)
                ws.receive()
            lose(ws)
            wait_until_left(app, session_id)
            with websocket(app.websocket_url) as other:
                other.open(64)
                assert resume(other, session_id, 0)["error"]["code"] == "invalid_parameter"  # it has one
            with websocket(app.websocket_url) as again:
                assert resume(again, session_id, 0)["error"]["code"] == "session_not_found"
            assert here.generate(inputs="a", max_new_tokens=1)[0]["ok"]


def test_who_has_left_waits_for_nobody_and_is_waited_for_by_nobody(settings: Settings) -> None:
    """A request that waits for its turn goes on waiting without its client, but lets others go first."""
    with serve(dataclasses.replace(settings, MAX_CONCURRENT_GENERATIONS=1, QUEUE_TIMEOUT=30.0)) as app:
        with websocket(app.websocket_url) as busy, websocket(app.websocket_url) as ws:
            busy.open(2048)
            busy.send({"type": "generate", "inputs": PROMPT, "max_new_tokens": 2000})
            wait_until(lambda: app.service._generations._taken == 1, "it does not begin")
            session_id = open_resumable(ws, queue_updates=True)
            ask_for_answer(ws)
            assert ws.receive() == {"ok": True, "queue": {"position": 1}}
            lose(ws)
            wait_until_left(app, session_id)
            with websocket(app.websocket_url) as again:
                assert resume(again, session_id, 0, queue_updates=True) == {"ok": True, "answers": 1, "responses": 0}
                assert again.receive() == {"ok": True, "queue": {"position": 1}}
                lose(again)
                wait_until_left(app, session_id)
            assert not app.service.others_wait()
            with websocket(app.websocket_url) as other:
                other.open(64)
                other.send({"type": "generate", "inputs": "a", "max_new_tokens": 1})
                wait_until_idle(app, session_id)
                busy.send({"type": "stop"})
                assert busy.receive()["finish_reason"] == "cancelled"
                assert other.receive()["ok"]
            with websocket(app.websocket_url) as again:
                assert resume(again, session_id, 0) == {"ok": True, "answers": 1, "responses": 1}
                assert again.receive()["finish_reason"] == "cancelled"


def test_nobody_waits_for_them_at_the_end(settings: Settings) -> None:
    with serve(dataclasses.replace(settings, SHUTDOWN_TIMEOUT=1000.0)) as app:
        with websocket(app.websocket_url) as ws:
            session_id = open_resumable(ws)
            ask_for_answer(ws, None)
            ws.receive()
            lose(ws)
            stream = stream_of(app, session_id)
            wait_until_left(app, session_id)
        app.service.close()
        assert stream._responses[-1][0]["finish_reason"] == "cancelled"


class StalledClient:
    """Takes no data, and so holds up whoever sends to it until it is abandoned."""

    queue_updates = swarm_updates = False
    connected = True
    closed_on_purpose = False

    def __init__(self) -> None:
        self.reached, self.abandoned = threading.Event(), threading.Event()

    def deliver(self, *messages: dict[str, Any]) -> None:
        self.reached.set()
        self.abandoned.wait(TIMEOUT)
        self.connected = False
        raise Unreachable

    def offer(self, message: dict[str, Any]) -> None:
        raise AssertionError("there is no queue")

    def stopped(self) -> bool:
        return False

    def handle_pending(self) -> None:
        raise AssertionError("it waits for nothing")

    def abandon(self) -> None:
        self.abandoned.set()

    def dismiss(self) -> None:
        raise AssertionError("it has gone by then")


class QueueingClient(StalledClient):
    queue_updates = True

    def __init__(self) -> None:
        super().__init__()
        self.offered: list[dict[str, Any]] = []

    def offer(self, message: dict[str, Any]) -> None:
        self.offered.append(message)


class AttentiveClient(StalledClient):
    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def deliver(self, *messages: dict[str, Any]) -> None:
        self.messages += messages


def test_taking_over_from_a_connection_that_takes_no_data(live_app: LiveApp, model: SwarmModel) -> None:
    service: Service = live_app.service
    entry = service.sessions.find(service.sessions.open(model, 16))
    stalled, attentive = StalledClient(), AttentiveClient()
    stream = ReplyStream(service, entry, stalled, resumable=True)
    sender = threading.Thread(target=stream.send, args=({"ok": True, "outputs": "a", "stop": True},))
    sender.start()
    assert stalled.reached.wait(TIMEOUT)
    stream.attach(attentive, 0)
    sender.join(TIMEOUT)
    assert attentive.messages[0] == {"ok": True, "answers": 0, "responses": 1}
    assert attentive.messages[1]["outputs"] == "a"
    stream.close(attentive)


def test_place_in_the_queue_waits_for_nobody(live_app: LiveApp, model: SwarmModel) -> None:
    """Whoever is at the head of the queue tells it: a client that takes no data must not hold up those behind."""
    service: Service = live_app.service
    entry = service.sessions.find(service.sessions.open(model, 16))
    stalled = QueueingClient()
    stream = ReplyStream(service, entry, stalled, resumable=True)
    stream.position(3)
    assert stalled.offered == [{"ok": True, "queue": {"position": 3}}] and not stalled.reached.is_set()
    stream.close(stalled)


def test_model_defaults(live_app: LiveApp) -> None:
    (config,) = [
        config for config in configured(live_app.service.settings.MODELS) if config.name == live_app.model_name
    ]
    assert config.generation["do_sample"]
    common = {"inputs": PROMPT, "max_new_tokens": 30, "seed": 3}

    def answer(**params: Any) -> str:
        with websocket(live_app.websocket_url) as ws:
            ws.open(64)
            return ws.generate(**common, **params)[0]["outputs"]

    assert answer(model_defaults=True) == answer(**config.generation)
    assert answer(model_defaults=True, temperature=1.5) == answer(**{**config.generation, "temperature": 1.5})
    assert answer(model_defaults=True, do_sample=False) == answer() != answer(model_defaults=True)
    assert answer(model_defaults=False, do_sample=None) == answer()


def swarm_news(replies: list[dict[str, Any]], kind: str) -> list[Any]:
    return [reply["swarm"][kind] for reply in replies if kind in reply.get("swarm", {})]


def test_route_position_and_prefill(live_app: LiveApp, model: SwarmModel) -> None:
    prompt = PROMPT * 300
    with websocket(live_app.websocket_url) as ws:
        session_id = open_resumable(ws, swarm_updates=True)
        ask_for_answer(ws, 5, inputs=prompt)
        replies = receive_all(ws)
        (route,) = swarm_news(replies, "route")
        assert [(span["start"], span["end"]) for span in route] == [(0, 2), (2, 4)]
        assert {span["peer_id"] for span in route} == {view.peer_id for view in model.state.servers()}
        length = len(model.tokenizer.encode(prompt))
        progress = swarm_news(replies, "prefill")
        assert progress and all(news["total"] == length and news["processed"] < length for news in progress)
        answer = [reply for reply in replies if "outputs" in reply]
        assert [reply["position"] for reply in answer] == [length + n for n in range(1, 6)]
        assert replies.index(answer[0]) > max(n for n, reply in enumerate(replies) if "swarm" in reply)
        ask_for_answer(ws, 2, inputs="")
        assert swarm_news(receive_all(ws), "route") == [route]  # reported again with each answer
        lose(ws)
    with websocket(live_app.websocket_url) as ws:
        assert resume(ws, session_id, 0, swarm_updates=True) == {"ok": True, "answers": 2, "responses": 2}
        assert [reply["position"] for reply in receive(ws, 2)] == [length + 6, length + 7]
        assert ws.receive() == {"ok": True, "swarm": {"route": route}}
        lose(ws)
    with websocket(live_app.websocket_url) as ws:  # who does not ask sees nothing of it
        assert resume(ws, session_id, 1)["ok"]
        assert set(ws.receive()) == {"ok", "outputs", "stop", "token_count", "finish_reason", "stop_sequence"}
        ask_for_answer(ws, 2, inputs=PROMPT)
        assert all(set(reply) >= {"outputs"} and "position" not in reply for reply in receive_all(ws))


@pytest.fixture(scope="module")
def restless(tiny_bloom: Path, settings: Settings) -> Iterator[tuple[LiveApp, Chaos]]:
    """An app over a swarm of its own, whose servers have names and may be killed."""
    with LocalSwarm() as local:
        for number, blocks in enumerate(("0:2", "0:2", "2:4", "2:4")):
            local.start_server(dataclasses.replace(tiny_server(tiny_bloom, blocks), public_name=f"server-{number}"))
        with serve(dataclasses.replace(settings, INITIAL_PEERS=tuple(local.swarm.initial_peers))) as app:
            model = app.service.models.served[app.model_name].model
            assert model is not None
            yield app, Chaos(local, model)


def kill_last(app: LiveApp, chaos: Chaos, session_id: str) -> None:
    """Kill the last server of a session's route."""
    chaos.serving(app.service.sessions.find(session_id).session)[-1].process.kill()


def test_lost_servers_are_reported(restless: tuple[LiveApp, Chaos]) -> None:
    app, chaos = restless
    chaos.all_back()
    whole = generated(app, inputs=PROMPT, max_new_tokens=300)
    with websocket(app.websocket_url) as ws:
        session_id = open_resumable(ws, swarm_updates=True)
        ask_for_answer(ws, 300)
        replies = receive(ws, 10)
        kill_last(app, chaos, session_id)
        replies += receive_all(ws)
    assert text_of(replies) == whole
    first, *_, second = swarm_news(replies, "route")
    assert {span["name"] for span in first} <= {f"server-{number}" for number in range(4)}
    lost = swarm_news(replies, "lost")[0]
    assert {key: lost[key] for key in ("peer_id", "start", "end")} == {
        key: first[-1][key] for key in ("peer_id", "start", "end")
    }
    assert "lost" in lost["reason"]
    kinds = [next(iter(reply["swarm"])) for reply in replies if "swarm" in reply and "prefill" not in reply["swarm"]]
    assert kinds[0] == "route" and kinds[-1] == "route" and "lost" in kinds
    assert second[-1]["peer_id"] != first[-1]["peer_id"]
    positions = [reply["position"] for reply in replies if "outputs" in reply]
    assert positions == list(range(positions[0], positions[0] + len(positions)))


@pytest.mark.parametrize("swarm_updates", [True, False])
def test_server_lost_while_nobody_is_there(restless: tuple[LiveApp, Chaos], swarm_updates: bool) -> None:
    app, chaos = restless
    chaos.all_back()
    whole = generated(app, inputs=PROMPT, max_new_tokens=400)
    with websocket(app.websocket_url) as ws:
        session_id = open_resumable(ws)
        ask_for_answer(ws, 400)
        replies = receive(ws, 5)
        lose(ws)
        wait_until_left(app, session_id)
        kill_last(app, chaos, session_id)
    with websocket(app.websocket_url) as ws:
        assert resume(ws, session_id, 5, swarm_updates=swarm_updates)["ok"]
        while not replies[-1].get("stop"):
            replies.append(ws.receive())
    assert text_of(replies) == whole
    assert bool(swarm_news(replies, "route")) == swarm_updates
    if not swarm_updates:
        assert all("swarm" not in reply and "position" not in reply for reply in replies)


def test_published_protocol_is_as_it_was(restless: tuple[LiveApp, Chaos]) -> None:
    """Who asks for nothing new sees nothing new, not even when a server is lost, and a lost connection ends all."""
    app, chaos = restless
    chaos.all_back()
    with websocket(app.websocket_url) as ws:
        ws.open(2048)
        ask_for_answer(ws, 300)
        replies = receive(ws, 5)
        (session_id,) = app.service.sessions._sessions
        kill_last(app, chaos, session_id)
        replies += receive_all(ws)
        assert all(set(reply) == {"ok", "outputs", "stop", "token_count"} for reply in replies[:-1])
        assert set(replies[-1]) == {"ok", "outputs", "stop", "token_count", "finish_reason", "stop_sequence"}
        ask_for_answer(ws, None)
        ws.receive()
        lose(ws)
        wait_until(lambda: len(app.service.sessions) == 0, "the session was not closed")
