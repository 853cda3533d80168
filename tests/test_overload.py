"""More users than there is room for: a fair queue, a bounded wait, and then a clear no."""

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import BloomForCausalLM

from admission.fair_queue import FairQueue, QueueFull, WaitedTooLong
from config import Settings
from swarm.errors import Cancelled
from swarm.local import LocalSwarm
from swarm.waiter import Waiter
from tests.conftest import LiveApp, greedy, serve, tiny_server
from tests.support.client import Socket, call, websocket
from tests.support.waiters import CallbackWaiter, Ends
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


def test_places_in_the_queue_are_reported_to_those_who_ask(small_app: LiveApp) -> None:
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
        a.send({"type": "stop"})
        while not a.receive()["stop"]:  # a client that closes with unread messages waits a minute for the other side
            pass
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


# Of different clients


@pytest.fixture(scope="module")
def shared_app(tiny_bloom: Path) -> Iterator[LiveApp]:
    """Room for 24 sessions, and attention cache for four of 60 tokens; a proxy tells whose requests it passes on."""
    with LocalSwarm() as local:
        local.start_server(tiny_server(tiny_bloom, "0:4", attn_cache_tokens=256))
        settings = Settings(
            MODELS=(str(tiny_bloom),),
            INITIAL_PEERS=tuple(local.swarm.initial_peers),
            TORCH_DTYPE="float32",
            DEVICE="cpu",
            CACHE_DIR=str(tiny_bloom.parent),
            MAX_SESSIONS=24,
            MAX_QUEUE=2,
            QUEUE_TIMEOUT=5.0,
            SHUTDOWN_TIMEOUT=1.0,
            TRUSTED_PROXIES=("127.0.0.1",),
        )
        with serve(settings) as live:
            yield live


HOARDER, NEWCOMER = {"X-Forwarded-For": "192.0.2.1"}, {"X-Forwarded-For": "192.0.2.2"}
GENERATE, OPEN, CLOSE = "/api/v1/generate", "/api/v1/open_inference_session", "/api/v1/close_inference_session"


@pytest.fixture
def hoard(shared_app: LiveApp) -> Iterator[list[str]]:
    """Sessions of one client."""
    body = {"max_length": 60}
    ids = [call(shared_app.url, OPEN, body=body, headers=HOARDER)[2]["session_id"] for _ in range(24)]
    yield ids
    for session_id in ids:
        call(shared_app.url, CLOSE, body={"session_id": session_id})
    assert len(shared_app.service.sessions) == 0


def test_who_hoards_sessions_gives_way(shared_app: LiveApp, hoard: list[str]) -> None:
    body = {"inputs": PROMPT, "max_new_tokens": 2}
    status, _, reply = call(shared_app.url, GENERATE, body=body, headers=NEWCOMER)
    assert (status, reply["ok"]) == (200, True)
    with websocket(shared_app.websocket_url) as ws:  # which comes without a proxy's word, and so from 127.0.0.1
        ws.open(60)
        assert ws.generate(**body)[-1]["ok"]
    # One went for each of them; then there was a place.
    answers = [call(shared_app.url, GENERATE, body={**body, "session_id": session_id}) for session_id in hoard]
    assert [status for status, *_ in answers] == [404] + [200] * 23
    assert "to make room for others" in answers[0][2]["error"]["message"]


def test_who_hoards_attention_cache_loses_no_text(
    shared_app: LiveApp, hoard: list[str], reference: BloomForCausalLM
) -> None:
    tokenizer = shared_app.service.models.find(shared_app.model_name).loaded.tokenizer
    texts = [f"{number} bees, zwei Bienen" for number in range(24)]
    for session_id, text in zip(hoard, texts, strict=True):  # each takes the cache of one that is unused
        body = {"session_id": session_id, "inputs": text, "max_new_tokens": 1}
        status, _, reply = call(shared_app.url, GENERATE, body=body, headers=HOARDER)
        assert status == 200, reply
    body = {"inputs": PROMPT, "max_new_tokens": 100}
    assert call(shared_app.url, CLOSE, body={"session_id": hoard[23]})[0] == 200
    assert call(shared_app.url, GENERATE, body=body, headers=NEWCOMER)[0] == 200
    for session_id, text in zip(hoard[:23], texts[:23], strict=True):
        body = {"session_id": session_id, "max_new_tokens": 6}
        status, _, reply = call(shared_app.url, GENERATE, body=body, headers=HOARDER)
        assert status == 200, reply
        expected = tokenizer.decode(greedy(reference, tokenizer.encode(text), 7)[1:])
        assert reply["outputs"].rstrip("\ufffd") == expected.rstrip("\ufffd")


def test_many_requests_to_one_busy_session(shared_app: LiveApp) -> None:
    """Four wait, the others are refused at once, and who has another session is answered."""
    busy, other = (
        call(shared_app.url, OPEN, body={"max_length": 60}, headers=HOARDER)[2]["session_id"] for _ in range(2)
    )
    sessions = shared_app.service.sessions

    def ask(session_id: str) -> tuple[int, str]:
        body = {"session_id": session_id, "inputs": "a", "max_new_tokens": 1}
        status, headers, reply = call(shared_app.url, GENERATE, body=body, headers=HOARDER)
        assert status == 200 or "retry-after" in headers
        return status, reply.get("error", {}).get("code", "")

    with ThreadPoolExecutor(120) as pool:
        with sessions.use(busy, wait=0):
            asked = [pool.submit(ask, busy) for _ in range(120)]
            wait_until(lambda: sum(one.done() for one in asked) == 116, "others than four wait")
            assert {one.result() for one in asked if one.done()} == {(429, "too_many_requests")}
            assert ask(other) == (200, "")
        assert sorted(one.result() for one in asked)[:4] == [(200, "")] * 4
    for session_id in (busy, other):
        call(shared_app.url, CLOSE, body={"session_id": session_id})


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
        queue.take(waiter=Ends(lambda: True))
    queue.give_back()
    queue.take()


class Line:
    """A queue, and those who wait in it; each one that is served says so, and keeps its place until `go`."""

    def __init__(self, places: int, max_waiting: int = 99) -> None:
        self.queue = FairQueue(places, max_waiting=max_waiting, timeout=30)
        self.served: list[str] = []
        self.refused: list[str] = []
        self.positions: dict[str, list[int]] = {}
        self.threads: list[threading.Thread] = []

    def join(self, *names: str, **options: Any) -> None:
        """Let some wait, one after the other; a name begins with the client's."""
        for name in names:
            thread = threading.Thread(target=self._take, args=(name,), kwargs=options, daemon=True)
            self.threads.append(thread)
            self.positions[name] = []
            thread.start()
            wait_until(
                lambda name=name, thread=thread: self.positions[name] or not thread.is_alive(), "it does not wait"
            )

    def _take(self, name: str, on_position: Callable[[int], None] = lambda position: None, **options: Any) -> None:
        def report(position: int) -> None:
            self.positions[name].append(position)
            on_position(position)

        try:
            self.queue.take(client=name[0], waiter=CallbackWaiter(report), **options)
        except QueueFull:
            self.refused.append(name)
        else:
            self.served.append(name)

    def go(self, *clients: str) -> None:
        """Let some give their places back, each after the next was served."""
        for client in clients:
            served = len(self.served)
            self.queue.give_back(client)
            wait_until(lambda served=served: len(self.served) == served + 1, "nobody is served")

    def is_order(self, *names: str) -> bool:
        """Whether the last places reported to these are the first, the second and so on."""
        return [self.positions[name][-1] for name in names] == list(range(1, len(names) + 1))


def test_clients_take_turns() -> None:
    line = Line(1)
    line.queue.take(client="x")
    line.join("a1", "a2", "a3", "b1", "b2", "c1")
    wait_until(lambda: line.is_order("a1", "b1", "c1", "a2", "b2", "a3"), "the reported order is another")
    line.go("x", "a")
    wait_until(lambda: line.is_order("c1", "a2", "b2", "a3"), "the reported order is another")
    line.go(*"bcab")
    assert line.served == ["a1", "b1", "c1", "a2", "b2", "a3"]
    line.queue.give_back("a")
    assert not line.queue._turns and not line.queue.held


def test_who_has_fewest_places_is_next() -> None:
    line = Line(6)
    for client in "aaabbc":
        line.queue.take(client=client)
    line.join("a4", "b3", "c2", "d1")
    wait_until(lambda: line.is_order("d1", "c2", "b3", "a4"), "the reported order is another")
    line.go(*"aaa")
    assert line.served == ["d1", "a4", "c2"]  # each has one by now, and a's turn was before c's
    line.go("b")
    assert line.served[-1] == "b3"


def test_full_waiting_room() -> None:
    """The newest of whoever has most there makes way for who has fewer; equals do not push each other out."""
    line = Line(1, max_waiting=3)
    line.queue.take(client="x")
    line.join("a1", "a2", "a3", "a4")
    assert line.refused == ["a4"]
    line.join("b1")
    wait_until(lambda: line.refused == ["a4", "a3"], "nobody makes way")
    line.join("b2", "a5")
    assert line.refused == ["a4", "a3", "b2", "a5"]
    line.join("p1", patient=True)
    line.join("c1")
    wait_until(lambda: line.refused[4:] == ["a2"], "nobody makes way")
    line.join("p2", "p3", patient=True)
    line.join("p4")
    assert line.refused[5:] == ["p4"]  # and none of those who never give way
    line.go(*"xabpc")
    assert line.served == ["a1", "b1", "p1", "c1", "p2"]


def test_who_tells_its_client_something_delays_nobody() -> None:
    """A client that takes no data blocks the thread that tells it its place, for up to SEND_TIMEOUT."""
    line, stalled, reached = Line(1), threading.Event(), threading.Event()

    def stall(position: int) -> None:
        reached.set()
        assert stalled.wait(30)

    line.queue.take(client="x")
    line.join("a1", on_position=stall)
    line.join("b1", "b2")
    assert reached.is_set() and line.positions["b1"][0] == 2
    line.go("x", "b")
    assert line.served == ["b1", "b2"]
    line.queue.give_back("b")
    line.queue.take(client="c")  # there is a place, and nobody who could take it now
    stalled.set()
    line.go("c")
    assert line.served == ["b1", "b2", "a1"]


def test_who_makes_room_is_not_passed_over() -> None:
    line = Line(1)
    line.queue.take(client="x")
    made: list[str] = []

    def make_room(lacking: Callable[[], bool]) -> None:
        if len(made) == 1:  # not before it waits
            line.queue.give_back("x")
        made.append("room")

    line.join("a1", make_room=make_room)
    wait_until(lambda: line.served == ["a1"], "it does not get the place that it made")


def test_who_makes_room_learns_whether_a_place_is_still_lacking() -> None:
    line = Line(1)
    line.queue.take(client="x")
    found: list[bool] = []

    def make_room(lacking: Callable[[], bool]) -> None:
        if found:  # not before it waits
            line.queue.give_back("x")
        found.append(lacking())

    line.join("a1", make_room=make_room)
    wait_until(lambda: line.served == ["a1"], "it does not get the place")
    assert found == [True, False]


@pytest.mark.parametrize("seed", range(3))
def test_no_place_is_lost_or_there_twice(seed: int) -> None:
    """Those who wait are served, give up, are refused, fail in a callback, or come too late, in any order."""
    queue = FairQueue(3, max_waiting=6, timeout=0.005)
    never = threading.Event()
    inside: list[int] = []
    outcomes: list[str] = []

    def visit(number: int) -> None:
        rng = random.Random(1000 * seed + number)

        def sometimes_fail(position: int) -> None:
            if rng.random() < 0.1:
                raise RuntimeError

        for _ in range(100):
            client = rng.choice("aaab")
            patient, waiter = rng.random() < 0.2, CallbackWaiter(sometimes_fail, lambda: rng.random() < 0.05)
            try:
                queue.take(client=client, patient=patient, waiter=waiter)
            except (QueueFull, WaitedTooLong, Cancelled, RuntimeError) as error:
                outcomes.append(type(error).__name__)
                continue
            inside.append(number)
            outcomes.append("served")
            assert len(inside) <= 3
            never.wait(rng.random() / 500)
            inside.remove(number)
            queue.give_back(client)

    with ThreadPoolExecutor(16) as pool:
        for visiting in [pool.submit(visit, number) for number in range(16)]:
            visiting.result(timeout=60)
    assert not queue.held and not queue._waiting and not queue._turns
    assert set(outcomes) == {"served", "QueueFull", "WaitedTooLong", "Cancelled", "RuntimeError"}
    for _ in range(3):
        queue.take()
    assert queue.full


def test_who_has_left_is_not_waited_for() -> None:
    queue = FairQueue(1, max_waiting=2, timeout=30)
    queue.take()
    here = threading.Event()

    class Absent(Waiter):
        @property
        def attended(self) -> bool:
            return here.is_set()

    waiting = threading.Thread(target=queue.take, kwargs={"waiter": Absent()})
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
