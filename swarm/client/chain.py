"""The spans that compute one session: their order, recovery when servers fail, and turns when servers are full.

Other servers can recompute each span from the inputs it has received so far or, when those were dropped to bound
memory, from the token ids alone. Everything runs on hivemind's event-loop thread. Methods whose names end in ``soon``
may be called from any thread; they only schedule work on that one.
"""

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import swarm.compat  # noqa: F401

import torch
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import PeerID

from swarm.client.history import History
from swarm.client.routing import MAX_SERVERS_OF_BLOCK, SwarmState
from swarm.client.span import Gap, OtherModel, ServerFailed, Span
from swarm.client.terms import SessionTerms
from swarm.errors import BlocksMissing, CacheFull, SessionClosed, SwarmError

log = logging.getLogger(__name__)

# Servers that one step tries regardless of time: enough for the view to be refilled with new ones several times.
MAX_TRIED = 8 * MAX_SERVERS_OF_BLOCK
LOSSES_KEPT = 32  # the newest, for observers of a session
# A server frees the attention cache of a closed session within a few milliseconds.
FREEING_TIME = 0.05  # seconds
# How often to check whether the swarm has the missing blocks again. Reading its announcements takes 15 ms on loopback,
# and only one reading runs at a time, however many sessions ask for it.
LOOK_PERIOD = 0.2  # seconds


@dataclass(frozen=True)
class Loss:
    """The loss of a server by a session."""

    number: int  # counts the session's losses, from 1
    peer_id: str
    start: int
    end: int  # the server computed blocks [start, end)
    reason: str


class Chain:
    """The spans that compute one session, in order; together they cover all blocks. Lives on the event-loop thread."""

    def __init__(self, terms: SessionTerms) -> None:
        self.terms = terms
        self.spans: list[Span | Gap] = []  # empty before the first step
        self.position = 0  # tokens that have passed through all blocks
        self.recoveries = 0
        self.losses: tuple[Loss, ...] = ()  # replaced, never changed, so any thread may read it
        self.closed = False
        self._history_bytes = 0  # this chain's share of the budget
        self._task: asyncio.Task | None = None

    def close_soon(self) -> None:
        """Close all streams, which frees the servers' caches. Never waits: it may run on the loop's own thread."""
        self.closed = True
        self.reset_soon()

    def reset_soon(self) -> concurrent.futures.Future[None]:
        """Cancel the running step and drop all servers; the next step starts from the first token."""
        return RemoteExpertWorker.run_coroutine(self._reset(), return_future=True)

    async def _reset(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._drop()

    def _drop(self) -> None:
        for span in self.spans:
            if isinstance(span, Span):
                span.close()
        self.spans, self.position = [], 0
        self._account_history()

    def truncate_soon(self, length: int) -> concurrent.futures.Future[None]:
        """Truncate all spans to their first ``length`` tokens; spans whose servers cannot go back become gaps."""
        return RemoteExpertWorker.run_coroutine(self._truncate(length), return_future=True)

    async def _truncate(self, length: int) -> None:
        for index, span in enumerate(self.spans):
            span.history.truncate(length)
            if isinstance(span, Gap) or span.processed <= length:
                continue
            if span.rewinds_to(length):
                span.truncate(length)
            elif span.history.complete:
                span.close()
                self.spans[index] = Gap(span.start, span.end, span.history)
            else:
                self._drop()
                return
        self.position = min(self.position, length)
        self._account_history()

    async def forward(self, inputs: torch.Tensor, start: int) -> torch.Tensor | None:
        """Send the hidden states of tokens [start, start + n) through all blocks.

        :param inputs: [1 or rows, n, hidden size], the embeddings of the tokens; 1 stands for all rows
        :returns: the same shape; or None if the chain is not, or no longer, at ``start``: continue from ``position``
        """
        if self._task is not None:
            # A cancelled step is still winding down and still holds its half of the streams.
            await asyncio.wait({self._task}, timeout=self.terms.limits.connect_timeout)
        if self.closed:
            raise SessionClosed("the session is closed")
        if self.position != start:
            return None
        self._task = task = asyncio.current_task()
        try:
            return await self._forward(inputs, start + inputs.shape[1])
        finally:
            if self._task is task:  # a cancelled step may end after the next one has begun
                self._task = None

    async def _forward(self, inputs: torch.Tensor, end: int) -> torch.Tensor | None:
        turn = _Turn(self.terms.state.cache_turn, self.terms.limits.cache_timeout)
        new = not self.spans
        if new:
            self.spans = [Gap(0, self.terms.state.num_blocks)]
        spans = self.spans
        try:
            if new:
                await turn.wait_behind_others()
            return await self._pass_through(inputs, end, turn)
        except BaseException:
            # Some spans may have processed the step and others not, so the next step starts with clean caches.
            if self.spans is spans:
                self._drop()
            raise
        finally:
            turn.end()

    async def _pass_through(self, inputs: torch.Tensor, end: int, turn: "_Turn") -> torch.Tensor | None:
        spans, hidden, index = self.spans, inputs, 0
        search = _Search()
        while index < len(spans):
            self._check_not_dropped(spans)
            try:
                span = self._span(index, search)
                hidden = await span.step(hidden, end)
            except ServerFailed as failure:
                self._check_not_dropped(spans)
                if not await self._look_elsewhere(index, failure, search, turn):
                    return None
            else:
                self._check_not_dropped(spans)
                self.terms.state.unban(span.peer_id)
                search = _Search()
                index += 1
        self.position = end
        self.terms.state.note_answer()
        self._account_history()
        return hidden[:, -inputs.shape[1] :]

    def _check_not_dropped(self, spans: list[Span | Gap]) -> None:
        """End a step that missed its cancellation: before Python 3.12 asyncio's waits may lose one.

        :raises asyncio.CancelledError: if these are no longer the session's spans
        """
        if self.spans is not spans:
            raise asyncio.CancelledError

    async def _look_elsewhere(self, index: int, failure: ServerFailed, search: "_Search", turn: "_Turn") -> bool:
        """After a failure, drop the server and wait until it makes sense to continue.

        :returns: whether the step can continue; if not, all spans were dropped
        :raises SwarmError: if the failures have lasted longer than their patience
        """
        spans, state = self.spans, self.terms.state
        untried = search.note(spans[index], failure, state)
        if not untried and search.is_over():
            state.note_failure(failure.error)
            raise search.error(failure) from failure
        # A full server has not failed: it is asked again once the others have no room either.
        full = isinstance(failure.error, CacheFull)
        freed = full and not untried and state.free_attention_cache(self._cache_tokens)
        if not self._vacate(index, failure, ban=not full):
            self._drop()
            return False
        if untried:
            return True
        if full:
            await turn.take()
        if freed:
            await asyncio.sleep(FREEING_TIME)
        delay = next(search.delays)
        await asyncio.sleep(min(delay, LOOK_PERIOD) if isinstance(failure.error, BlocksMissing) else delay)
        self._check_not_dropped(spans)
        return True

    @property
    def _cache_tokens(self) -> int:
        """Tokens of attention cache that the session needs on each server."""
        return self.terms.max_length * self.terms.rows

    def _span(self, index: int, search: "_Search") -> Span:
        """Return the span at ``index``. A gap is first replaced by spans, of which the first gets its history.

        :raises ServerFailed: if the gap cannot be filled
        """
        gap = self.spans[index]
        if isinstance(gap, Span):
            return gap
        state, patience = self.terms.state, self.terms.limits.recovery_timeout
        try:
            route = state.route(gap.start, gap.end, self._cache_tokens, search.tried, length=self.terms.max_length)
        except BlocksMissing as error:
            state.refresh()
            raise ServerFailed(error, patience) from error
        except Exception as error:  # something is wrong with the view, which is neither a server's fault nor a caller's
            log.exception("no route could be found")
            missing = BlocksMissing(state.model, range(gap.start, gap.end))
            raise ServerFailed(missing, patience) from error
        histories = [gap.history] + [History() for _ in route[1:]]
        found = [Span(info, history, self.terms) for info, history in zip(route, histories, strict=True)]
        self.spans[index : index + 1] = found
        log.debug("route: %s", ", ".join(f"{span.start}:{span.end} via {span.peer_id}" for span in found))
        return found[0]

    def _vacate(self, index: int, failure: ServerFailed, *, ban: bool) -> bool:
        """Drop a failed server. Return whether its blocks can be computed elsewhere from its history."""
        span = self.spans[index]
        if isinstance(span, Gap):
            return True  # there was no server
        log.warning("blocks %d:%d via %s: %s", span.start, span.end, span.peer_id, failure)
        if span.processed:
            self.recoveries += 1
        if not isinstance(failure.error, CacheFull):  # a full server is alive
            number = self.losses[-1].number + 1 if self.losses else 1
            loss = Loss(number, str(span.peer_id), span.start, span.end, str(failure))
            self.losses = (*self.losses, loss)[-LOSSES_KEPT:]
        span.close()
        if ban:
            self.terms.state.ban(span.peer_id, offence=failure.offence)
        self.spans[index] = Gap(span.start, span.end, span.history)
        return span.history.complete

    def drop_history_soon(self) -> None:
        """Drop the inputs of all spans, which can then be recomputed only from the token ids."""
        RemoteExpertWorker.run_coroutine(self._drop_history(), return_future=True)

    async def _drop_history(self) -> None:
        for span in self.spans:
            span.history.drop()
        self._account_history()

    def _account_history(self) -> None:
        """Count this chain's histories; drop them if all sessions together hold more than the budget."""
        size = sum(span.history.size for span in self.spans)
        self.terms.budget.used += size - self._history_bytes
        if self.terms.budget.used > self.terms.budget.limit or (self.spans and not self.spans[0].history.complete):
            for span in self.spans:
                span.history.drop()
            self.terms.budget.used -= size
            size = 0
        self._history_bytes = size


class _Search:
    """The search for a server that can do its part of a step, from the first failure on."""

    def __init__(self) -> None:
        self.tried: set[PeerID] = set()  # peers that have failed; others are asked first
        self.delays = _retry_delays()
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


class _Turn:
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


def _retry_delays() -> Iterator[float]:
    """Yield seconds to wait: none at first, as another server may be there; then longer, as the swarm must change."""
    yield 0.0
    delay = 0.05
    while True:
        yield delay
        delay = min(delay * 1.5, 1.0)
