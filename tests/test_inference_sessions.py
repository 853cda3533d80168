"""The session registry with fake models and a clock of the test's own; threads meet at events, nobody sleeps."""

import contextlib
import random
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from errors import ApiError, SessionNotFound, ShuttingDown, TimedOut, TooManyRequests, TooManySessions
from generation.parameters import GenerationParams
from generation.text import Detokenizer
from inference_sessions import InferenceSession, InferenceSessions
from swarm.client.warm_sessions import WarmSessions
from swarm.errors import Cancelled, SessionLengthExceeded
from swarm.tokenization import TextTokenizer
from swarm.waiter import PATIENT, Waiter
from tests.support.tiny import make_tokenizer
from tests.test_session import wait_until

TIMEOUT = 300.0  # seconds after which an unused session expires, on the test's clock
LIMIT = 10.0  # seconds that a thread may take to do what needs milliseconds; only a failing test waits so long
TOKENIZER = TextTokenizer(make_tokenizer())


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """Where a fake call waits, if the test has closed it."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self.open.set()

    def close(self) -> None:
        self.reached.clear()
        self.open.clear()

    def pass_through(self) -> None:
        self.reached.set()
        assert self.open.wait(LIMIT), "the test never opened the gate"


class FakeSession:
    """Records what is done to it."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.token_ids: list[int] = []
        self.calls: list[str] = []
        self.closed = threading.Event()
        self.position = 0  # tokens in the attention cache
        self.gate = Gate()
        self.error: Exception | None = None  # what `close` raises

    def truncate(self, length: int) -> None:
        self.calls.append("truncate")
        del self.token_ids[length:]

    def release_soon(self) -> None:
        self.calls.append("release")
        self.position = 0

    def close(self) -> None:
        self.gate.pass_through()
        self.calls.append("close")
        self.closed.set()
        if self.error is not None:
            raise self.error


class FakeModel:
    name = "it"

    def __init__(self) -> None:
        self.tokenizer = TOKENIZER
        self.opened: list[FakeSession] = []
        self.gate = Gate()
        self.error: Exception | None = None  # what `open_session` raises

    def open_session(self, max_length: int, rows: int = 1) -> FakeSession:
        self.gate.pass_through()
        if self.error is not None:
            raise self.error
        self.opened.append(FakeSession(max_length))
        return self.opened[-1]


def fake(it: Any) -> Any:
    """Return it as what it stands for: of another type, and all that is used of it."""
    return it


class WatchedLock:
    """A lock that tells when somebody wants it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.wanted = threading.Event()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        self.wanted.set()
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        self._lock.release()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def model() -> Any:
    return FakeModel()


@pytest.fixture
def sessions(clock: Clock) -> Iterator[InferenceSessions]:
    sessions = InferenceSessions(3, TIMEOUT, clock)
    yield sessions
    sessions.shut_down(0)


@pytest.fixture
def pool(model: Any) -> Iterator[ThreadPoolExecutor]:
    """Threads; when the test ends all gates are opened, so that they end as well."""
    with ThreadPoolExecutor(32) as pool:
        yield pool
        for gate in (model.gate, *(session.gate for session in model.opened)):
            gate.open.set()


def entry_of(sessions: InferenceSessions, session_id: str) -> InferenceSession:
    with sessions.use(session_id, wait=0) as entry:
        return entry


def use_briefly(sessions: InferenceSessions, session_id: str) -> None:
    with sessions.use(session_id, wait=LIMIT):
        pass


def is_open(sessions: InferenceSessions, session_id: str) -> bool:
    try:
        entry_of(sessions, session_id)
    except SessionNotFound:
        return False
    return True


def all_is_well(sessions: InferenceSessions, model: Any, pool: ThreadPoolExecutor, known: str) -> None:
    """Check, from another thread, that the registry answers to others."""

    def work() -> None:
        entry_of(sessions, known)
        session_id = sessions.open(model, 8)
        entry_of(sessions, session_id)
        sessions.close(session_id)
        assert not is_open(sessions, session_id)

    pool.submit(work).result(timeout=LIMIT)


# Opening and closing


def test_open_use_close(sessions: InferenceSessions, model: Any) -> None:
    first, second = sessions.open(model, 16), sessions.open(model, 32)
    assert uuid.UUID(first) != uuid.UUID(second)
    assert len(sessions) == 2
    with sessions.use(second, wait=0) as entry:
        assert entry.session_id == second
        assert fake(entry.model) is model
        assert fake(entry.session) is model.opened[1]
        assert entry.session.max_length == 32
        entry.session.token_ids.append(5)
        detokenizer = entry.detokenizer
    with sessions.use(second, wait=0) as entry:
        assert entry.session.token_ids == [5]
        assert entry.detokenizer is detokenizer
    sessions.close(second)
    assert len(sessions) == 1
    assert [session.calls for session in model.opened] == [[], ["close"]]


def test_unknown_session(sessions: InferenceSessions, model: Any) -> None:
    closed = sessions.open(model, 16)
    sessions.close(closed)
    for session_id in (closed, str(uuid.uuid4()), "", "\udead"):
        with pytest.raises(SessionNotFound), sessions.use(session_id, wait=0):
            pytest.fail("there is no such session")
        with pytest.raises(SessionNotFound):
            sessions.close(session_id)
    assert model.opened[0].calls == ["close"]


def test_bound(sessions: InferenceSessions, model: Any) -> None:
    ids = [sessions.open(model, 16) for _ in range(3)]
    for _ in range(2):
        with pytest.raises(TooManySessions, match="all 3 inference sessions are taken"):
            sessions.open(model, 16)
    assert len(model.opened) == 3  # the model was not even asked
    sessions.close(ids[1])
    ids[1] = sessions.open(model, 16)
    with pytest.raises(TooManySessions):
        sessions.open(model, 16)
    assert all(is_open(sessions, session_id) for session_id in ids)


@pytest.mark.parametrize("error", [SessionLengthExceeded("too long"), RuntimeError("no memory")])
def test_failing_open_leaks_no_place(sessions: InferenceSessions, model: Any, error: Exception) -> None:
    model.error = error
    for _ in range(10):
        with pytest.raises(type(error), match=str(error)):
            sessions.open(model, 16)
        with pytest.raises(type(error)), sessions.temporary(model, 16):
            pytest.fail("it cannot be opened")
    model.error = None
    assert len(sessions) == 0
    for _ in range(3):
        sessions.open(model, 16)


def test_session_that_is_being_opened_has_its_place(
    sessions: InferenceSessions, model: Any, pool: ThreadPoolExecutor
) -> None:
    model.gate.close()
    opening = [pool.submit(sessions.open, model, 16) for _ in range(4)]
    refused = wait(opening, LIMIT, return_when="FIRST_COMPLETED").done
    assert [type(future.exception()) for future in refused] == [TooManySessions]
    assert model.opened == []
    model.gate.open.set()
    ids = {future.result(timeout=LIMIT) for future in opening if future not in refused}
    assert len(ids) == len(sessions) == 3


def test_place_is_never_free_between_opening_and_open(
    sessions: InferenceSessions, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the opening thread lets the registry's lock go, others find all places taken."""
    sessions._places.places = 1
    lock, trying = sessions._lock, threading.Event()
    outcomes: list[type[ApiError] | None] = []

    class TellingLock:
        """The registry's lock, with another client who tries his luck whenever it is let go."""

        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()
            if model.opened and not trying.is_set():
                trying.set()
                try:
                    sessions.open(model, 16)
                    outcomes.append(None)
                except TooManySessions:
                    outcomes.append(TooManySessions)
                trying.clear()

    with monkeypatch.context() as patch:
        patch.setattr(sessions, "_lock", TellingLock())
        sessions.open(model, 16)
    assert set(outcomes) == {TooManySessions}
    assert len(sessions) == 1


# Using


def test_one_session_has_one_user_at_a_time(sessions: InferenceSessions, model: Any, pool: ThreadPoolExecutor) -> None:
    session_id = sessions.open(model, 16)
    barrier = threading.Barrier(16)
    inside: list[int] = []

    def work(i: int) -> None:
        barrier.wait(LIMIT)
        for _ in range(20):
            with sessions.use(session_id, wait=LIMIT) as entry:
                inside.append(i)
                entry.session.token_ids.append(len(entry.session.token_ids))
                assert inside == [i]
                inside.remove(i)

    done = [pool.submit(work, i) for i in range(16)]
    for future in done:
        future.result(timeout=LIMIT)
    assert model.opened[0].token_ids == list(range(320))


def test_waiting_for_one_s_turn(sessions: InferenceSessions, model: Any, pool: ThreadPoolExecutor) -> None:
    session_id = sessions.open(model, 16)
    entry_of(sessions, session_id).lock = lock = WatchedLock()  # type: ignore[assignment]
    order = []

    def second() -> None:
        with sessions.use(session_id, wait=LIMIT):
            order.append("second")

    with sessions.use(session_id, wait=0):
        lock.wanted.clear()
        waiting = pool.submit(second)
        assert lock.wanted.wait(LIMIT)
        order.append("first")
    waiting.result(timeout=LIMIT)
    assert order == ["first", "second"]


def test_busy_session_times_out(sessions: InferenceSessions, model: Any) -> None:
    session_id = sessions.open(model, 16)
    with sessions.use(session_id, wait=0):
        with pytest.raises(TimedOut, match=f"session {session_id} was busy for 0 s"):
            entry_of(sessions, session_id)
        assert model.opened[0].calls == []
    assert is_open(sessions, session_id)
    sessions.close(session_id)  # nobody is taken for a user any more, so it closes at once
    assert model.opened[0].calls == ["close"]


def test_sessions_do_not_wait_for_each_other(sessions: InferenceSessions, model: Any, pool: ThreadPoolExecutor) -> None:
    ids = [sessions.open(model, 16) for _ in range(3)]
    barrier = threading.Barrier(3)

    def work(session_id: str) -> None:
        with sessions.use(session_id, wait=0):
            barrier.wait(LIMIT)  # passed only when all three are inside

    for future in [pool.submit(work, session_id) for session_id in ids]:
        future.result(timeout=LIMIT)


def test_user_s_failure_gives_the_session_free(sessions: InferenceSessions, model: Any) -> None:
    session_id = sessions.open(model, 16)
    for error in (RuntimeError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), sessions.use(session_id, wait=0):
            raise error
    assert is_open(sessions, session_id)


def test_close_during_use_waits_for_the_last_user(
    sessions: InferenceSessions, model: Any, pool: ThreadPoolExecutor
) -> None:
    session_id = sessions.open(model, 16)
    session = model.opened[0]
    entry_of(sessions, session_id).lock = lock = WatchedLock()  # type: ignore[assignment]
    with sessions.use(session_id, wait=0):
        lock.wanted.clear()
        waiting = pool.submit(use_briefly, sessions, session_id)
        assert lock.wanted.wait(LIMIT)
        sessions.close(session_id)
        assert len(sessions) == 0 and not is_open(sessions, session_id)
        with pytest.raises(SessionNotFound):
            sessions.close(session_id)
        assert session.calls == []
    assert isinstance(waiting.exception(timeout=LIMIT), SessionNotFound)
    assert session.closed.wait(LIMIT)
    assert session.calls == ["close"]


def test_closed_by_its_own_user(sessions: InferenceSessions, model: Any) -> None:
    session_id = sessions.open(model, 16)
    with sessions.use(session_id, wait=0):
        sessions.close(session_id)
        assert model.opened[0].calls == []
    assert model.opened[0].calls == ["close"]


# A block that fails


def test_undone_on_error(sessions: InferenceSessions, model: Any) -> None:
    session_id = sessions.open(model, 16)
    with sessions.use(session_id, wait=0) as entry:
        entry.session.token_ids += [5, 6]
        for error in (ValueError, KeyboardInterrupt):
            with pytest.raises(error), entry.undone_on_error():
                entry.session.token_ids += [7, 8]
                raise error
            assert entry.session.token_ids == [5, 6]
    assert model.opened[0].calls == ["truncate"] * 2


def test_done_without_error(sessions: InferenceSessions, model: Any) -> None:
    session_id = sessions.open(model, 16)
    with sessions.use(session_id, wait=0) as entry, entry.undone_on_error():
        entry.session.token_ids += [7, 8]
    assert (model.opened[0].token_ids, model.opened[0].calls) == ([7, 8], [])


@pytest.mark.parametrize("sent", range(1, 4))
def test_half_a_character_survives_a_failure(sent: int) -> None:
    """The same request, sent again after a failure, gets the text that it would have got."""
    bee = TOKENIZER.encode("a🐝")
    session, detokenizer = FakeSession(16), Detokenizer(TOKENIZER)
    entry = InferenceSession("id", fake(FakeModel()), fake(session), detokenizer)
    session.token_ids += bee[: sent + 1]
    assert "".join(detokenizer.add(token_id) for token_id in session.token_ids) == "a"
    with pytest.raises(ValueError), entry.undone_on_error():
        session.token_ids.append(bee[sent + 1])
        detokenizer.add(bee[sent + 1])
        raise ValueError
    assert session.token_ids == bee[: sent + 1]
    assert "".join(detokenizer.add(token_id) for token_id in bee[sent + 1 :]) == "🐝"


def test_text_of_a_failed_request_is_forgotten() -> None:
    bee = TOKENIZER.encode("🐝")
    session, detokenizer = FakeSession(16), Detokenizer(TOKENIZER)
    entry = InferenceSession("id", fake(FakeModel()), fake(session), detokenizer)
    session.token_ids.append(TOKENIZER.encode("a")[0])
    detokenizer.restart(session.token_ids)
    with pytest.raises(ValueError), entry.undone_on_error():
        session.token_ids += bee[:2]
        assert [detokenizer.add(token_id) for token_id in bee[:2]] == ["", ""]
        raise ValueError
    assert "".join(detokenizer.add(token_id) for token_id in bee) == "🐝"


# Temporary sessions


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_temporary_session(sessions: InferenceSessions, model: Any, error: type[BaseException] | None) -> None:
    with pytest.raises(error) if error else contextlib.nullcontext():
        with sessions.temporary(model, 7) as entry:
            assert entry.session.max_length == 7
            assert len(sessions) == 1
            assert model.opened[0].calls == []
            if error:
                raise error
    assert len(sessions) == 0
    assert model.opened[0].calls == ["close"]


def test_temporary_session_has_a_place(sessions: InferenceSessions, model: Any) -> None:
    sessions._places.places = 1
    with sessions.temporary(model, 7), pytest.raises(TooManySessions), sessions.temporary(model, 7):
        pytest.fail("there is only one place")
    sessions.open(model, 7)


def test_temporary_session_that_others_close(sessions: InferenceSessions, model: Any) -> None:
    with sessions.temporary(model, 7) as entry:
        sessions.close(entry.session_id)
        assert model.opened[0].calls == []
    assert model.opened[0].calls == ["close"]


# Expiring


def test_unused_session_expires(sessions: InferenceSessions, model: Any, clock: Clock) -> None:
    first = sessions.open(model, 16)
    clock.now += TIMEOUT / 2
    second = sessions.open(model, 16)
    clock.now += TIMEOUT / 2 - 0.001
    assert sessions.expire() == 0
    clock.now += 0.001
    assert sessions.expire() == 1
    assert [session.calls for session in model.opened] == [["close"], []]
    assert not is_open(sessions, first)
    assert is_open(sessions, second)
    assert sessions.expire() == 0


def test_timeout_counts_from_the_end_of_the_last_use(sessions: InferenceSessions, model: Any, clock: Clock) -> None:
    session_id = sessions.open(model, 16)
    with sessions.use(session_id, wait=0):
        clock.now += TIMEOUT - 1
    clock.now += TIMEOUT - 1
    assert sessions.expire() == 0
    clock.now += 1
    assert sessions.expire() == 1
    assert not is_open(sessions, session_id)


@pytest.mark.parametrize("kept", [False, True])
def test_session_in_use_does_not_expire(sessions: InferenceSessions, model: Any, clock: Clock, kept: bool) -> None:
    session_id = sessions.open(model, 16, connected=kept)
    with sessions.use(session_id, wait=0):
        clock.now += 100 * TIMEOUT
        assert sessions.expire() == 0
        sessions.open(model, 16)  # looks for expired sessions as well
        assert model.opened[0].calls == []
    assert sessions.expire() == 0
    assert is_open(sessions, session_id)


def test_session_that_somebody_waits_for_does_not_expire(
    sessions: InferenceSessions, model: Any, clock: Clock, pool: ThreadPoolExecutor
) -> None:
    session_id = sessions.open(model, 16)
    entry_of(sessions, session_id).lock = lock = WatchedLock()  # type: ignore[assignment]
    lock.acquire()  # as if a user had not quite left
    lock.wanted.clear()
    waiting = pool.submit(use_briefly, sessions, session_id)
    assert lock.wanted.wait(LIMIT)
    clock.now += 100 * TIMEOUT
    assert sessions.expire() == 0
    lock.release()
    waiting.result(timeout=LIMIT)
    assert is_open(sessions, session_id)


def test_opening_makes_room_of_expired_sessions(sessions: InferenceSessions, model: Any, clock: Clock) -> None:
    for _ in range(3):
        sessions.open(model, 16)
    clock.now += TIMEOUT
    for _ in range(3):
        sessions.open(model, 16)
    assert [session.calls for session in model.opened] == [["close"]] * 3 + [[]] * 3


def test_expiry_in_the_background(model: Any, clock: Clock) -> None:
    sessions = InferenceSessions(3, 0.5, clock)
    sessions.open(model, 16)
    others = set(threading.enumerate())  # an app of other tests has such a thread too
    sessions.start()
    (thread,) = {thread for thread in threading.enumerate() if thread.name == "expire-sessions"} - others
    clock.now += 1
    assert model.opened[0].closed.wait(LIMIT)
    sessions.shut_down(0)
    thread.join(LIMIT)
    assert not thread.is_alive()


def test_failure_of_one_session_does_not_keep_others_from_expiring(
    sessions: InferenceSessions, model: Any, clock: Clock
) -> None:
    for kept in (False, False, True):
        sessions.open(model, 16, connected=kept)
    model.opened[0].error = RuntimeError("the event loop has ended")
    clock.now += TIMEOUT
    sessions.open(model, 16)
    assert [session.calls for session in model.opened] == [["close"], ["close"], ["release"], []]


# Sessions of open connections


def test_kept_session_is_parked(sessions: InferenceSessions, model: Any, clock: Clock) -> None:
    session_id = sessions.open(model, 16, connected=True)
    session = model.opened[0]
    for times in (1, 2):
        clock.now += TIMEOUT
        assert sessions.expire() == 1
        assert session.calls == ["release"] * times
        clock.now += 10 * TIMEOUT
        assert sessions.expire() == 0  # it is parked already
        assert session.calls == ["release"] * times
        assert is_open(sessions, session_id)
        clock.now += TIMEOUT - 1
        assert sessions.expire() == 0
        clock.now -= TIMEOUT - 1
    sessions.close(session_id)
    assert session.calls == ["release", "release", "close"]


def test_parked_sessions_give_way_the_longest_unused_first(
    sessions: InferenceSessions, model: Any, clock: Clock
) -> None:
    ids = [sessions.open(model, 16, connected=True) for _ in range(3)]
    for session_id in (ids[2], ids[0], ids[1]):
        clock.now += 1
        entry_of(sessions, session_id)
    clock.now += TIMEOUT
    assert sessions.expire() == 3
    new = sessions.open(model, 16)
    assert [session.calls[1:] for session in model.opened] == [[], [], ["close"], []]
    assert len(sessions) == 3
    with pytest.raises(SessionNotFound):
        entry_of(sessions, ids[2])
    assert is_open(sessions, ids[1])  # and is parked no more
    sessions.open(model, 16)
    assert [session.calls[1:] for session in model.opened] == [["close"], [], ["close"], [], []]
    with pytest.raises(TooManySessions):
        sessions.open(model, 16)
    assert is_open(sessions, ids[1]) and is_open(sessions, new)


def test_parked_sessions_stay_while_there_is_room(sessions: InferenceSessions, model: Any, clock: Clock) -> None:
    parked = [sessions.open(model, 16, connected=True) for _ in range(2)]
    clock.now += TIMEOUT
    sessions.open(model, 16)
    assert all(is_open(sessions, session_id) for session_id in parked)


def test_parked_session_in_use_does_not_give_way(sessions: InferenceSessions, model: Any, clock: Clock) -> None:
    ids = [sessions.open(model, 16, connected=True) for _ in range(3)]
    clock.now += TIMEOUT
    sessions.expire()
    with contextlib.ExitStack() as users:
        for session_id in ids:
            users.enter_context(sessions.use(session_id, wait=0))
        with pytest.raises(TooManySessions):
            sessions.open(model, 16)
    assert all(is_open(sessions, session_id) for session_id in ids)


def test_kept_session_that_is_not_parked_does_not_give_way(sessions: InferenceSessions, model: Any) -> None:
    for _ in range(3):
        sessions.open(model, 16, connected=True)
    with pytest.raises(TooManySessions):
        sessions.open(model, 16)


# Sessions that have lost their connection


@pytest.fixture
def resumable(clock: Clock) -> Iterator[InferenceSessions]:
    sessions = InferenceSessions(3, TIMEOUT, clock, resume_timeout=60.0)
    yield sessions
    sessions.shut_down(0)


def test_detached_session_is_closed_after_its_own_timeout(
    resumable: InferenceSessions, model: Any, clock: Clock
) -> None:
    lost, found, connected = (resumable.open(model, 16, connected=True) for _ in range(3))
    for session_id in (lost, found):
        resumable.detach(session_id)
    clock.now += 59
    assert resumable.expire() == 0
    resumable.attach(found)
    with resumable.use(lost, wait=0):
        clock.now += 1
        assert resumable.expire() == 0  # not under a user
    assert resumable.expire() == 1
    assert [session.calls for session in model.opened] == [["close"], [], []]
    assert is_open(resumable, found) and is_open(resumable, connected)
    for call in (resumable.attach, resumable.detach, resumable.find):
        with pytest.raises(SessionNotFound):
            call(lost)


def test_detached_sessions_give_way_before_parked_ones(resumable: InferenceSessions, model: Any, clock: Clock) -> None:
    parked, second, first = (resumable.open(model, 16, connected=True) for _ in range(3))
    clock.now += TIMEOUT
    resumable.expire()
    for session_id in (first, second):
        clock.now += 1
        resumable.detach(session_id)
    for gone in (first, second, parked):
        assert gone in resumable._sessions
        resumable.open(model, 16)
        assert gone not in resumable._sessions
    with pytest.raises(TooManySessions):
        resumable.open(model, 16)


def test_attention_cache_of_detached_sessions_is_given_to_others(
    resumable: InferenceSessions, model: Any, clock: Clock
) -> None:
    session_id = resumable.open(model, 16, connected=True)
    assert not resumable.free_attention_cache("it", 100)
    resumable.detach(session_id)
    with resumable.use(session_id, wait=0):
        assert not resumable.free_attention_cache("it", 100)
    assert not resumable.free_attention_cache("another", 100)
    assert resumable.free_attention_cache("it", 100)
    assert len(resumable) == 0


# Shares of different clients


def test_hoarder_gives_way_the_longest_unused_first(model: Any, clock: Clock) -> None:
    sessions = InferenceSessions(64, TIMEOUT, clock)
    hoard = []
    for _ in range(64):
        clock.now += 0.1
        hoard.append(sessions.open(model, 16, client="hoarder"))
    entry_of(sessions, hoard[0])  # used again, and so the last to go
    clock.now += 0.1
    for number in range(32):
        sessions.open(model, 16, client="newcomer")
        with pytest.raises(SessionNotFound, match="to make room for others"):
            entry_of(sessions, hoard[number + 1])
    assert sum(session_id in sessions._sessions for session_id in hoard) == len(sessions) - 32 == 32
    for client in ("hoarder", "newcomer"):  # who have equally many now
        with pytest.raises(TooManySessions):
            sessions.open(model, 16, client=client)
    sessions.open(model, 16, client="a third one")
    sessions.shut_down(0)
    assert not sessions._places.held


def test_equal_clients_do_not_displace_each_other(sessions: InferenceSessions, model: Any) -> None:
    ids = [sessions.open(model, 16, client=client) for client in "abc"]
    for client in "abcd":
        with pytest.raises(TooManySessions):
            sessions.open(model, 16, client=client)
    assert all(is_open(sessions, session_id) for session_id in ids)


def test_session_in_use_is_not_displaced(sessions: InferenceSessions, model: Any, clock: Clock) -> None:
    ids = [sessions.open(model, 16, connected=True, client="hoarder") for _ in range(3)]
    with contextlib.ExitStack() as users:
        users.enter_context(sessions.use(ids[0], wait=0))
        with contextlib.ExitStack() as others:
            for session_id in ids[1:]:
                others.enter_context(sessions.use(session_id, wait=0))
            with pytest.raises(TooManySessions):
                sessions.open(model, 16, client="newcomer")
        clock.now += 1
        sessions.open(model, 16, client="newcomer")
        assert [is_open(sessions, session_id) for session_id in ids[1:]] == [False, True]
    assert model.opened[0].calls == []


def test_sessions_removed_in_use_have_their_places(sessions: InferenceSessions, model: Any) -> None:
    """They are not in the registry any more, but nobody else can have their places yet: others have to give way."""
    ids = [sessions.open(model, 16, client="hoarder") for _ in range(3)]
    with contextlib.ExitStack() as users:
        for session_id in ids[:2]:
            users.enter_context(sessions.use(session_id, wait=0))
            sessions.close(session_id)
        sessions.open(model, 16, client="newcomer")
        assert [session.calls for session in model.opened] == [[], [], ["close"], []]
        with pytest.raises(TooManySessions):
            sessions.open(model, 16, client="newcomer")
    assert sessions._places.held == {"newcomer": 1}


def test_waiting_for_one_session_is_bounded(sessions: InferenceSessions, model: Any, pool: ThreadPoolExecutor) -> None:
    sessions.max_waiting_per_session = 2
    busy, other = sessions.open(model, 16), sessions.open(model, 16)
    with sessions.use(busy, wait=0):
        waiting = [pool.submit(use_briefly, sessions, busy) for _ in range(2)]
        wait_until(lambda: sessions.find(busy).users == 3, "they do not wait")
        for _ in range(3):
            with pytest.raises(TooManyRequests, match=f"session {busy} is busy, and 2 requests wait for it already"):
                use_briefly(sessions, busy)
        use_briefly(sessions, other)
    for future in waiting:
        future.result(timeout=LIMIT)
    use_briefly(sessions, busy)


def test_unused_sessions_are_released_of_who_holds_most_first(
    model: Any, clock: Clock, sessions: InferenceSessions
) -> None:
    sessions._places.places = 8
    lengths = {"a": 100, "b": 60, "c": 60, "d": 60, "e": 30, "f": 500}  # the name is also the order of last use
    clients = {"a": "small", "b": "large", "c": "large", "d": "large", "e": "small", "f": "idle"}
    ids, calls = {}, {}
    for name, length in lengths.items():
        clock.now += 1
        ids[name] = sessions.open(model, length, client=clients[name])
        calls[name] = model.opened[-1].calls
        model.opened[-1].position = 0 if name == "f" else 1  # which has not computed anything yet
    released: list[str] = []

    def free(tokens: int) -> list[str]:
        before = {name for name in calls if calls[name]}
        assert sessions.free_attention_cache("it", tokens) == bool({n for n in calls if calls[n]} - before)
        return sorted({name for name in calls if calls[name]} - before)

    with sessions.use(ids["c"], wait=0):  # who is being answered loses nothing
        released += free(1)
        assert released == ["b"]  # 180 of the large one against 130
        assert free(1) == ["a"]  # 120 against 130
        assert free(61) == ["d", "e"]
        assert free(1) == []
    assert free(1) == ["c"]
    assert not sessions.free_attention_cache("another", 1)
    assert all(is_open(sessions, session_id) for session_id in ids.values())
    model.opened[0].position = 1
    with sessions.use(ids["a"], wait=0):
        pass
    calls["a"].clear()
    assert free(1) == ["a"]


def test_sessions_of_others_are_not_found(sessions: InferenceSessions, model: Any) -> None:
    session_id = sessions.open(model, 16, owner="ann")
    assert sessions.find(session_id, "ann").session_id == session_id
    with pytest.raises(SessionNotFound):
        sessions.find(session_id, "bob")


def test_cache_is_not_freed_under_a_user(sessions: InferenceSessions, model: Any, clock: Clock) -> None:
    """Whoever comes while expired sessions are looked for was faster, or finds the cache freed already."""
    session_id = sessions.open(model, 16, connected=True)
    seen: list[list[str]] = []

    class User:
        """The registry's lock, with somebody who uses the session as soon as it is let go."""

        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()
            sessions._lock = lock
            with sessions.use(session_id, wait=0) as entry:
                seen.append(list(fake(entry.session).calls))

    lock = sessions._lock
    clock.now += TIMEOUT
    sessions._lock = User()  # type: ignore[assignment]
    assert sessions.expire() == 1
    assert (seen, model.opened[0].calls) == ([["release"]], ["release"])


# Nothing waits under the registry's lock


def close_one(sessions: InferenceSessions, ids: list[str], clock: Clock) -> None:
    sessions.close(ids[0])


def close_as_last_user(sessions: InferenceSessions, ids: list[str], clock: Clock) -> None:
    with sessions.use(ids[0], wait=0):
        sessions.close(ids[0])


def expire_one(sessions: InferenceSessions, ids: list[str], clock: Clock) -> None:
    clock.now += TIMEOUT / 2
    entry_of(sessions, ids[1])
    clock.now += TIMEOUT / 2
    sessions.expire()


# A kept session does not end with its timeout: it is parked, which waits for nothing.
@pytest.mark.parametrize(
    ("end", "kept"),
    [
        (close_one, False),
        (close_one, True),
        (close_as_last_user, False),
        (close_as_last_user, True),
        (expire_one, False),
    ],
)
def test_blocking_end_of_a_session_blocks_nobody_else(
    sessions: InferenceSessions,
    model: Any,
    clock: Clock,
    pool: ThreadPoolExecutor,
    end: Callable[[InferenceSessions, list[str], Clock], None],
    kept: bool,
) -> None:
    ids = [sessions.open(model, 16, connected=kept and i == 0) for i in range(2)]
    model.opened[0].gate.close()
    ending = pool.submit(end, sessions, ids, clock)
    assert model.opened[0].gate.reached.wait(LIMIT)
    all_is_well(sessions, model, pool, ids[1])
    assert not ending.done()
    model.opened[0].gate.open.set()
    ending.result(timeout=LIMIT)
    assert len(model.opened[0].calls) == 1


def test_blocking_close_of_a_session_that_gives_way_blocks_nobody_else(
    sessions: InferenceSessions, model: Any, clock: Clock, pool: ThreadPoolExecutor
) -> None:
    sessions._places.places = 2
    sessions.open(model, 16, connected=True)
    clock.now += TIMEOUT
    sessions.expire()
    known = sessions.open(model, 16)
    model.opened[0].gate.close()
    opening = pool.submit(sessions.open, model, 16)
    assert model.opened[0].gate.reached.wait(LIMIT)
    pool.submit(entry_of, sessions, known).result(timeout=LIMIT)
    model.opened[0].gate.open.set()
    assert is_open(sessions, opening.result(timeout=LIMIT))


def test_a_session_parked_while_another_expires_gives_its_place_once(
    sessions: InferenceSessions, model: Any, clock: Clock, pool: ThreadPoolExecutor
) -> None:
    sessions._places.places = 2
    sessions.open(model, 16)
    sessions.open(model, 16, connected=True)
    model.opened[0].gate.close()
    clock.now += TIMEOUT
    ending = pool.submit(sessions.expire)
    assert model.opened[0].gate.reached.wait(LIMIT)
    sessions.open(model, 16)  # in the place of the parked one
    model.opened[0].gate.open.set()
    ending.result(timeout=LIMIT)
    assert [session.calls.count("close") for session in model.opened] == [1, 1, 0]
    assert sum(sessions._places.held.values()) == len(sessions) == 1


def test_who_waits_takes_the_place_of_one(model: Any, clock: Clock, pool: ThreadPoolExecutor) -> None:
    """An expired session leaves its place; then none of those that could give way has to."""
    sessions = InferenceSessions(2, TIMEOUT, clock, max_waiting=1, queue_timeout=LIMIT)
    sessions.open(model, 16)
    kept = sessions.open(model, 16, connected=True)
    opening = pool.submit(sessions.open, model, 16)
    wait_until(lambda: sessions.awaited, "it does not wait")
    clock.now += TIMEOUT  # the first expires now, the other is parked
    opening.result(timeout=LIMIT)
    assert [session.calls.count("close") for session in model.opened] == [1, 0, 0]
    assert is_open(sessions, kept) and len(sessions) == 2
    sessions.shut_down(0)


def test_blocking_shut_down_of_a_session_blocks_nobody_else(
    sessions: InferenceSessions, model: Any, pool: ThreadPoolExecutor
) -> None:
    sessions.open(model, 16)
    model.opened[0].gate.close()
    ending = pool.submit(sessions.shut_down, 0)
    assert model.opened[0].gate.reached.wait(LIMIT)
    assert isinstance(pool.submit(sessions.open, model, 16).exception(timeout=LIMIT), ShuttingDown)
    model.opened[0].gate.open.set()
    ending.result(timeout=LIMIT)


def test_blocking_open_blocks_nobody_else(sessions: InferenceSessions, model: Any, pool: ThreadPoolExecutor) -> None:
    known = sessions.open(model, 16)
    slow = FakeModel()
    slow.gate.close()
    opening = pool.submit(sessions.open, fake(slow), 16)
    assert slow.gate.reached.wait(LIMIT)
    all_is_well(sessions, model, pool, known)
    assert sessions.expire() == 0
    slow.gate.open.set()
    assert is_open(sessions, opening.result(timeout=LIMIT))


# Shutting down


def wait_until_refusing(sessions: InferenceSessions, model: Any) -> None:
    for _ in range(1_000_000):
        try:
            sessions.close(sessions.open(model, 1))
        except ShuttingDown:
            return
    pytest.fail("sessions are opened for ever")


def test_shut_down_closes_all(sessions: InferenceSessions, model: Any, clock: Clock) -> None:
    ids = [sessions.open(model, 16, connected=kept) for kept in (False, True)]
    clock.now += TIMEOUT / 2
    sessions.shut_down(LIMIT)
    assert [session.calls for session in model.opened] == [["close"], ["close"]]
    assert len(sessions) == 0
    assert not any(is_open(sessions, session_id) for session_id in ids)
    with pytest.raises(ShuttingDown):
        sessions.open(model, 16)
    with pytest.raises(ShuttingDown), sessions.temporary(model, 16):
        pytest.fail("it was shut down")


def test_shut_down_closes_all_although_one_cannot_be_closed(sessions: InferenceSessions, model: Any) -> None:
    for _ in range(3):
        sessions.open(model, 16)
    model.opened[0].error = RuntimeError("the stream is broken")
    with pytest.raises(RuntimeError, match="the stream is broken"):
        sessions.shut_down(0)
    assert [fake.closed.is_set() for fake in model.opened[1:]] == [True, True]


def test_shut_down_lets_users_finish(sessions: InferenceSessions, model: Any, pool: ThreadPoolExecutor) -> None:
    ids = [sessions.open(model, 16) for _ in range(2)]
    with contextlib.ExitStack() as users:
        for session_id in ids:
            users.enter_context(sessions.use(session_id, wait=0))
        ending = pool.submit(sessions.shut_down, 3 * LIMIT)
        wait_until_refusing(sessions, model)
        assert not ending.done()
        assert [session.calls for session in model.opened[:2]] == [[], []]
    ending.result(timeout=LIMIT)
    assert [session.calls for session in model.opened[:2]] == [["close"], ["close"]]


def test_shut_down_does_not_wait_for_ever(sessions: InferenceSessions, model: Any) -> None:
    session_id = sessions.open(model, 16)
    with sessions.use(session_id, wait=0):
        sessions.shut_down(0)
        assert model.opened[0].closed.is_set()
        assert len(sessions) == 0
    sessions.shut_down(0)


def test_session_opened_during_shut_down_is_closed(
    sessions: InferenceSessions, model: Any, pool: ThreadPoolExecutor
) -> None:
    model.gate.close()
    opening = pool.submit(sessions.open, model, 16)
    assert model.gate.reached.wait(LIMIT)
    pool.submit(sessions.shut_down, 0).result(timeout=LIMIT)
    model.gate.open.set()
    assert isinstance(opening.exception(timeout=LIMIT), ShuttingDown)
    assert model.opened[0].calls == ["close"]
    assert len(sessions) == 0


# Everything at once


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Let threads take turns thousands of times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Visitor:
    """Does what clients do, at random, and checks what must always hold."""

    def __init__(self, sessions: InferenceSessions, model: Any, clock: Clock, ids: list[str], seed: int) -> None:
        self.sessions, self.model, self.clock, self.ids = sessions, model, clock, ids
        self.random = random.Random(seed)

    def visit(self) -> None:
        actions = (self.open, self.use, self.use, self.use, self.close, self.expire, self.temporary, self.free_cache)
        for _ in range(150):
            try:
                self.random.choice(actions)()
            except (SessionNotFound, TooManySessions):
                continue  # another visitor closed it, or took the last place
            finally:
                assert len(self.sessions) <= self.sessions.max_sessions

    def open(self) -> None:
        client = self.random.choice("aab")  # one that wants more than the other
        self.ids.append(self.sessions.open(self.model, 16, connected=self.random.random() < 0.5, client=client))

    def use(self) -> None:
        if self.ids:
            with self.sessions.use(self.random.choice(self.ids[-8:]), wait=LIMIT) as entry:
                self.work_with(fake(entry.session))

    def work_with(self, session: FakeSession) -> None:
        before = list(session.calls)
        session.token_ids.append(1)
        session.position = 1
        assert len(session.token_ids) == 1, "somebody else uses it"
        self.clock.now += self.random.random() * TIMEOUT / 4
        session.token_ids.pop()
        assert session.calls == before and "close" not in before, "it was closed or freed under its user"

    def close(self) -> None:
        if self.ids:
            self.sessions.close(self.random.choice(self.ids[-8:]))

    def expire(self) -> None:
        self.sessions.expire()

    def free_cache(self) -> None:
        self.sessions.free_attention_cache(self.model.name, 16)

    def temporary(self) -> None:
        with self.sessions.temporary(self.model, 16) as entry:
            self.work_with(fake(entry.session))


@pytest.mark.usefixtures("eager_threads")
@pytest.mark.parametrize("seed", range(3))
def test_many_threads(model: Any, clock: Clock, pool: ThreadPoolExecutor, seed: int) -> None:
    sessions = InferenceSessions(5, TIMEOUT, clock)
    ids: list[str] = []
    visitors = [Visitor(sessions, model, clock, ids, 100 * seed + i) for i in range(12)]
    visits: list[Future[None]] = [pool.submit(visitor.visit) for visitor in visitors]
    for visit in visits:
        visit.result(timeout=3 * LIMIT)
    sessions.shut_down(0)
    assert len(sessions) == 0 and not sessions._places.held
    assert all(session.calls.count("close") == 1 for session in model.opened)
    assert any("release" in session.calls for session in model.opened)


def test_many_sessions_through_few_places(pool: ThreadPoolExecutor, model: Any, clock: Clock) -> None:
    """All threads want a place at the same moment; as many get one as there are."""
    barrier = threading.Barrier(16)
    for _ in range(20):
        sessions = InferenceSessions(4, TIMEOUT, clock)

        def work(sessions: InferenceSessions = sessions) -> bool:
            barrier.wait(LIMIT)
            try:
                sessions.open(model, 16)
            except TooManySessions:
                return False
            return True

        opened = [future.result(timeout=LIMIT) for future in [pool.submit(work) for _ in range(16)]]
        assert sum(opened) == len(sessions) == 4
        sessions.shut_down(0)


class SpeakingSession(FakeSession):
    """One whose model always says the same."""

    closed = False  # type: ignore[assignment]

    def __init__(self, max_length: int) -> None:
        super().__init__(max_length)
        del self.closed

    def drop_history(self) -> None:
        self.calls.append("drop_history")

    def close(self) -> None:
        self.calls.append("close")

    def append(self, token_ids: Sequence[int]) -> None:
        self.token_ids.extend(token_ids)

    def step(self, token_ids: Sequence[int] = (), *, waiter: Waiter = PATIENT) -> torch.Tensor:
        self.append(token_ids)
        self.position = len(self.token_ids)
        return torch.nn.functional.one_hot(torch.tensor(7), TOKENIZER.size).float()

    def step_bounded(self, token_ids: Sequence[int] = (), *, waiter: Waiter = PATIENT) -> torch.Tensor:
        return self.step(token_ids, waiter=waiter)


@pytest.mark.parametrize("error", [None, Cancelled("hung up")])
def test_tokens_are_counted_however_it_ends(error: Exception | None) -> None:
    """All that were added, less those that a warm session had computed; also if they are taken back afterwards."""
    warm = SpeakingSession(16)
    warm.append([1, 2])
    warm.position = 2
    memory = WarmSessions(1, 100, 60.0)
    memory.keep("it", "", fake(warm))
    model: Any = FakeModel()
    model.generation_config = GenerationConfig()
    entry = InferenceSession("id", model, fake(SpeakingSession(16)), Detokenizer(TOKENIZER), memory)
    counts: list[int] = []
    with contextlib.suppress(Cancelled), entry.undone_on_error(), entry.counted(counts.append):
        for _ in entry.generate([1, 2, 3, 4, 5], GenerationParams(max_new_tokens=2)):
            if error is not None:
                raise error
    assert entry.cached_tokens == 2
    assert counts == [3 + 2 if error is None else 3 + 1]
    assert len(entry.session.token_ids) == (7 if error is None else 0)
