"""The registry of inference sessions: open, use, close, expire, bound. Thread-safe; knows nothing of HTTP or petals.

Two locks keep users apart: the registry's, held for moments and never during anything that waits, and each session's
own, held for as long as its user works with it.
"""

import contextlib
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from admission.fair_queue import POLL, FairQueue, QueueFull, WaitedTooLong
from errors import SessionNotFound, ShuttingDown, TimedOut, TooManyRequests, TooManySessions
from generation.loop import Chunk, Detokenizer, encode_inputs, generate, token_budget
from generation.parameters import GenerationParams
from swarm.background import Loop, forever
from swarm.client.warm_sessions import SessionMemory
from swarm.errors import Cancelled

log = logging.getLogger(__name__)


@dataclass(eq=False)
class InferenceSession:
    """One open session. Whoever got it from ``InferenceSessions.use`` has it alone."""

    session_id: str
    model: Any  # SwarmModel
    session: Any  # SwarmSession
    detokenizer: Detokenizer
    # Where its tokens may be found, computed already, and where it may end.
    memory: SessionMemory = field(default_factory=SessionMemory)
    owner: str = ""  # with whom nobody else shares what was computed
    client: str = ""  # of whose share of places and attention cache it takes
    rows: int = 1  # sequences
    may_grow: bool = False  # whether a kept session that is longer may take its place
    remembered: bool = False  # whether it goes to the memory in the end
    cached_tokens: int = 0  # of its first request's tokens, how many were computed already
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0  # threads that use it or wait for it; guarded by the registry's lock
    last_used: float = 0.0  # the registry's clock; guarded by the registry's lock
    kept: bool = False  # whether it outlives its timeout, without its attention cache, until its place is needed
    parked: bool = False  # whether it was unused for so long that its place may go; guarded by the registry's lock
    released: bool = False  # whether its attention cache was freed since its last use; guarded by the registry's lock
    outbox: Any = None  # where the answers of a session go that may outlive its connection
    detached_since: float | None = None  # since when it is without one, registry's clock; guarded by its lock
    closing: bool = False  # to be closed by its last user; guarded by the registry's lock

    def generate(
        self, params: GenerationParams, cancelled: Callable[[], bool], input_ids: list[int] | None = None
    ) -> Iterator[Chunk]:
        """Generate an answer; see ``generation.generate``.

        :param input_ids: the inputs' tokens, if they are known already
        :raises InvalidParameter, TooLong: at once, if the request does not fit the session, which is then unchanged
        """
        if input_ids is None:
            input_ids = encode_inputs(params.inputs, self.session, self.model.tokenizer)
        budget = token_budget(params, self.session, len(input_ids))
        if not self.session.token_ids:
            input_ids = self.recall(input_ids)
        return generate(
            self.session,
            input_ids,
            params,
            budget=budget,
            detokenizer=self.detokenizer,
            defaults=self.model.generation_config,
            cancelled=cancelled,
        )

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

        The tokens stay; whoever uses the session next finds it so, and the cache is computed anew.
        """
        self.released = True
        self.session.release_soon()

    @property
    def room(self) -> int:
        """Tokens that it has left."""
        return self.session.max_length - len(self.session.token_ids)

    def recall(self, token_ids: list[int]) -> list[int]:
        """If these tokens, or the first of them, were computed for a kept session, go on from there.

        For a session without tokens. Returns the tokens that are left to add, and notes the number of the others.
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
        """Count the tokens that the block adds to the session, however it ends, less those computed before."""
        length, cached = len(self.session.token_ids), self.cached_tokens
        try:
            yield
        finally:
            count(len(self.session.token_ids) - length - (self.cached_tokens - cached))

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
        memory: SessionMemory | None = None,
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
        """
        self.memory = SessionMemory() if memory is None else memory
        self.timeout = timeout
        self.resume_timeout = resume_timeout
        self.max_waiting_per_session = max_waiting_per_session
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[str, InferenceSession] = {}
        self._places = FairQueue(max_sessions, max_waiting=max_waiting, timeout=queue_timeout)
        self._refusing = False
        self.loops: list[Loop] = []  # what runs in the background
        self._idle = threading.Condition(self._lock)

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def max_sessions(self) -> int:
        """Sessions open at a time."""
        return self._places.places

    @max_sessions.setter
    def max_sessions(self, value: int) -> None:
        self._places.places = value

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for a session to be closed."""
        return self._places.awaited

    def open(
        self,
        model: Any,
        max_length: int,
        *,
        rows: int = 1,
        kept: bool = False,
        owner: str = "",
        client: str = "",
        cancelled: Callable[[], bool] | None = None,
        on_position: Callable[[int], None] | None = None,
    ) -> str:
        """Open a session and return its id; if all are taken, wait for one to be closed, or take one from who has most.

        :param rows: sequences of the session, see ``SwarmSession``
        :param owner: with whom alone it shares what was computed
        :param client: whose it is where places and attention cache are shared out
        :param kept: the session belongs to an open connection: when unused for ``timeout`` seconds it is not closed,
            but its attention cache is freed, and built anew when it is used again. Its place is given to others only
            when there is no other.
        :param cancelled: looked at while waiting; ends it when it returns true
        :param on_position: told the place among those who wait, whenever it changes
        :raises TooManySessions: if ``max_sessions`` are open, and too many wait or no place becomes free in time
        :raises ShuttingDown: if the program is ending
        :raises SessionLengthExceeded: if the model takes no session so long
        :raises Cancelled: if the wait was ended
        """
        self._check_open()
        try:
            self._places.take(
                client=client,
                cancelled=lambda: self._refusing or (cancelled is not None and cancelled()),
                on_position=on_position,
                make_room=lambda: self._make_room(client),
            )
        except (QueueFull, WaitedTooLong) as error:
            raise TooManySessions(f"all {self.max_sessions} inference sessions are taken: {error}") from None
        try:
            self._check_open()
            session = model.open_session(max_length, rows) if rows > 1 else model.open_session(max_length)
            detokenizer = Detokenizer(model.tokenizer)
            entry = InferenceSession(
                str(uuid.uuid4()), model, session, detokenizer, self.memory, owner, client, rows, kept=kept
            )
        except BaseException:
            self._places.give_back(client)
            raise
        with self._lock:
            entry.last_used = self._clock()
            self._sessions[entry.session_id] = entry
        if self._refusing:  # the program began to end meanwhile, and may have missed this session
            with contextlib.suppress(SessionNotFound):
                self.close(entry.session_id)
            self._check_open()
        return entry.session_id

    def _check_open(self) -> None:
        if self._refusing:
            raise ShuttingDown("the server is shutting down and opens no new sessions")

    def _make_room(self, client: str) -> None:
        """When all places are taken: close what has expired, or else one session that has to give way. Does not wait.

        That is one without its connection, one that was unused for long, or one of a client that has many more.
        """
        self.expire()
        with self._lock:
            entry = self._longest_left() or self._longest_parked() or self._most_dispensable(client)
            if entry is None or not self._places.full:
                return
            entry.remembered = entry.detached_since is not None
            self._remove(entry)
            # At once: others who look for room count the places that each client has.
            self._places.give_back(entry.client)
        self._end(entry)

    def _longest_parked(self) -> InferenceSession | None:
        """Under the lock: of the sessions whose timeout is over, the one that is unused for longest."""
        parked = [entry for entry in self._sessions.values() if entry.parked and entry.users == 0]
        return min(parked, key=lambda entry: entry.last_used, default=None)

    def _most_dispensable(self, client: str) -> InferenceSession | None:
        """Under the lock: for one more session of a client, the one that is unused for longest of who has most.

        Who gives way must have at least two more, and so not fewer in the end: equals never push each other out.
        """
        held = self._places.held
        idle = [
            entry for entry in self._sessions.values() if entry.users == 0 and held[entry.client] >= held[client] + 2
        ]
        return min(idle, key=lambda entry: (-held[entry.client], entry.last_used), default=None)

    def _longest_left(self, model: str | None = None) -> InferenceSession | None:
        """Under the lock: of the unused sessions without a connection, the one that has lost it first."""
        left = [
            (entry.detached_since, number, entry)
            for number, entry in enumerate(self._sessions.values())
            if entry.detached_since is not None and entry.users == 0 and (model is None or entry.model.name == model)
        ]
        return min(left)[2] if left else None

    def free_cache(self, model: str, tokens: int) -> bool:
        """Take so many tokens of attention cache from sessions of a model that nobody uses. Does not wait.

        Those of finished answers are closed first, then those without a connection; others keep their tokens, from
        which the cache is computed anew when they go on. Who is being answered loses nothing.

        :returns: whether there were any
        """
        if self.memory.make_room(model, tokens):
            return True
        with self._lock:
            entry = self._longest_left(model)
            if entry is None:
                return self._release_idle(model, tokens)
            self._remove(entry)
        self._close(entry)
        return True

    def _release_idle(self, model: str, tokens: int) -> bool:
        """Under the lock: free the cache of unused sessions, each time the longest unused one of who holds most."""
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

    def _remove(self, entry: InferenceSession) -> None:
        """Take a session out of the registry, under the lock; its last user, or ``_close``, ends it."""
        del self._sessions[entry.session_id]
        entry.closing = True

    def _close(self, entry: InferenceSession) -> None:
        """End a removed session that nobody uses, and give its place to the next."""
        try:
            self._end(entry)
        finally:
            self._places.give_back(entry.client)

    def _end(self, entry: InferenceSession) -> None:
        if entry.remembered and self.memory.max_sessions:
            self.memory.keep(entry.model.name, entry.owner, entry.session)
        else:
            entry.session.close()

    @contextlib.contextmanager
    def use(
        self,
        session_id: str,
        *,
        wait: float,
        owner: str | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[InferenceSession]:
        """Have a session alone for the time of the block; others who want it wait for their turn.

        :param wait: seconds to wait for one's turn
        :param owner: who asks; others' sessions are not found. None: whoever it is
        :param cancelled: looked at while waiting; ends it when it returns true
        :raises SessionNotFound: if there is no such session
        :raises TooManyRequests: if too many wait for it already
        :raises TimedOut: if one's turn does not come in time
        :raises Cancelled: if the wait was ended
        """
        with self._lock:
            entry = self._find(session_id, owner)
            if self.max_waiting_per_session is not None and entry.users > self.max_waiting_per_session:
                raise TooManyRequests(
                    f"session {session_id} is busy, and {entry.users - 1} requests wait for it already"
                )
            entry.users += 1
            entry.parked = entry.released = False
        try:
            self._await_turn(entry, wait, cancelled)
            try:
                if entry.closing:
                    raise SessionNotFound(f"session {session_id} was closed")
                yield entry
            finally:
                entry.lock.release()
        finally:
            self._leave(entry)

    @staticmethod
    def _await_turn(entry: InferenceSession, wait: float, cancelled: Callable[[], bool] | None) -> None:
        deadline = time.monotonic() + wait
        while not entry.lock.acquire(timeout=max(0.0, min(POLL, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise TimedOut(f"session {entry.session_id} was busy for {wait:.0f} s")
            if cancelled is not None and cancelled():
                raise Cancelled("the wait for the session was given up")

    def _find(self, session_id: str, owner: str | None) -> InferenceSession:
        entry = self._sessions.get(session_id)
        if entry is None or owner not in (None, entry.owner):
            raise SessionNotFound(
                f"no inference session {session_id}: never opened, closed, expired, "
                "or unused when all were taken and somebody with fewer wanted one"
            )
        return entry

    def _leave(self, entry: InferenceSession) -> None:
        with self._lock:
            entry.users -= 1
            entry.last_used = self._clock()
            close = entry.closing and entry.users == 0
            self._idle.notify_all()
        if close:
            self._close(entry)

    @contextlib.contextmanager
    def temporary(
        self,
        model: Any,
        max_length: int,
        *,
        rows: int = 1,
        owner: str = "",
        client: str = "",
        remember: bool = True,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[InferenceSession]:
        """Open a session for the time of the block; see ``open``.

        :param remember: keep it then, for requests that begin with the same tokens
        """
        session_id = self.open(model, max_length, rows=rows, owner=owner, client=client, cancelled=cancelled)
        try:
            with self.use(session_id, wait=0) as entry:
                entry.may_grow = True
                yield entry
        finally:
            with contextlib.suppress(SessionNotFound):
                self.close(session_id, remember=remember and rows == 1)

    def find(self, session_id: str, owner: str | None = None) -> InferenceSession:
        """Return a session without using it: only for what never changes in it, or may be read at any time.

        :param owner: who asks; others' sessions are not found. None: whoever it is
        :raises SessionNotFound: if there is no such session
        """
        with self._lock:
            return self._find(session_id, owner)

    def detach(self, session_id: str) -> None:
        """A session has lost its connection; it is closed if it is not attached to another one in time.

        :raises SessionNotFound: if there is no such session
        """
        with self._lock:
            self._find(session_id, None).detached_since = self._clock()

    def attach(self, session_id: str) -> None:
        """A session has a connection again.

        :raises SessionNotFound: if there is no such session
        :raises ShuttingDown: if the program is ending
        """
        self._check_open()
        with self._lock:
            self._find(session_id, None).detached_since = None

    def close(self, session_id: str, *, owner: str | None = None, remember: bool = False) -> None:
        """Close a session: at once, or when those who use it are done. Does not wait.

        :param owner: who asks; others' sessions are not found. None: whoever it is
        :param remember: keep what was computed, for requests that begin with the same tokens
        :raises SessionNotFound: if there is no such session
        """
        with self._lock:
            entry = self._find(session_id, owner)
            entry.remembered = remember
            self._remove(entry)
            unused = entry.users == 0
        if unused:
            self._close(entry)

    def expire(self) -> int:
        """Close, or park, what was unused for ``timeout`` seconds, or is without its connection; return how many."""
        with self._lock:
            now = self._clock()
            left = [
                entry
                for entry in self._sessions.values()
                if entry.users == 0
                and entry.detached_since is not None
                and now - entry.detached_since >= self.resume_timeout
            ]
            for entry in left:
                entry.remembered = True
                self._remove(entry)
            expired = [
                entry
                for entry in self._sessions.values()
                if entry.users == 0 and not entry.parked and now - entry.last_used >= self.timeout
            ]
            for entry in expired:
                if entry.kept:
                    entry.parked = True
                    entry.release_soon()  # under the lock: nobody begins to use it meanwhile
                else:
                    self._remove(entry)
        expired += left
        for entry in expired:
            try:
                if entry.closing:
                    self._close(entry)
            except Exception:  # of one session: the others must expire all the same
                log.exception("session %s could not be closed", entry.session_id)
        if expired:
            log.info("%d unused sessions expired", len(expired))
        return len(expired)

    def start(self) -> None:
        """Expire sessions from background threads until ``shut_down``."""
        # A session lives at most a tenth longer than its timeout; a look every tenth of a second would be waste.
        timeout = min(
            self.timeout, self.memory.timeout or self.timeout, *([self.resume_timeout] if self.resume_timeout else [])
        )
        period = max(0.1, timeout / 10)
        # Each by itself: what keeps one from going on must not keep the other.
        self.loops = [
            forever("expire-sessions", self.expire, period),
            forever("expire-kept-sessions", self.memory.expire, period),
        ]

    def shut_down(self, timeout: float) -> None:
        """Open no new sessions, let those in use finish for up to ``timeout`` seconds, then close all."""
        for loop in self.loops:
            loop.stop()
        with self._lock:
            self._refusing = True
            self._idle.wait_for(lambda: not any(e.users for e in self._sessions.values()), timeout)
            entries = list(self._sessions.values())
            unused = [entry for entry in entries if entry.users == 0]
            for entry in entries:
                self._remove(entry)
        for entry in entries:
            entry.session.close()  # those in use as well: their time is over
        for entry in unused:
            self._places.give_back(entry.client)
        self.memory.close()
