"""Warm sessions: the sessions of finished answers, kept for a while so that a request with their tokens can reuse them.

Each turn of a chat sends the whole conversation. Its tokens begin with those of the turn before, whose attention cache
the servers still hold if the session was not closed; then only the new tokens have to be computed. A session serves one
request at a time: it is taken out for that, and another request for the same one meanwhile starts from scratch.
"""

import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.errors import SwarmError

if TYPE_CHECKING:
    from swarm.client.session import SwarmSession

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Warm:
    session: "SwarmSession"
    model: str
    owner: str
    since: float  # by the clock of WarmSessions


class WarmSessions:
    """Warm sessions, bounded in number, tokens and time; the least recently used is evicted first. Thread-safe.

    Only truncating a session waits, and by then it belongs to the taker alone.
    """

    def __init__(
        self,
        max_sessions: int = 0,
        max_tokens: int = 0,
        timeout: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start empty; by default nothing is ever kept.

        :param max_sessions: sessions kept at a time; 0: none
        :param max_tokens: tokens of attention cache that they may hold together
        :param timeout: seconds for which each is kept
        :param clock: returns seconds; tests pass their own
        """
        self.max_sessions = max_sessions
        self.max_tokens = max_tokens
        self.timeout = timeout
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: list[_Warm] = []  # oldest first
        self._closed = False

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def tokens(self) -> int:
        """The tokens of attention cache that the kept sessions hold."""
        with self._lock:
            return sum(kept.session.max_length for kept in self._kept)

    def keep(self, model: str, owner: str, session: "SwarmSession") -> None:
        """Take over an unused session; close it now if it cannot be reused, otherwise later.

        :param owner: only requests of the same owner can take it
        """
        with self._lock:
            useful = session.position > 0 and not session.closed and not self._closed
            if useful and session.max_length <= self.max_tokens and self.max_sessions > 0:
                session.drop_history()  # running answers need that memory more
                self._kept.append(_Warm(session, model, owner, self._clock()))
                dropped = self._drop_excess()
            else:
                dropped = [session]
        close_all(dropped)

    def _drop_excess(self) -> list["SwarmSession"]:
        dropped = []
        tokens = sum(kept.session.max_length for kept in self._kept)
        while len(self._kept) > self.max_sessions or tokens > self.max_tokens:
            session = self._kept.pop(0).session
            tokens -= session.max_length
            dropped.append(session)
        return dropped

    def take(
        self, model: str, owner: str, token_ids: Sequence[int], min_length: int, max_length: int | None = None
    ) -> "SwarmSession | None":
        """Return the session that shares the longest prefix with these tokens, truncated to that prefix.

        At least one token is left to process. A session is not taken if truncating would lose more than it saves.

        :param min_length, max_length: bounds of its ``max_length``
        :returns: a session whose ``token_ids`` are a prefix of the given ones; or None
        """
        self.expire()
        with self._lock:
            best, common = None, 0
            for kept in self._kept:
                session = kept.session
                if (kept.model, kept.owner) != (model, owner) or session.max_length < min_length:
                    continue
                if max_length is not None and session.max_length > max_length:
                    continue
                processed = session.token_ids[: session.position]
                shared = min(common_prefix(processed, token_ids), len(token_ids) - 1)
                lost = len(processed) - shared
                # Servers that cannot go back would have to recompute everything.
                if shared > common and lost <= shared and (lost == 0 or session.rewinds_to(shared)):
                    best, common = kept, shared
            if best is None:
                return None
            self._kept.remove(best)
        try:
            best.session.truncate(common)
        except (SwarmError, TimeoutError):
            log.exception("a kept session could not be truncated")
            best.session.close()
            return None
        return best.session

    def free_attention_cache(self, model: str, tokens: int) -> bool:
        """Close sessions of a model that hold this many tokens of attention cache, if there are any. Does not wait.

        :returns: whether there were any
        """
        dropped = []
        with self._lock:
            for kept in [kept for kept in self._kept if kept.model == model]:
                if tokens <= 0:
                    break
                self._kept.remove(kept)
                tokens -= kept.session.max_length
                dropped.append(kept.session)
        close_all(dropped)
        return bool(dropped)

    def expire(self) -> None:
        """Close the sessions that are too old."""
        with self._lock:
            oldest = self._clock() - self.timeout
            dropped = [kept.session for kept in self._kept if kept.since <= oldest]
            self._kept = [kept for kept in self._kept if kept.since > oldest]
        close_all(dropped)

    def close(self) -> None:
        """Close all sessions; from now on ``keep`` closes them too."""
        with self._lock:
            self._closed = True
            dropped, self._kept = [kept.session for kept in self._kept], []
        close_all(dropped)


def close_all(sessions: Sequence["SwarmSession"]) -> None:
    """Close sessions; does not wait."""
    for session in sessions:
        session.close()


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with in common."""
    longest = min(len(first), len(second))
    # Bisect over slices, which the interpreter compares natively: a loop over tokens would be fifty times slower.
    return bisect_left(range(longest), True, key=lambda n: first[: n + 1] != second[: n + 1])
