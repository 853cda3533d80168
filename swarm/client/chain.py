"""The spans that compute one session: their order, recovery when servers fail, and turns when servers are full.

Other servers can recompute each span from the inputs it has received so far or, when those were dropped to bound
memory, from the token ids alone. Everything runs on hivemind's event-loop thread. Methods whose names end in ``soon``
may be called from any thread; they only schedule work on that one.
"""

import asyncio
import concurrent.futures
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import swarm.compat  # noqa: F401

import torch
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker

from swarm.client.flow import Broken, Flow
from swarm.client.history import History
from swarm.client.recovery import Search, Turn
from swarm.client.span import Gap, ServerFailed, Span
from swarm.client.terms import SessionTerms
from swarm.errors import BlocksMissing, CacheFull, SessionClosed

log = logging.getLogger(__name__)

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
            if isinstance(span, Span) and span.processed > length and not self._cut(index, length):
                return
        self.position = min(self.position, length)
        self._account_history()

    def _cut(self, index: int, length: int) -> bool:
        """Have a server forget all but its first ``length`` tokens; one that cannot is dropped.

        :returns: False if that was not possible without dropping all
        """
        span = self.spans[index]
        assert isinstance(span, Span)
        if span.rewinds_to(length):
            span.truncate(length)
        elif span.history.complete:
            self._leave(index)
        else:
            self._drop()
            return False
        return True

    def _leave(self, index: int) -> None:
        """Close a span, and let its blocks be a gap."""
        span = self.spans[index]
        if isinstance(span, Span):
            span.close()
            self.spans[index] = Gap(span.start, span.end, span.history)

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
        turn = Turn(self.terms.state.cache_turn, self.terms.limits.cache_timeout)
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

    async def _pass_through(self, inputs: torch.Tensor, end: int, turn: Turn) -> torch.Tensor | None:
        search = Search()
        flow = self._flow(inputs, end, search)
        if flow is not None:
            spans = self.spans
            try:
                await flow.run()
            except Broken as broken:
                self._check_not_dropped(spans)
                if not self._settle(broken.index):
                    return None
                if not await self._look_elsewhere(broken.index, broken.failure, search, turn):
                    return None
        hidden = await self._one_by_one(inputs, end, search, turn)
        if self.position != end:
            return None
        outputs = [*(flow.outputs if flow is not None else ()), *([] if hidden is None else [hidden])]
        return last_tokens(outputs, inputs.shape[1])

    def _flow(self, inputs: torch.Tensor, end: int, search: Search) -> Flow | None:
        """Return a flow of these tokens, if it pays; None while some spans are missing, or have lost tokens."""
        index = 0
        while index < len(self.spans):
            try:
                if self._span(index, search).processed != self.position:
                    return None
            except ServerFailed:  # which is dealt with when it is its turn
                return None
            index += 1
        spans = [span for span in self.spans if isinstance(span, Span)]
        if self.terms.rows > 1 and not all(span.can_push or span.opened for span in spans):
            return None  # only their first replies say whether they compute for all rows what is sent once
        return Flow.if_it_pays(spans, inputs, end - inputs.shape[1], self.terms)

    def _settle(self, failed: int) -> bool:
        """After a failure, give up all steps that are not answered yet. Return whether the session is still there."""
        for index, span in enumerate(self.spans):
            if index != failed and isinstance(span, Span) and span.forget() and not self._cut(index, span.processed):
                return False
        return True

    async def _one_by_one(self, inputs: torch.Tensor, end: int, search: Search, turn: Turn) -> torch.Tensor | None:
        """Let one span after the other process what it has not processed yet, and replace those that fail.

        :returns: outputs of the last span that end with the token before ``end``; None if it has processed all before
        """
        spans, index = self.spans, 0
        hidden: torch.Tensor | None = inputs
        while index < len(spans):
            self._check_not_dropped(spans)
            try:
                span = self._span(index, search)
                if hidden is not None:
                    span.history.extend(hidden, end)
                hidden = await span.step(end) if span.processed < end else None
            except ServerFailed as failure:
                self._check_not_dropped(spans)
                if not await self._look_elsewhere(index, failure, search, turn):
                    return None
            else:
                self._check_not_dropped(spans)
                self.terms.state.unban(span.peer_id)
                search = search if hidden is None else Search()
                index += 1
        self.position = end
        self.terms.state.note_answer()
        self._account_history()
        return hidden

    def _check_not_dropped(self, spans: list[Span | Gap]) -> None:
        """End a step that missed its cancellation: before Python 3.12 asyncio's waits may lose one.

        :raises asyncio.CancelledError: if these are no longer the session's spans
        """
        if self.spans is not spans:
            raise asyncio.CancelledError

    async def _look_elsewhere(self, index: int, failure: ServerFailed, search: Search, turn: Turn) -> bool:
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
        if full:  # while it waits, the session holds no cache that it need not: others may wait for that
            for later, span in enumerate(spans):
                if later > index and isinstance(span, Span) and not span.processed:
                    self._leave(later)
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

    def _span(self, index: int, search: Search) -> Span:
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
        if ban:
            self.terms.state.ban(span.peer_id, offence=failure.offence)
        self._leave(index)
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


def last_tokens(outputs: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """Return the hidden states of the last ``count`` tokens.

    :param outputs: [1 or rows, n, hidden size] each, one after the other; the last may have all of them, and more
    """
    last = outputs[-1] if outputs[-1].shape[1] >= count else torch.cat([*outputs], dim=1)
    return last[:, -count:]
