"""A sequence of tokens that a swarm computes: step by step, over servers that come and go.

A session is its token ids. The attention caches on the servers are a cache of them: each span of blocks that one server
computes for the session can be computed again on other servers, from the inputs that the span has received so far, or,
when those were dropped to bound memory, from the token ids alone.

The wire protocol is petals' ``rpc_inference``: a stream per span, a request with new hidden states for each step, an
answer with as many. All of it runs on hivemind's event-loop thread; callers wait for it with a limit.
"""

import asyncio
import concurrent.futures
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import swarm.compat  # noqa: F401

import torch
from hivemind import MSGPackSerializer, serialize_torch_tensor
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, P2PDaemonError, P2PHandlerError
from hivemind.proto import runtime_pb2
from petals.data_structures import CHAIN_DELIMITER
from petals.server.handler import TransformerConnectionHandler
from petals.utils.misc import DUMMY, DUMMY_INT64
from petals.utils.packaging import pack_args_kwargs

from swarm import wire
from swarm.client.head import Head
from swarm.client.routing import MAX_SERVERS_OF_BLOCK, SwarmState
from swarm.errors import (
    BlocksMissing,
    CacheFull,
    Cancelled,
    ModelMismatch,
    SessionClosed,
    SessionLengthExceeded,
    SwarmError,
    SwarmTimeout,
    format_blocks,
)

log = logging.getLogger(__name__)
Result = TypeVar("Result")

# How often a waiting caller looks whether it was cancelled: a twentieth of a second is not noticed by a person, and
# costs a few microseconds.
CANCEL_POLL = 0.05  # seconds
# Prompts go through the swarm in pieces, so that cancelling takes effect between them and one piece stays far below
# the size of message that hivemind can take: 512 tokens of BLOOM-176B are 15 MB.
PREFILL_CHUNK = 512  # tokens, of all rows together
# Logits computed at a time when all are wanted: with BLOOM's vocabulary these are 32 MB.
LOGIT_ROWS = 32

# The event loop never computes and never waits, so that it answers within milliseconds even on a busy machine.
LOOP_TIMEOUT = 10.0  # seconds
# A server that answers with an error will answer the same again. When all have been tried the chain asks again for so
# long, for the swarm may change.
REFUSAL_PATIENCE = 3.0  # seconds
# Servers that one step tries without a look at the clock: as often as the view has filled up with fresh ones.
MAX_TRIED = 8 * MAX_SERVERS_OF_BLOCK
LOSSES_KEPT = 32  # newest ones, for whoever follows a session
# A server frees the attention cache of a session that was closed within a few milliseconds.
FREEING_TIME = 0.05  # seconds
# How often to look whether the swarm has the missing blocks again. To read what it announces takes 15 ms on loopback,
# and however many sessions want that, it is read once at a time.
LOOK_PERIOD = 0.2  # seconds
# A request carries hidden states, deep prompts and beam hypotheses; this program sends only the first.
ARGS_STRUCTURE = pack_args_kwargs(torch.empty(1), DUMMY, DUMMY_INT64)[1]
NO_PROMPTS_AND_HYPOTHESES = (serialize_torch_tensor(DUMMY), serialize_torch_tensor(DUMMY_INT64))


@dataclass(frozen=True)
class SessionLimits:
    """How long a session waits for the swarm."""

    connect_timeout: float = 5.0  # seconds to open a stream to a server
    step_timeout: float = 120.0  # seconds for one server to answer one step
    probe_after: float = 1.0  # seconds a step may be late before its server is asked whether it lives
    probe_timeout: float = 2.0  # seconds for that question, and for which a living server's process may be silent
    recovery_timeout: float = 60.0  # seconds to wait for lost blocks to be served again
    cache_timeout: float = 10.0  # seconds to wait for a server with free attention cache


@dataclass(frozen=True)
class Loss:
    """A server that a session has lost."""

    number: int  # of the session's losses, from 1
    peer_id: str
    start: int
    end: int  # it computed blocks [start, end)
    reason: str


class HistoryBudget:
    """Memory for recovery that all sessions of a program share. Used on the event-loop thread only."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes
        self.used = 0  # bytes


class SwarmSession:
    """An inference session. One thread at a time; ``cancel`` and ``close`` may come from any.

    It is one sequence of tokens, or, with several rows, sequences that begin with the same tokens: those are computed
    once, and then each step adds a token to every row.

    The servers hold attention cache for ``max_length`` tokens of each row from the first step until ``close``. A
    session that is dropped without closing frees it when it is collected.
    """

    def __init__(
        self,
        head: Head,
        state: SwarmState,
        limits: SessionLimits,
        budget: HistoryBudget,
        max_length: int,
        rows: int = 1,
    ) -> None:
        self.max_length = max_length  # tokens of a row, prefix included
        self.token_ids: list[int] = []  # that all rows begin with
        self.branches: list[list[int]] = [[] for _ in range(rows)]  # what each row has after them, equally many
        self._head = head
        self._cancelled = threading.Event()
        self._chain = _Chain(state, limits, budget, max_length, rows)
        # The finaliser may run on any thread, the event loop's included, so it only asks the loop to close.
        self._finalizer = weakref.finalize(self, self._chain.close_soon)
        self._finalizer.atexit = False

    @property
    def position(self) -> int:
        """Number of tokens that the servers have processed."""
        return self._chain.position

    @property
    def closed(self) -> bool:
        return self._chain.closed

    @property
    def route(self) -> list[tuple[str, int, int]]:
        """The servers that compute this session: (peer id, first block, block after the last) each. From any thread.

        Empty before the first step, and while there is no server for some of the blocks.
        """
        spans = tuple(self._chain.spans)  # in one go: the event loop may be replacing some of them
        if any(span.peer_id is None for span in spans):
            return []
        return [(str(span.peer_id), span.start, span.end) for span in spans]

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The newest losses of servers, oldest first. From any thread."""
        return self._chain.losses

    @property
    def rewinds(self) -> bool:
        """Whether ``truncate`` is free: all servers of the session can forget tokens."""
        return bool(self._chain.spans) and all(span.rewinds for span in self._chain.spans)

    @property
    def recoveries(self) -> int:
        """How many times a span that had processed tokens was lost and computed again."""
        return self._chain.recoveries

    def append(self, token_ids: Sequence[int]) -> None:
        """Add tokens to the sequence, or to the beginning of all rows; they are processed with the next step.

        :raises SessionLengthExceeded: if they do not fit; the session is unchanged
        """
        self._check_room(len(token_ids))
        self.token_ids.extend(token_ids)

    def _check_room(self, count: int) -> None:
        if self._length + count > self.max_length:
            raise SessionLengthExceeded(
                f"{self._length} tokens and {count} more exceed the session's {self.max_length}"
            )

    @property
    def _length(self) -> int:
        return len(self.token_ids) + len(self.branches[0])

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int] = (), *, cancelled: Callable[[], bool] | None = None) -> torch.Tensor:
        """Add tokens, process all that are unprocessed, and return the logits of the next token.

        :param cancelled: looked at often while waiting; when it returns true the step ends with ``Cancelled``
        :returns: logits of shape [vocabulary], float32
        :raises ValueError: if the sequence is empty
        :raises SessionClosed, SessionLengthExceeded, Cancelled, BlocksMissing, CacheFull, SwarmTimeout, ModelMismatch:
            except after ``SessionClosed`` the session stays usable: its tokens are kept, and the next step processes
            what this one did not
        """
        self.append(token_ids)
        for _, hidden in self._process(cancelled):
            last = hidden[0, -1]
        return self._head.next_logits(last)

    @torch.inference_mode()
    def step_rows(self, token_ids: Sequence[int], *, cancelled: Callable[[], bool] | None = None) -> torch.Tensor:
        """Add a token to each row, process all that are unprocessed, and return the logits of the rows' next tokens.

        :returns: logits of shape [rows, vocabulary], float32
        :raises: as ``step``
        """
        self._check_room(1)
        for branch, token_id in zip(self.branches, token_ids, strict=True):
            branch.append(token_id)
        for _, hidden in self._process(cancelled):
            last = hidden[:, -1]
        return self._head.logits(last)

    @torch.inference_mode()
    def step_each(
        self, token_ids: Sequence[int], *, cancelled: Callable[[], bool] | None = None
    ) -> Iterator[torch.Tensor]:
        """As ``step``, but yield the logits after each of the new tokens, in pieces of shape [tokens, vocabulary]."""
        done = len(self.token_ids)
        self.append(token_ids)
        for start, hidden in self._process(cancelled):
            new = hidden[0, max(0, done - start) :]
            if len(new):  # after a loss what was there already comes again
                for piece in new.split(LOGIT_ROWS):
                    yield self._head.logits(piece)
            done = max(done, start + hidden.shape[1])

    def _process(self, cancelled: Callable[[], bool] | None) -> Iterator[tuple[int, torch.Tensor]]:
        """Process what is unprocessed, at least the last token; yield positions and hidden states [1 or rows, n, h].

        After a loss that could not be mended in place positions that were there already may come again.
        """
        if not self._length:
            raise ValueError("there is no token to step from")
        if self.position == self._length:  # the last token's logits once more
            self._rewind(self.position - 1)
        lost_since, furthest = None, 0
        while (start := self.position) < self._length:
            hidden = self._run(self._chain.forward(self._inputs(start), start), cancelled)
            if hidden is not None:
                if self.position > furthest:  # what was lost is there again, and more
                    lost_since, furthest = None, self.position
                yield start, hidden
                continue
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > self._chain.limits.recovery_timeout:
                raise SwarmTimeout("servers were lost again and again while the session was being restored")

    def _inputs(self, start: int) -> torch.Tensor:
        """Return the embeddings of the next tokens: [1, n, hidden size] of what all rows share, or [rows, ...]."""
        if start < len(self.token_ids):
            return self._head.embed(self.token_ids[start : start + PREFILL_CHUNK])
        first = start - len(self.token_ids)
        count = max(1, PREFILL_CHUNK // len(self.branches))
        return self._head.embed(*(branch[first : first + count] for branch in self.branches))

    def _run(self, coroutine: Coroutine[Any, Any, Result], cancelled: Callable[[], bool] | None) -> Result:
        """Run a coroutine on the event loop and wait for it, looking for cancellation."""
        if self.closed:
            coroutine.close()
            raise SessionClosed("the session is closed")
        if self._cancelled.is_set():  # before the step began, which may be over before it is looked for again
            self._cancelled.clear()
            coroutine.close()
            raise Cancelled("the step was cancelled")
        future = RemoteExpertWorker.run_coroutine(coroutine, return_future=True)
        try:
            while True:
                try:
                    return future.result(timeout=CANCEL_POLL)
                except concurrent.futures.TimeoutError:
                    if future.done():  # in the moment since; or the time-out was the step's own
                        return future.result()
                if self._cancelled.is_set() or (cancelled is not None and cancelled()):
                    self._cancelled.clear()
                    # Whether the servers process the step is not known any more, so they are let go. The tokens stay.
                    future.cancel()
                    self.release()
                    raise Cancelled("the step was cancelled")
        except concurrent.futures.CancelledError:
            raise SessionClosed("the session was closed during a step") from None

    def truncate(self, length: int) -> None:
        """Set the session back to its first ``length`` tokens. Not during a step, and not on the event-loop thread.

        Servers that cannot forget tokens, as stock ones, are let go; the next step computes their blocks again.
        """
        self._rewind(length)
        for branch in self.branches:
            del branch[max(0, length - len(self.token_ids)) :]
        del self.token_ids[length:]

    def _rewind(self, length: int) -> None:
        """Let the servers forget what they have processed beyond ``length`` tokens."""
        if length < self.position:
            rewinding = RemoteExpertWorker.run_coroutine(self._chain.rewind(length), return_future=True)
            rewinding.result(timeout=LOOP_TIMEOUT)

    def cancel(self) -> None:
        """End the step that is running, or else the next one; it raises ``Cancelled``. From any thread."""
        self._cancelled.set()

    def release(self) -> None:
        """Free the servers' attention cache but keep the tokens: the next step computes them again.

        Not during a step, and not on the event-loop thread.
        """
        self._chain.reset_soon().result(timeout=LOOP_TIMEOUT)

    def release_soon(self) -> None:
        """As ``release``, but without waiting, and from any thread: whatever is called afterwards finds it done."""
        self._chain.reset_soon()

    def drop_history(self) -> None:
        """Free the memory for restoring lost spans; they can be restored from the tokens. Does not wait."""
        RemoteExpertWorker.run_coroutine(self._chain.drop_history(), return_future=True)

    def close(self) -> None:
        """Free the servers' attention cache. Does not wait; may be called twice, and from any thread."""
        self._finalizer()

    def __enter__(self) -> "SwarmSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ServerFailed(Exception):
    """A server did not do its part of a step. Internal: it leads to a recovery, or becomes ``error`` for the caller."""

    def __init__(self, error: SwarmError, patience: float, *, offence: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.patience = patience  # seconds for which trying again makes sense, when all servers have been tried
        self.offence = offence  # whether it did what no sound server does


class _StepTooSlow(asyncio.TimeoutError):
    """A server that lives has not answered within the time that one has for a step."""


class _Chain:
    """The spans that compute one session, in order, together covering all blocks. Lives on the event-loop thread."""

    def __init__(
        self, state: SwarmState, limits: SessionLimits, budget: HistoryBudget, max_length: int, rows: int
    ) -> None:
        self.state = state
        self.limits = limits
        self.budget = budget
        self.max_length = max_length
        self.rows = rows
        self.spans: list[_Span] = []
        self.position = 0  # tokens that have passed all blocks
        self.recoveries = 0
        self.losses: tuple[Loss, ...] = ()  # replaced and never changed, so that any thread may read them
        self.closed = False
        self._history_bytes = 0  # this chain's part of the budget
        self._task: asyncio.Task | None = None

    def close_soon(self) -> None:
        """Close all streams, which frees the servers' caches. Never waits: it may run on the loop's own thread."""
        self.closed = True
        self.reset_soon()

    def reset_soon(self) -> concurrent.futures.Future[None]:
        """End the running step and let go of all servers; the next step starts from the first token."""
        return RemoteExpertWorker.run_coroutine(self._reset(), return_future=True)

    async def _reset(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._drop()

    def _drop(self) -> None:
        for span in self.spans:
            span.close()
        self.spans, self.position = [], 0
        self._account_history()

    async def rewind(self, length: int) -> None:
        """Set the spans back to their first ``length`` tokens; those that cannot go back are vacated."""
        for index, span in enumerate(self.spans):
            span.history.truncate(length)
            if span.processed <= length:
                continue
            if span.rewinds:
                span.rewind(length)
            elif span.history.complete:
                span.close()
                self.spans[index] = _Span.vacancy(span.start, span.end, span.history)
            else:
                self._drop()
                return
        self.position = min(self.position, length)
        self._account_history()

    async def forward(self, inputs: torch.Tensor, start: int) -> torch.Tensor | None:
        """Send the hidden states of tokens [start, start + n) through all blocks.

        :param inputs: [1 or rows, n, hidden size], the embeddings of the tokens; 1 stands for all rows
        :returns: the same shape; or None if the chain is not, or no longer, at ``start``: go on from ``position``
        """
        if self._task is not None:
            # A cancelled step is still on its way out, and with it its half of the streams.
            await asyncio.wait({self._task}, timeout=self.limits.connect_timeout)
        if self.closed:
            raise SessionClosed("the session is closed")
        if self.position != start:
            return None
        self._task = task = asyncio.current_task()
        try:
            return await self._forward(inputs, start + inputs.shape[1])
        finally:
            if self._task is task:  # a step that was let go may end after the next one has begun
                self._task = None

    async def _forward(self, inputs: torch.Tensor, end: int) -> torch.Tensor | None:
        turn = _Turn(self.state.cache_turn, self.limits.cache_timeout)
        new = not self.spans
        if new:
            self.spans = [_Span.vacancy(0, self.state.num_blocks)]
        spans = self.spans
        try:
            if new:
                await turn.wait_behind_others()
            return await self._pass_through(inputs, end, turn)
        except BaseException:
            # Some spans may have processed the step and others not: the next step starts with clean caches.
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
                self._fill(index, search)
                hidden = await spans[index].step(hidden, end)
            except _ServerFailed as failure:
                self._check_not_dropped(spans)
                if not await self._look_elsewhere(index, failure, search, turn):
                    return None
            else:
                self._check_not_dropped(spans)
                self.state.unban(spans[index].peer_id)
                search = _Search()
                index += 1
        self.position = end
        self.state.note_answer()
        self._account_history()
        return hidden[:, -inputs.shape[1] :]

    def _check_not_dropped(self, spans: "list[_Span]") -> None:
        """End a step that was cancelled without its noticing: asyncio's waits may lose that in Python before 3.12.

        :raises asyncio.CancelledError: if these are no longer the spans of the session
        """
        if self.spans is not spans:
            raise asyncio.CancelledError

    async def _look_elsewhere(self, index: int, failure: _ServerFailed, search: "_Search", turn: "_Turn") -> bool:
        """After a failure, let go of the server and wait until it makes sense to go on.

        :returns: whether the step can go on; if not, all spans were dropped
        :raises SwarmError: if patience is at its end
        """
        span = self.spans[index]
        untried = search.note(span, failure, self.state)
        if not untried and search.is_over():
            self.state.note_failure(failure.error)
            raise failure.error from failure
        # A server that is full has not failed: it is asked again once others have no room either.
        full = isinstance(failure.error, CacheFull)
        freed = full and not untried and self.state.make_room(self.max_length * self.rows)
        if not self._vacate(index, failure, ban=not full):
            self._drop()
            return False
        if untried:
            return True
        spans = self.spans
        if full:
            await turn.take()
        if freed:
            await asyncio.sleep(FREEING_TIME)
        delay = next(search.delays)
        await asyncio.sleep(min(delay, LOOK_PERIOD) if isinstance(failure.error, BlocksMissing) else delay)
        self._check_not_dropped(spans)
        return True

    def _fill(self, index: int, search: "_Search") -> None:
        """If the span at ``index`` is vacant, put servers for its blocks in its place; the first gets its history."""
        vacant = self.spans[index]
        if vacant.peer_id is not None:
            return
        try:
            route = self.state.route(vacant.start, vacant.end, self.max_length * self.rows, search.tried)
        except BlocksMissing as error:
            self.state.refresh()
            raise _ServerFailed(error, self.limits.recovery_timeout) from error
        except Exception as error:  # whatever is wrong with the view, it is no server's fault and no caller's
            log.exception("no route could be found")
            missing = BlocksMissing(self.state.model, range(vacant.start, vacant.end))
            raise _ServerFailed(missing, self.limits.recovery_timeout) from error
        histories = [vacant.history] + [_History() for _ in route[1:]]
        self.spans[index : index + 1] = [
            _Span(info.start, info.end, history, info.peer_id, self)
            for info, history in zip(route, histories, strict=True)
        ]
        log.debug("route: %s", ", ".join(f"{s.start}:{s.end} via {s.peer_id}" for s in self.spans))

    def _vacate(self, index: int, failure: _ServerFailed, *, ban: bool = True) -> bool:
        """Let go of a failed server. Return whether its blocks can be computed elsewhere from its history."""
        span = self.spans[index]
        if span.peer_id is None:
            return True  # there was no server to begin with
        log.warning("blocks %d:%d via %s: %s", span.start, span.end, span.peer_id, failure)
        if span.processed:
            self.recoveries += 1
        if not isinstance(failure.error, CacheFull):  # such a server lives
            number = self.losses[-1].number + 1 if self.losses else 1
            loss = Loss(number, str(span.peer_id), span.start, span.end, str(failure))
            self.losses = (*self.losses, loss)[-LOSSES_KEPT:]
        span.close()
        if ban:
            self.state.ban(span.peer_id, offence=failure.offence)
        self.spans[index] = _Span.vacancy(span.start, span.end, span.history)
        return span.history.complete

    async def drop_history(self) -> None:
        """Drop the inputs of all spans."""
        for span in self.spans:
            span.history.drop()
        self._account_history()

    def _account_history(self) -> None:
        """Count this chain's histories; drop them if all sessions together hold more than the budget."""
        size = sum(span.history.size for span in self.spans)
        self.budget.used += size - self._history_bytes
        if self.budget.used > self.budget.limit or (self.spans and not self.spans[0].history.complete):
            for span in self.spans:
                span.history.drop()
            self.budget.used -= size
            size = 0
        self._history_bytes = size


class _Search:
    """The search for a server that does its part of a step, from the first failure on."""

    def __init__(self) -> None:
        self.tried: set[Any] = set()  # ids of peers that have failed; others are asked first
        self.delays = _retry_delays()
        self._since: float | None = None
        self._patience = 0.0  # seconds, the longest of the failures'

    def note(self, span: "_Span", failure: _ServerFailed, state: SwarmState) -> bool:
        """Take note of a failure; return whether there are servers for its blocks that were not tried.

        So however many refuse, each once, an answer that another can compute is computed. There is an end to that,
        since somebody may announce new servers faster than they are tried.
        """
        self._since = self._since or time.monotonic()
        self._patience = max(self._patience, failure.patience)
        if span.peer_id is None:  # there was no server to begin with
            return False
        self.tried.add(span.peer_id)
        return len(self.tried) <= MAX_TRIED and state.has_others(span.start, span.end, self.tried)

    def is_over(self) -> bool:
        """Whether it has lasted for as long as makes sense."""
        return self._since is not None and time.monotonic() - self._since > self._patience


class _Turn:
    """A place among the sessions that wait for attention cache to become free: first come, first served."""

    def __init__(self, lock: asyncio.Lock, timeout: float) -> None:
        self._lock = lock
        self._timeout = timeout  # seconds
        self._has_it = False

    async def wait_behind_others(self) -> None:
        """Let those go first who wait already; costs nothing if there are none."""
        if self._lock.locked():
            await self.take()

    async def take(self) -> None:
        """Wait for the turn.

        :raises CacheFull: if it does not come in time
        """
        if not self._has_it:
            try:
                await asyncio.wait_for(self._lock.acquire(), self._timeout)
            except asyncio.TimeoutError:
                raise CacheFull(f"others waited for attention cache before, for {self._timeout:.0f} s") from None
            self._has_it = True

    def end(self) -> None:
        """Let the next one."""
        if self._has_it:
            self._lock.release()
            self._has_it = False


def _retry_delays() -> Iterator[float]:
    """At once, for there may be another server; then slower and slower, for the swarm has to change first."""
    yield 0.0
    delay = 0.05
    while True:
        yield delay
        delay = min(delay * 1.5, 1.0)


class _History:
    """The inputs that a span has received: all of them, or only the newest after the others were dropped."""

    def __init__(self) -> None:
        self.length = 0  # tokens received
        self.size = 0  # bytes held
        self._dropped = 0  # tokens whose inputs are not held any more
        self._chunks: list[torch.Tensor] = []  # [1 or rows, tokens, hidden size] each

    @property
    def complete(self) -> bool:
        return self._dropped == 0

    def extend(self, hidden: torch.Tensor, end: int) -> None:
        """Take from ``hidden``, which ends with the token before ``end``, what is not here yet."""
        missing = end - self.length
        if missing > 0:
            chunk = hidden[:, hidden.shape[1] - missing :]
            self._chunks.append(chunk)
            self.size += chunk.numel() * chunk.element_size()
            self.length = end

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return the inputs of tokens [start, end), or of the first of them up to where the rows part ways."""
        last = self._chunks[-1]
        if (start, end) == (self.length - last.shape[1], self.length):
            return last  # the common case, a step of decoding
        self._join()
        position = self._dropped
        for chunk in self._chunks:
            if start < position + chunk.shape[1]:
                return chunk[:, start - position : end - position]
            position += chunk.shape[1]
        raise IndexError(f"the history ends before token {start}")

    def _join(self) -> None:
        """Make one chunk of those that all rows share, and one of the others."""
        groups = [list(group) for _, group in itertools.groupby(self._chunks, key=lambda chunk: chunk.shape[0])]
        self._chunks = [torch.cat(group, dim=1) if len(group) > 1 else group[0] for group in groups]

    def truncate(self, length: int) -> None:
        """Forget the inputs of the tokens after the first ``length``."""
        if length >= self.length:
            return
        self._dropped = min(self._dropped, length)
        self._join()
        kept, position = [], self._dropped
        for chunk in self._chunks:
            if position < length:
                kept.append(chunk[:, : length - position].clone())
            position += chunk.shape[1]
        self._chunks = kept
        self.size = sum(chunk.numel() * chunk.element_size() for chunk in kept)
        self.length = length

    def drop(self) -> None:
        """Forget all inputs."""
        self._chunks.clear()
        self.size, self._dropped = 0, self.length


class _Span:
    """Blocks [start, end) of a chain, computed by one server; or vacant, if ``peer_id`` is None."""

    def __init__(self, start: int, end: int, history: _History, peer_id: Any, chain: _Chain | None) -> None:
        self.start = start
        self.end = end
        self.history = history
        self.peer_id = peer_id
        self.processed = 0  # tokens in the server's attention cache
        # What the server can do; it tells with its first answer.
        self.rewinds = False  # forget tokens
        self.spreads = False  # compute for all rows what is sent once
        self._rewound = False  # whether it has to be told that it should
        if chain is not None:
            manager = chain.state.manager
            self._p2p: P2P = manager.state.p2p
            self._uid = CHAIN_DELIMITER.join(manager.block_uids[start:end])
            self._limits = chain.limits
            self._max_length = chain.max_length
            self._rows = chain.rows
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    @classmethod
    def vacancy(cls, start: int, end: int, history: _History | None = None) -> "_Span":
        return cls(start, end, history or _History(), None, None)

    async def step(self, hidden: torch.Tensor, end: int) -> torch.Tensor:
        """Process all tokens before ``end`` that the server has not processed yet.

        :param hidden: [1 or rows, n, hidden size], inputs that end with the token before ``end``
        :returns: [1 or rows, m, hidden size], outputs that end with it; m > n if the server had to catch up
        :raises _ServerFailed: if the server does not do it
        """
        self.history.extend(hidden, end)
        if self._rows > 1 and self._streams is None:  # no tokens: only to learn what the server can do
            await self._exchange(hidden.new_empty(self._rows, 0, hidden.shape[2]))
        chunk = PREFILL_CHUNK if self._rows == 1 or self.spreads else max(1, PREFILL_CHUNK // self._rows)
        outputs = []
        while self.processed < end:
            inputs = self.history.read(self.processed, min(self.processed + chunk, end))
            shared = inputs.shape[0] == 1
            if shared and not self.spreads:
                inputs = inputs.expand(self._rows, -1, -1)
            output = await self._exchange(inputs)
            outputs.append(output[:1] if shared else output)
            self.processed += inputs.shape[1]
        if len(outputs) == 1:
            return outputs[0]
        rows = max(output.shape[0] for output in outputs)
        return torch.cat([output.expand(rows, -1, -1) for output in outputs], dim=1)

    def rewind(self, length: int) -> None:
        """Let the server forget all but its first ``length`` tokens, with the next step."""
        self.processed, self._rewound = length, True

    async def _exchange(self, inputs: torch.Tensor) -> torch.Tensor:
        """Send inputs to the server and wait for its outputs.

        :raises _ServerFailed: whatever is wrong with what comes back, or does not come
        """
        request = self._request(inputs)
        reply = asyncio.ensure_future(self._call(request, wire.reply_limit(inputs.shape)))
        try:
            await self._wait_while_alive(reply)
            response, error = reply.result()
            if error is not None:
                raise self._refusal(wire.clean(error.message))
            return self._read(response, inputs.shape)
        except _ServerFailed:
            raise
        except (OSError, EOFError, P2PDaemonError, ControlFailure, P2PHandlerError, asyncio.TimeoutError) as failure:
            reason = wire.clean(str(failure)) or type(failure).__name__
            error_ = SwarmTimeout(f"the server of {format_blocks(range(self.start, self.end))} was lost: {reason}")
            late = isinstance(failure, _StepTooSlow)
            raise _ServerFailed(error_, self._limits.recovery_timeout, offence=late) from failure
        except wire.Malformed as failure:
            raise self._offence(f"sends what cannot be used: {failure}") from failure
        except Exception as failure:  # a way to fail that was not thought of; it came with this server's reply
            log.exception("the reply of the server %s cannot be read", self.peer_id)
            raise self._offence(f"sends what cannot be read: {wire.quoted(failure)}") from failure
        finally:
            reply.cancel()

    def _read(self, response: runtime_pb2.ExpertResponse, shape: torch.Size) -> torch.Tensor:
        if response.metadata:
            abilities = wire.read_abilities(response.metadata)
            self.rewinds, self.spreads = abilities.rewind, abilities.spread
        return wire.read_hidden(response.tensors, shape)

    def _offence(self, what: str) -> _ServerFailed:
        return _ServerFailed(ModelMismatch(f"the server {self.peer_id} {what}"), REFUSAL_PATIENCE, offence=True)

    def _request(self, inputs: torch.Tensor) -> runtime_pb2.ExpertRequest:
        metadata: dict[str, Any] = {}
        if self._streams is None:
            metadata = {"max_length": self._max_length, "args_structure": ARGS_STRUCTURE}
        if self._rewound:
            metadata["start_from_position"] = self.processed
            self._rewound = False
        return runtime_pb2.ExpertRequest(
            uid=self._uid,
            tensors=[serialize_torch_tensor(inputs), *NO_PROMPTS_AND_HYPOTHESES],
            metadata=MSGPackSerializer.dumps(metadata),
        )

    async def _call(self, request: runtime_pb2.ExpertRequest, limit: int) -> tuple[Any, Any]:
        if self._streams is None:
            handle = TransformerConnectionHandler._get_handle_name(None, "rpc_inference")
            _, *streams = await asyncio.wait_for(
                self._p2p.call_binary_stream_handler(self.peer_id, handle), self._limits.connect_timeout
            )
            self._streams = (streams[0], streams[1])
        reader, writer = self._streams
        if writer.is_closing():  # uvloop would raise a RuntimeError for it
            raise ConnectionResetError("the connection is closed")
        await P2P.send_protobuf(request, writer)
        return await wire.receive(runtime_pb2.ExpertResponse, reader, limit)

    async def _wait_while_alive(self, reply: asyncio.Future) -> None:
        """Wait for a reply; when it is late, ask the server whether it lives.

        A dead server is so noticed within seconds, while a slow one that lives has its full time.

        :raises asyncio.TimeoutError, P2PDaemonError, P2PHandlerError: if the server is silent or too slow
        """
        deadline = time.monotonic() + self._limits.step_timeout
        while not (await asyncio.wait({reply}, timeout=self._limits.probe_after))[0]:
            if time.monotonic() > deadline:
                raise _StepTooSlow(f"no answer within {self._limits.step_timeout:.0f} s")
            await self._probe()

    async def _probe(self) -> None:
        """Ask the server whether it lives; ours also tell whether the process that computes does.

        :raises asyncio.TimeoutError, P2PDaemonError, P2PHandlerError: if not
        """
        stub = TransformerConnectionHandler.get_stub(self._p2p, self.peer_id)
        uid = self._uid.split(CHAIN_DELIMITER)[0]
        try:
            reply = await stub.rpc_info(runtime_pb2.ExpertUID(uid=uid), timeout=self._limits.probe_timeout)
        except asyncio.TimeoutError:
            raise asyncio.TimeoutError(f"silent for {self._limits.probe_timeout:.1f} s") from None
        silent_for = wire.read_silence(reply.serialized_info)
        if silent_for > self._limits.probe_timeout:
            raise asyncio.TimeoutError(f"its process has been silent for {silent_for:.1f} s")

    def _refusal(self, message: str) -> _ServerFailed:
        """Turn the error that a server answered with into ours. The texts are those of petals 2.2.0.

        :param message: of any peer, as ``wire.clean`` returns it
        """
        if "allocate" in message and "max =" in message:
            error: SwarmError = SessionLengthExceeded(f"the server takes no session so long: {message}")
            return _ServerFailed(error, REFUSAL_PATIENCE)
        if "allocate" in message:
            blocks = format_blocks(range(self.start, self.end))
            error = CacheFull(f"no attention cache is free for {self._max_length} tokens on the servers of {blocks}")
            return _ServerFailed(error, self._limits.cache_timeout)
        return self._offence(f"refuses: {message}")

    def close(self) -> None:
        """Close the stream, upon which the server frees the attention cache. Does not wait."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None
