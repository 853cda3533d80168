"""The registry of inference sessions: open, use, close, expire, bound. Thread-safe; knows nothing of HTTP or petals.

Two locks keep users apart: the registry's, held for moments and never during anything that waits, and each session's
own, held for as long as its user works with it.
"""

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from errors import SessionNotFound, ShuttingDown, TimedOut, TooManySessions
from generation import Detokenizer

log = logging.getLogger(__name__)


@dataclass(eq=False)
class InferenceSession:
    """One open session. Whoever got it from ``InferenceSessions.use`` has it alone."""

    session_id: str
    model: Any  # SwarmModel
    session: Any  # SwarmSession
    detokenizer: Detokenizer
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0  # threads that use it or wait for it; guarded by the registry's lock
    last_used: float = 0.0  # the registry's clock; guarded by the registry's lock
    kept: bool = False  # whether it outlives its timeout, without its attention cache, until its place is needed
    parked: bool = False  # whether its attention cache was freed by the timeout; guarded by the registry's lock
    closing: bool = False  # to be closed by its last user; guarded by the registry's lock

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Undo what was added to the session if the block fails: its client can send the same request again."""
        length = len(self.session.token_ids)
        try:
            yield
        except BaseException:
            self.session.truncate(length)
            self.detokenizer.restart(self.session.token_ids)
            raise


class InferenceSessions:
    """All inference sessions of the program."""

    def __init__(self, max_sessions: int, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Make an empty registry.

        :param max_sessions: sessions open at a time
        :param timeout: seconds after which an unused session is closed
        :param clock: returns seconds; tests bring their own
        """
        self.max_sessions = max_sessions
        self.timeout = timeout
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[str, InferenceSession] = {}
        self._opening = 0  # places taken by sessions that are being opened
        self._refusing = False
        self._stop = threading.Event()
        self._idle = threading.Condition(self._lock)

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, model: Any, max_length: int, *, kept: bool = False) -> str:
        """Open a session and return its id.

        :param kept: the session belongs to an open connection: when unused for ``timeout`` seconds it is not closed,
            but its attention cache is freed, and built anew when it is used again. Its place is given to others only
            when there is no other.
        :raises TooManySessions: if ``max_sessions`` are open
        :raises ShuttingDown: if the program is ending
        :raises SessionLengthExceeded: if the model takes no session so long
        """
        self.expire()
        with self._lock:
            if self._refusing:
                raise ShuttingDown("the server is shutting down and opens no new sessions")
            if len(self._sessions) + self._opening >= self.max_sessions and not self._evict():
                raise TooManySessions(f"all {self.max_sessions} inference sessions are taken, try again later")
            self._opening += 1
        try:
            session = model.open_session(max_length)
            entry = InferenceSession(str(uuid.uuid4()), model, session, Detokenizer(model.tokenizer), kept=kept)
        finally:
            with self._lock:
                self._opening -= 1
        with self._lock:
            entry.last_used = self._clock()
            self._sessions[entry.session_id] = entry
        return entry.session_id

    def _evict(self) -> bool:
        """Give up the place of the parked session that was unused for longest, if there is one. Under the lock."""
        parked = [entry for entry in self._sessions.values() if entry.parked and entry.users == 0]
        if not parked:
            return False
        entry = min(parked, key=lambda entry: entry.last_used)
        del self._sessions[entry.session_id]
        entry.closing = True
        entry.session.close()  # it holds nothing on the servers any more, so that this does not touch the network
        return True

    @contextlib.contextmanager
    def use(self, session_id: str, *, wait: float) -> Iterator[InferenceSession]:
        """Have a session alone for the time of the block; others who want it wait for their turn.

        :param wait: seconds to wait for one's turn
        :raises SessionNotFound: if there is no such session
        :raises TimedOut: if one's turn does not come in time
        """
        with self._lock:
            entry = self._find(session_id)
            entry.users += 1
            entry.parked = False
        try:
            if not entry.lock.acquire(timeout=wait):
                raise TimedOut(f"session {session_id} was busy for {wait:.0f} s")
            try:
                if entry.closing:
                    raise SessionNotFound(f"session {session_id} was closed")
                yield entry
            finally:
                entry.lock.release()
        finally:
            self._leave(entry)

    def _find(self, session_id: str) -> InferenceSession:
        entry = self._sessions.get(session_id)
        if entry is None:
            raise SessionNotFound(f"no inference session {session_id}: never opened, closed, or expired")
        return entry

    def _leave(self, entry: InferenceSession) -> None:
        with self._lock:
            entry.users -= 1
            entry.last_used = self._clock()
            close = entry.closing and entry.users == 0
            self._idle.notify_all()
        if close:
            entry.session.close()

    @contextlib.contextmanager
    def temporary(self, model: Any, max_length: int) -> Iterator[InferenceSession]:
        """Open a session for the time of the block."""
        session_id = self.open(model, max_length)
        try:
            with self.use(session_id, wait=0) as entry:
                yield entry
        finally:
            with contextlib.suppress(SessionNotFound):
                self.close(session_id)

    def close(self, session_id: str) -> None:
        """Close a session: at once, or when those who use it are done. Does not wait.

        :raises SessionNotFound: if there is no such session
        """
        with self._lock:
            entry = self._find(session_id)
            del self._sessions[session_id]
            entry.closing = True
            unused = entry.users == 0
        if unused:
            entry.session.close()

    def expire(self) -> int:
        """Close, or park, the sessions that nobody has used for ``timeout`` seconds; return how many."""
        with self._lock:
            now = self._clock()
            expired = [
                entry
                for entry in self._sessions.values()
                if entry.users == 0 and not entry.parked and now - entry.last_used >= self.timeout
            ]
            for entry in expired:
                entry.parked = entry.kept
                entry.closing = not entry.kept
                if entry.closing:
                    del self._sessions[entry.session_id]
        for entry in expired:
            if entry.closing:
                entry.session.close()
            else:
                self._free_cache(entry)
        if expired:
            log.info("%d unused sessions expired", len(expired))
        return len(expired)

    @staticmethod
    def _free_cache(entry: InferenceSession) -> None:
        if entry.lock.acquire(blocking=False):  # taken: somebody uses it again
            try:
                if entry.parked:
                    entry.session.release()
            finally:
                entry.lock.release()

    def start(self) -> None:
        """Expire sessions from a background thread until ``shut_down``."""
        threading.Thread(target=self._expire_forever, name="expire-sessions", daemon=True).start()

    def _expire_forever(self) -> None:
        # A session lives at most a tenth longer than its timeout; a look every tenth of a second would be waste.
        while not self._stop.wait(max(0.1, self.timeout / 10)):
            self.expire()

    def shut_down(self, timeout: float) -> None:
        """Open no new sessions, let those in use finish for up to ``timeout`` seconds, then close all."""
        self._stop.set()
        with self._lock:
            self._refusing = True
            self._idle.wait_for(lambda: not any(e.users for e in self._sessions.values()), timeout)
            entries = list(self._sessions.values())
            self._sessions.clear()
            for entry in entries:
                entry.closing = True
        for entry in entries:
            entry.session.close()
