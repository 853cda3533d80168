"""More users than there is room for: a fair queue, a bounded wait, and then a clear no."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from admission import FairQueue, QueueFull, WaitedTooLong
from config import Settings
from swarm.errors import Cancelled
from swarm.local import LocalSwarm
from tests.client import Socket, call, websocket
from tests.conftest import LiveApp, serve
from tests.test_session import wait_until

PROMPT = "The quick brown fox"
NEVER = "no such text is ever generated"


@pytest.fixture(scope="module")
def small_app(tiny_bloom: Path, swarm: LocalSwarm) -> Iterator[LiveApp]:
    """Room for two sessions and one answer at a time; two may wait."""
    settings = Settings(
        MODELS=(str(tiny_bloom),),
        INITIAL_PEERS=tuple(swarm.swarm.initial_peers),
        TORCH_DTYPE="float32",
        DEVICE="cpu",
        CACHE_DIR=str(tiny_bloom.parent),
        MAX_SESSIONS=2,
        MAX_CONCURRENT_GENERATIONS=1,
        MAX_QUEUE=2,
        QUEUE_TIMEOUT=30.0,
        SHUTDOWN_TIMEOUT=1.0,
    )
    with serve(settings) as live:
        yield live


def opening(**more: object) -> dict[str, object]:
    return {"type": "open_inference_session", "max_length": 512, **more}


def start_answer(ws: Socket) -> None:
    """Begin an answer that goes on until the session is full, and see its first token."""
    ws.send({"type": "generate", "inputs": PROMPT, "max_new_tokens": 1, "stop_sequence": NEVER})
    assert ws.receive()["ok"]


def test_places_in_the_queue_are_told_to_those_who_ask(small_app: LiveApp) -> None:
    url = small_app.websocket_url
    with websocket(url) as a, websocket(url) as b, websocket(url) as c, websocket(url) as d, websocket(url) as e:
        a.open(64)
        b.open(64)
        c.send(opening(queue_updates=True))
        assert c.receive() == {"ok": True, "queue": {"position": 1}}
        d.send(opening(queue_updates=True))
        assert d.receive() == {"ok": True, "queue": {"position": 2}}
        refused = e.ask(opening(queue_updates=True))
        assert refused["error"]["code"] == "too_many_sessions"
        a.connection.close()
        assert c.receive() == {"ok": True}  # it was there first
        assert d.receive() == {"ok": True, "queue": {"position": 1}}
        b.connection.close()
        assert d.receive() == {"ok": True}


def test_old_clients_see_only_what_they_expect(small_app: LiveApp) -> None:
    url = small_app.websocket_url
    wait_until(lambda: len(small_app.service.sessions) == 0, "sessions are left")
    with websocket(url) as a, websocket(url) as b, websocket(url) as c:
        a.open(64)
        b.open(64)
        c.send(opening())
        wait_until(lambda: waiting(small_app) == 1, "it does not wait")
        a.connection.close()
        assert c.receive() == {"ok": True}


def waiting(app: LiveApp) -> int:
    return len(app.service.sessions._places._waiting)


def test_leaving_the_queue(small_app: LiveApp) -> None:
    url = small_app.websocket_url
    wait_until(lambda: len(small_app.service.sessions) == 0, "sessions are left")
    with websocket(url) as a, websocket(url) as b:
        a.open(64)
        b.open(64)
        with websocket(url) as c:
            c.send(opening())
            wait_until(lambda: waiting(small_app) == 1, "it does not wait")
        wait_until(lambda: waiting(small_app) == 0, "it still waits although it has hung up")


def test_answers_take_turns(small_app: LiveApp) -> None:
    """One answer at a time: the second begins when the first has ended."""
    url = small_app.websocket_url
    wait_until(lambda: len(small_app.service.sessions) == 0, "sessions are left")
    with websocket(url) as a, websocket(url) as b:
        a.open(512)
        b.ask(opening(queue_updates=True))
        start_answer(a)
        b.send({"type": "generate", "inputs": PROMPT, "max_new_tokens": 3})
        assert b.receive() == {"ok": True, "queue": {"position": 1}}
        a.send({"type": "stop"})
        reply = b.receive()
        assert reply["ok"] and reply["token_count"] == 3


def test_stop_while_waiting_for_a_turn(small_app: LiveApp) -> None:
    url = small_app.websocket_url
    wait_until(lambda: len(small_app.service.sessions) == 0, "sessions are left")
    with websocket(url) as a, websocket(url) as b:
        a.open(512)
        b.ask(opening(queue_updates=True))
        start_answer(a)
        b.send({"type": "generate", "inputs": PROMPT, "max_new_tokens": 3})
        assert "queue" in b.receive()
        b.send({"type": "stop"})
        reply = b.receive()
        assert (reply["stop"], reply["finish_reason"], reply["token_count"]) == (True, "cancelled", 0)
        a.connection.close()
        assert b.generate(inputs=PROMPT, max_new_tokens=3)[-1]["token_count"] == 3


def test_time_limit_of_an_answer(small_app: LiveApp) -> None:
    wait_until(lambda: len(small_app.service.sessions) == 0, "sessions are left")
    with websocket(small_app.websocket_url) as ws:
        ws.open(2048)
        (reply,) = ws.generate(inputs=PROMPT, max_new_tokens=2000, max_time=0.5)
        assert reply["finish_reason"] == "time" and 0 < reply["token_count"] < 2000
        assert ws.generate(max_new_tokens=2)[-1]["ok"]
    body = {"inputs": PROMPT, "max_new_tokens": 2000, "max_time": 0.2}
    assert call(small_app.url, "/api/v1/generate", body=body)[0] == 200


def test_first_come_first_served() -> None:
    queue = FairQueue(1, max_waiting=8, timeout=30)
    order: list[int] = []
    queue.take()

    def wait_for_it(number: int) -> None:
        queue.take()
        order.append(number)
        queue.give_back()

    threads = []
    for number in range(8):
        threads.append(threading.Thread(target=wait_for_it, args=(number,)))
        threads[-1].start()
        wait_until(lambda count=number + 1: len(queue._waiting) == count, "it does not wait")
    with pytest.raises(QueueFull, match="8 wait already"):
        queue.take()
    queue.give_back()
    for thread in threads:
        thread.join(timeout=30)
    assert order == list(range(8))


def test_wait_is_bounded() -> None:
    queue = FairQueue(1, max_waiting=1, timeout=0.1)
    queue.take()
    with pytest.raises(WaitedTooLong):
        queue.take()
    with pytest.raises(Cancelled):
        queue.take(cancelled=lambda: True)
    queue.give_back()
    queue.take()


def test_who_has_left_is_not_waited_for() -> None:
    queue = FairQueue(1, max_waiting=2, timeout=30)
    queue.take()
    here = threading.Event()
    waiting = threading.Thread(target=queue.take, kwargs={"present": here.is_set})
    waiting.start()
    wait_until(lambda: len(queue._waiting) == 1, "it does not wait")
    assert not queue.awaited
    here.set()
    assert queue.awaited
    queue.give_back()
    waiting.join(timeout=30)
    assert not queue.awaited


def test_nobody_waits_while_there_is_room() -> None:
    queue = FairQueue(2, max_waiting=0, timeout=0)
    queue.take()
    queue.take()
    with pytest.raises(QueueFull):
        queue.take()
