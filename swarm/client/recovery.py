"""How long a session looks for servers that can do its part of a step, and whose turn it is when servers are full."""

import asyncio
import time
from collections.abc import Iterator

import swarm.compat  # noqa: F401

from hivemind.p2p import PeerID

from swarm.client.routing import MAX_SERVERS_OF_BLOCK, SwarmState
from swarm.client.span import Gap, OtherModel, ServerFailed, Span
from swarm.errors import BlocksMissing, CacheFull, SwarmError

# Servers that one step tries regardless of time: enough for the view to be refilled with new ones several times.
MAX_TRIED = 8 * MAX_SERVERS_OF_BLOCK


class Search:
    """The search for a server that can do its part of a step, from the first failure on."""

    def __init__(self) -> None:
        self.tried: set[PeerID] = set()  # peers that have failed; others are asked first
        self.delays = retry_delays()
        self._since: float | None = None
        self._patience = 0.0  # seconds, the longest of all failures
        self._other_model: OtherModel | None = None  # a server that holds the blocks of one

    def note(self, span: Span | Gap, failure: ServerFailed, state: SwarmState) -> bool:
        """Record a failure; return whether untried servers are left for its blocks.

        However many servers refuse, once each, an answer that another one can compute is computed. The number tried is
        limited, since an attacker may announce new servers faster than they are tried.
        """
        self._since = self._since or time.monotonic()
        patience = failure.patience
        if isinstance(failure, OtherModel):
            self._other_model = failure
        elif self._other_model is not None and isinstance(failure.error, BlocksMissing):
            patience = self._other_model.patience  # they are held, by servers that do not change
        self._patience = max(self._patience, patience)
        if isinstance(span, Gap):  # there was no server
            return False
        self.tried.add(span.peer_id)
        return len(self.tried) <= MAX_TRIED and state.has_others(span.start, span.end, self.tried)

    def error(self, last: ServerFailed) -> SwarmError:
        """Return why the search has failed: blocks that only servers of another model hold are not just missing."""
        if self._other_model is not None and isinstance(last.error, BlocksMissing):
            return self._other_model.error
        return last.error

    def is_over(self) -> bool:
        """Whether the search has exhausted its patience."""
        return self._since is not None and time.monotonic() - self._since > self._patience


class Turn:
    """A turn among the sessions that wait for attention cache to become free: first come, first served."""

    def __init__(self, lock: asyncio.Lock, timeout: float) -> None:
        self._lock = lock
        self._timeout = timeout  # seconds
        self._has_it = False

    async def wait_behind_others(self) -> None:
        """Let sessions that already wait go first; costs nothing if there are none."""
        if self._lock.locked():
            await self.take()

    async def take(self) -> None:
        """Wait for the turn.

        :raises CacheFull: if it does not come in time
        """
        if not self._has_it:
            try:
                await asyncio.wait_for(self._lock.acquire(), self._timeout)
            except TimeoutError:
                raise CacheFull(f"other sessions were ahead for attention cache for {self._timeout:.0f} s") from None
            self._has_it = True

    def end(self) -> None:
        """Pass the turn to the next session."""
        if self._has_it:
            self._lock.release()
            self._has_it = False


def retry_delays() -> Iterator[float]:
    """Yield seconds to wait: none at first, as another server may be there; then longer, as the swarm must change."""
    yield 0.0
    delay = 0.05
    while True:
        yield delay
        delay = min(delay * 1.5, 1.0)
