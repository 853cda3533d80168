"""The registry of inference sessions: open, use, close, expire, bound. Thread-safe; knows nothing of HTTP or petals.

Two locks keep users apart: the registry's, held for moments and never during anything that waits, and each session's
own, held for as long as its user works with it.
"""

import contextlib
import enum
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from admission.fair_queue import POLL, FairQueue, QueueFull, WaitedTooLong
from errors import SessionNotFound, ShuttingDown, TimedOut, TooManyRequests, TooManySessions
from generation.drafting import Drafting
from generation.lengths import token_budget
from generation.loop import Chunk, TokenLogprob, generate, score
from generation.parameters import GenerationParams
from generation.text import Detokenizer, encode_inputs
from swarm.background import Loop, forever
from swarm.client.warm_sessions import WarmSessions
from swarm.waiter import PATIENT, Until, Waiter

if TYPE_CHECKING:
    from swarm.client.model import SwarmModel
    from swarm.client.session import SwarmSession

log = logging.getLogger(__name__)


class State(enum.Enum):
    """The state of a session. The registry's lock guards it, and what changes it::

                   detach                 resume_timeout is over
        OPEN ------------------> DETACHED -----------------------+
         ^ | <------------------                                 |
         | |       attach                                        v
      use| | timeout is over; it belongs to a connection      CLOSING --> closed, by its last user
         | v                                                     ^
        PARKED --------------------------------------------------+
                   its place is needed; closed, from any state

    A session without a connection of its own is closed, not parked, when unused for ``timeout`` seconds.
    """

    OPEN = enum.auto()
    PARKED = enum.auto()  # unused past its timeout: its attention cache is freed, and its place may go
    DETACHED = enum.auto()  # has lost its connection, which may come back
    CLOSING = enum.auto()  # out of the registry


@dataclass(eq=False)
class InferenceSession:
    """One open session. ``InferenceSessions.use`` gives exclusive use of it."""

    session_id: str
    model: "SwarmModel"
    session: "SwarmSession"
    detokenizer: Detokenizer
    # Where its tokens may be found already computed, and where it may be kept in the end.
    memory: WarmSessions = field(default_factory=WarmSessions)
    owner: str = ""  # only this owner's sessions share what was computed
    client: str = ""  # whose share of places and attention cache it uses
    rows: int = 1  # sequences
    connected: bool = False  # whether it belongs to a connection: then it is parked, not closed, when unused for long
    drafting: Drafting | None = None  # whereby several tokens of an answer are computed at once; None: they are not
    may_grow: bool = False  # whether a longer warm session may replace it
    on_close: Callable[[str], None] | None = None  # called with its id when it has ended
    cached_tokens: int = 0  # tokens of its requests that were computed already
    spent_tokens: int = 0  # tokens of its requests and answers that were not
    lock: threading.Lock = field(default_factory=threading.Lock)  # held by its user
    # Guarded by the registry's lock:
    state: State = State.OPEN
    detached_at: float = 0.0  # the registry's clock
    keep_warm: bool = False  # whether it joins the warm sessions when it closes
    users: int = 0  # threads that use it or wait for it
    last_used: float = 0.0  # the registry's clock
    released: bool = False  # whether its attention cache was freed since its last use

    def encode(self, params: GenerationParams) -> list[int]:
        """Turn a request's inputs into tokens that continue the session.

        :raises InvalidParameter: if there is nothing to continue
        :raises SessionLengthExceeded: if the text cannot fit
        """
        return encode_inputs(params, self.session, self.model.tokenizer)

    def generate(
        self, input_ids: list[int], params: GenerationParams, waiter: Waiter = PATIENT
    ) -> Iterator[tuple[int, Chunk]]:
        """Generate an answer in each row; yield (row, chunk), see ``generation.loop.generate``.

        :param input_ids: the request's tokens; empty: continue where the session is
        :raises TooLong: at once, if the request does not fit the session, which is then unchanged
        """
        budget = token_budget(params, self.session, len(input_ids))
        if not self.session.token_ids and self.rows == 1:
            input_ids = self._recall(input_ids)
        detokenizers = [self.detokenizer]
        if self.rows > 1:  # their own: nothing continues them
            detokenizers = [Detokenizer(self.model.tokenizer) for _ in range(self.rows)]
        defaults = self.model.generation_config
        chunks = generate(
            self.session,
            input_ids,
            params,
            budget=budget,
            detokenizers=detokenizers,
            defaults=defaults,
            waiter=waiter,
            drafting=self.drafting,
        )
        return self._counted(len(input_ids), chunks)

    def score(self, token_ids: list[int], count: int, waiter: Waiter = PATIENT) -> list[TokenLogprob]:
        """Return how likely each token of a prompt is, but for its first; see ``generation.loop.score``."""
        self.spent_tokens += len(token_ids) - 1
        return score(self.session, token_ids, count, waiter)

    def _counted(self, added: int, chunks: Iterator[tuple[int, Chunk]]) -> Iterator[tuple[int, Chunk]]:
        self.spent_tokens += added
        for row, chunk in chunks:
            self.spent_tokens += len(chunk.token_ids)
            yield row, chunk

    @property
    def length(self) -> int:
        """Tokens of prompts and answers."""
        return len(self.session.token_ids)

    @property
    def cache_tokens(self) -> int:
        """Tokens of attention cache that it holds, or will in a moment, on each server. Under the registry's lock."""
        holds = self.users or (self.session.position and not self.released)
        return self.session.max_length * self.rows if holds else 0

    def release_soon(self) -> None:
        """Free the attention cache of a session that nobody uses, under the registry's lock. Does not wait.

        The tokens stay; whoever uses the session next finds it so, and the cache is computed again.
        """
        self.released = True
        self.session.release_soon()

    @property
    def room(self) -> int:
        """Tokens that it has left."""
        return self.session.max_length - len(self.session.token_ids)

    def _recall(self, token_ids: list[int]) -> list[int]:
        """Continue from a warm session that has computed these tokens, or the first of them, if there is one.

        Only for a session without tokens. Returns the tokens that are left to add; counts the others as cached.
        """
        if not self.memory:
            return token_ids
        length = self.session.max_length
        found = self.memory.take(
            self.model.name, self.owner, token_ids, length, max_length=None if self.may_grow else length
        )
        if found is None:
            return token_ids
        self.session.close()
        self.session = found
        self.cached_tokens = found.position
        return token_ids[len(found.token_ids) :]

    @contextlib.contextmanager
    def counted(self, count: Callable[[int], None]) -> Iterator[None]:
        """Count the tokens that the block spends, however it ends."""
        spent = self.spent_tokens
        try:
            yield
        finally:
            count(self.spent_tokens - spent)

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Undo what was added to the session if the block fails: its client can send the same request again."""
        length, text_state = len(self.session.token_ids), self.detokenizer.state
        try:
            yield
        except BaseException:
            self.session.truncate(length)
            self.detokenizer.state = text_state
            raise


class InferenceSessions:
    """All inference sessions of the program."""

    def __init__(
        self,
        max_sessions: int,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_waiting: int = 0,
        queue_timeout: float = 0.0,
        resume_timeout: float = 0.0,
        max_waiting_per_session: int | None = None,
        memory: WarmSessions | None = None,
        drafting: bool = False,
    ) -> None:
        """Make an empty registry.

        :param max_sessions: sessions open at a time
        :param timeout: seconds after which an unused session is closed
        :param clock: returns seconds; tests bring their own
        :param max_waiting: how many may wait for a session to be closed when all are taken
        :param queue_timeout: seconds that each of them may wait
        :param resume_timeout: seconds after which a session that has lost its connection is closed
        :param max_waiting_per_session: how many may wait for one session while it is in use; None: any number
        :param memory: keeps sessions that have ended; default: none are kept
        :param drafting: whether several tokens of an answer may be computed at once, see ``generation.drafting``
        """
        self.drafting: dict[str, Drafting] | None = {} if drafting else None  # by the model's name
        self.memory = WarmSessions() if memory is None else memory
        self.timeout = timeout
        self.resume_timeout = resume_timeout
        self.max_waiting_per_session = max_waiting_per_session
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[str, InferenceSession] = {}
        self._places = FairQueue(max_sessions, max_waiting=max_waiting, timeout=queue_timeout)
        self._refusing = threading.Event()
        self.loops: list[Loop] = []  # what runs in the background
        self._idle = threading.Condition(self._lock)

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def max_sessions(self) -> int:
        """Sessions open at a time."""
        return self._places.places

    @property
    def awaited(self) -> bool:
        """Whether anyone waits for a session to be closed."""
        return self._places.awaited

    def open(
        self,
        model: "SwarmModel",
        max_length: int,
        *,
        rows: int = 1,
        connected: bool = False,
        owner: str = "",
        client: str = "",
        on_close: Callable[[str], None] | None = None,
        waiter: Waiter = PATIENT,
    ) -> str:
        """Open a session and return its id; if all are taken, wait for one to be closed, or take one from who has most.

        :param rows: sequences of the session, see ``SwarmSession``
        :param owner: only this owner's sessions share what was computed
        :param client: whose share of places and attention cache it uses
        :param connected: it belongs to an open connection: when unused for ``timeout`` seconds it is not closed, but
            its attention cache is freed, and built again when it is used again. Its place is given to others only when
            there is no other.
        :param on_close: called with the session's id when it has ended, for whatever reason
        :param waiter: waits for a place, and is sent its position in the queue
        :raises TooManySessions: if ``max_sessions`` are open, and too many wait or no place becomes free in time
        :raises ShuttingDown: if the program is ending
        :raises SessionLengthExceeded: if the model takes no session this long
        :raises Cancelled: if the wait was ended
        """
        self._take_place(client, waiter)
        try:
            self._check_open()
            entry = InferenceSession(
                str(uuid.uuid4()),
                model,
                model.open_session(max_length, rows),
                Detokenizer(model.tokenizer),
                self.memory,
                owner,
                client,
                rows,
                connected,
                on_close=on_close,
                drafting=self._drafting_of(model),
            )
        except BaseException:
            self._places.give_back(client)
            raise
        self._add(entry)
        return entry.session_id

    def _drafting_of(self, model: "SwarmModel") -> Drafting | None:
        if self.drafting is None:
            return None
        with self._lock:
            return self.drafting.setdefault(model.name, Drafting()).using(model.draft_model)

    def _take_place(self, client: str, waiter: Waiter) -> None:
        self._check_open()
        try:
            self._places.take(
                client=client,
                waiter=Until(self._refusing, waiter),
                make_room=lambda lacking: self._make_room(client, lacking),
            )
        except (QueueFull, WaitedTooLong) as error:
            raise TooManySessions(f"all {self.max_sessions} inference sessions are taken: {error}") from None

    def _add(self, entry: InferenceSession) -> None:
        with self._lock:
            entry.last_used = self._clock()
            self._sessions[entry.session_id] = entry
        if self._refusing.is_set():  # the program has begun to end, and may have missed this session
            with contextlib.suppress(SessionNotFound):
                self.close(entry.session_id)
            self._check_open()

    def _check_open(self) -> None:
        if self._refusing.is_set():
            raise ShuttingDown("the server is shutting down and opens no new sessions")

    def _make_room(self, client: str, lacking: Callable[[], bool]) -> None:
        """Close expired sessions or, if a place is lacking then, one that has to give way. Does not wait.

        That is one that has lost its connection, one unused for long, or one of a client with many more.
        """
        self.expire()
        with self._lock:
            entry = self._longest_left() or self._longest_parked() or self._most_dispensable(client)
            if entry is None or not lacking():  # those that expired may have left their places to this client
                return
            self._remove(entry, keep_warm=entry.state is State.DETACHED)
            # At once: others who look for a place count those that each client has.
            self._places.give_back(entry.client)
        self._end(entry)

    def _longest_parked(self) -> InferenceSession | None:
        """Return the parked session that has been unused longest. Call with the registry's lock held."""
        parked = [entry for entry in self._sessions.values() if entry.state is State.PARKED and entry.users == 0]
        return min(parked, key=lambda entry: entry.last_used, default=None)

    def _most_dispensable(self, client: str) -> InferenceSession | None:
        """Return the longest unused session of the client with most places. Call with the registry's lock held.

        That client must have at least two places more than the newcomer: equals never push each other out.
        """
        held = self._places.held
        idle = [
            entry for entry in self._sessions.values() if entry.users == 0 and held[entry.client] >= held[client] + 2
        ]
        return min(idle, key=lambda entry: (-held[entry.client], entry.last_used), default=None)

    def _longest_left(self, model: str | None = None) -> InferenceSession | None:
        """Return the unused session that has been disconnected longest. Call with the registry's lock held."""
        left = [
            entry
            for entry in self._sessions.values()
            if entry.state is State.DETACHED and entry.users == 0 and (model is None or entry.model.name == model)
        ]
        return min(left, key=lambda entry: entry.detached_at, default=None)

    def free_attention_cache(self, model: str, tokens: int) -> bool:
        """Free this many tokens of attention cache of unused sessions of a model. Does not wait.

        Those of finished answers are closed first, then those without a connection; others keep their tokens, from
        which the cache is computed again when they go on. Who is being answered loses nothing.

        :returns: whether there were any
        """
        if self.memory.free_attention_cache(model, tokens):
            return True
        with self._lock:
            entry = self._longest_left(model)
            if entry is None:
                return self._release_idle(model, tokens)
            self._remove(entry)
        self._close(entry)
        return True

    def _release_idle(self, model: str, tokens: int) -> bool:
        """Under the lock: free the cache of unused sessions, each time the longest unused of the client with most."""
        entries = [entry for entry in self._sessions.values() if entry.model.name == model and entry.cache_tokens]
        held: Counter[str] = Counter()
        for entry in entries:
            held[entry.client] += entry.cache_tokens
        idle = [entry for entry in entries if entry.users == 0]
        found = bool(idle)
        while idle and tokens > 0:
            entry = min(idle, key=lambda entry: (-held[entry.client], entry.last_used))
            idle.remove(entry)
            tokens -= entry.cache_tokens
            held[entry.client] -= entry.cache_tokens
            entry.release_soon()
        return found

    def _remove(self, entry: InferenceSession, *, keep_warm: bool = False) -> None:
        """Take a session out of the registry, under the lock; its last user, or ``_close``, ends it."""
        del self._sessions[entry.session_id]
        entry.state, entry.keep_warm = State.CLOSING, keep_warm

    def _close(self, entry: InferenceSession) -> None:
        """End a removed session that nobody uses, and give its place to the next."""
        try:
            self._end(entry)
        finally:
            self._places.give_back(entry.client)

    def _end(self, entry: InferenceSession) -> None:
        try:
            if entry.keep_warm and self.memory.max_sessions:
                self.memory.keep(entry.model.name, entry.owner, entry.session)
            else:
                entry.session.close()
        finally:
            if entry.on_close is not None:
                entry.on_close(entry.session_id)

    @contextlib.contextmanager
    def use(
        self,
        session_id: str,
        *,
        wait: float,
        owner: str | None = None,
        waiter: Waiter = PATIENT,
    ) -> Iterator[InferenceSession]:
        """Use a session exclusively for the time of the block; others wait for their turn.

        :param wait: seconds to wait for the turn
        :param owner: who asks; others' sessions are not found. None: any owner's are
        :param waiter: who waits for it
        :raises SessionNotFound: if there is no such session
        :raises TooManyRequests: if too many wait for it already
        :raises TimedOut: if the turn does not come in time
        :raises Cancelled: if the wait was ended
        """
        with self._lock:
            entry = self._find(session_id, owner)
            if self.max_waiting_per_session is not None and entry.users > self.max_waiting_per_session:
                raise TooManyRequests(
                    f"session {session_id} is busy, and {entry.users - 1} requests wait for it already"
                )
            entry.users += 1
            entry.released = False
            if entry.state is State.PARKED:
                entry.state = State.OPEN
        try:
            self._await_turn(entry, wait, waiter)
            try:
                if entry.state is State.CLOSING:
                    raise SessionNotFound(f"session {session_id} was closed")
                yield entry
            finally:
                entry.lock.release()
        finally:
            self._leave(entry)

    @staticmethod
    def _await_turn(entry: InferenceSession, wait: float, waiter: Waiter) -> None:
        deadline = time.monotonic() + wait
        while not entry.lock.acquire(timeout=max(0.0, min(POLL, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise TimedOut(f"session {entry.session_id} was busy for {wait:.0f} s")
            waiter.look()

    def _find(self, session_id: str, owner: str | None) -> InferenceSession:
        entry = self._sessions.get(session_id)
        if entry is None or owner not in (None, entry.owner):
            raise SessionNotFound(
                f"no inference session {session_id}: never opened, closed, expired, "
                "or closed while unused to make room for others; open a new one"
            )
        return entry

    def _leave(self, entry: InferenceSession) -> None:
        with self._lock:
            entry.users -= 1
            entry.last_used = self._clock()
            close = entry.state is State.CLOSING and entry.users == 0
            self._idle.notify_all()
        if close:
            self._close(entry)

    @contextlib.contextmanager
    def temporary(
        self,
        model: "SwarmModel",
        max_length: int,
        *,
        rows: int = 1,
        owner: str = "",
        client: str = "",
        keep_warm: bool = True,
        waiter: Waiter = PATIENT,
    ) -> Iterator[InferenceSession]:
        """Open a session for the time of the block; see ``open``.

        :param keep_warm: keep it afterwards, for requests that begin with the same tokens
        """
        session_id = self.open(model, max_length, rows=rows, owner=owner, client=client, waiter=waiter)
        try:
            with self.use(session_id, wait=0) as entry:
                entry.may_grow = True
                yield entry
        finally:
            with contextlib.suppress(SessionNotFound):
                self.close(session_id, keep_warm=keep_warm and rows == 1)

    def find(self, session_id: str, owner: str | None = None) -> InferenceSession:
        """Return a session without using it, to read what never changes or may be read at any time.

        :param owner: who asks; others' sessions are not found. None: any owner's are
        :raises SessionNotFound: if there is no such session
        """
        with self._lock:
            return self._find(session_id, owner)

    def detach(self, session_id: str) -> None:
        """Note that a session has lost its connection. It is closed unless it gets another one in time.

        :raises SessionNotFound: if there is no such session
        """
        with self._lock:
            entry = self._find(session_id, None)
            entry.state, entry.detached_at = State.DETACHED, self._clock()

    def attach(self, session_id: str) -> None:
        """Note that a session has a connection again.

        :raises SessionNotFound: if there is no such session
        :raises ShuttingDown: if the program is ending
        """
        self._check_open()
        with self._lock:
            self._find(session_id, None).state = State.OPEN

    def close(self, session_id: str, *, owner: str | None = None, keep_warm: bool = False) -> None:
        """Close a session at once, or when its users are done. Does not wait.

        :param owner: who asks; others' sessions are not found. None: any owner's are
        :param keep_warm: keep what was computed, for requests that begin with the same tokens
        :raises SessionNotFound: if there is no such session
        """
        with self._lock:
            entry = self._find(session_id, owner)
            self._remove(entry, keep_warm=keep_warm)
            unused = entry.users == 0
        if unused:
            self._close(entry)

    def expire(self) -> int:
        """Close or park sessions unused for ``timeout`` seconds, or without their connection; return how many."""
        with self._lock:
            now = self._clock()
            unused = [entry for entry in self._sessions.values() if entry.users == 0]
            moved = [entry for entry in unused if self._move_on(entry, now)]
            # Read under the lock: a parked one may give way to another session as soon as the lock is free.
            removed = [entry for entry in moved if entry.state is State.CLOSING]
        for entry in removed:
            try:
                self._close(entry)
            except Exception:  # one session's: the others must expire all the same
                log.exception("session %s could not be closed", entry.session_id)
        if moved:
            log.info("%d unused sessions expired", len(moved))
        return len(moved)

    def _move_on(self, entry: InferenceSession, now: float) -> bool:
        """Under the lock: move an unused session to its next state if its time has come."""
        if entry.state is State.DETACHED and now - entry.detached_at >= self.resume_timeout:
            self._remove(entry, keep_warm=True)
            return True
        if now - entry.last_used < self.timeout or entry.state is State.PARKED:
            return False
        if not entry.connected:
            self._remove(entry)
            return True
        if entry.state is State.DETACHED:
            if not entry.released:
                entry.release_soon()
            return False
        entry.state = State.PARKED
        entry.release_soon()  # under the lock: nobody begins to use it meanwhile
        return True

    def start(self) -> None:
        """Expire sessions from background threads until ``shut_down``."""
        # A session lives at most a tenth longer than its timeout. Looking more than ten times a second is a waste.
        timeout = min(
            self.timeout, self.memory.timeout or self.timeout, *([self.resume_timeout] if self.resume_timeout else [])
        )
        period = max(0.1, timeout / 10)
        # Two loops: if one is held up, the other is not.
        self.loops = [
            forever("expire-sessions", self.expire, period),
            forever("expire-kept-sessions", self.memory.expire, period),
        ]

    def shut_down(self, timeout: float) -> None:
        """Open no new sessions, let those in use finish for up to ``timeout`` seconds, then close all."""
        for loop in self.loops:
            loop.stop()
        with self._lock:
            self._refusing.set()
            self._idle.wait_for(lambda: not any(e.users for e in self._sessions.values()), timeout)
            entries = list(self._sessions.values())
            unused = [entry for entry in entries if entry.users == 0]
            for entry in entries:
                self._remove(entry)
        with contextlib.ExitStack() as closing:  # one that cannot be closed keeps no other from it
            closing.callback(self.memory.close)
            for entry in entries:
                # Of one in use, the time is over: its users find it closed, and the last one ends it.
                closing.callback(*((self._close, entry) if entry in unused else (entry.session.close,)))
