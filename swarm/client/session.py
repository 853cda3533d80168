"""A sequence of tokens that a swarm computes step by step, over servers that come and go.

A session is its token ids. The servers' attention caches are a cache of them, which ``swarm.client.chain`` manages on
hivemind's event-loop thread; callers wait for it with a limit.
"""

import concurrent.futures
import time
import weakref
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import swarm.compat  # noqa: F401

import torch
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker

from swarm.client.bounds import Logits
from swarm.client.chain import Chain, Loss
from swarm.client.flow import PIECE
from swarm.client.head import Head
from swarm.client.span import PREFILL_CHUNK, Span
from swarm.client.terms import SessionTerms
from swarm.client.warm_sessions import common_prefix
from swarm.errors import SessionClosed, SessionLengthExceeded, SwarmTimeout
from swarm.waiter import PATIENT, Waiter

Result = TypeVar("Result")

# How often a waiting caller checks whether it was cancelled: a person does not notice a twentieth of a second, and a
# check costs a few microseconds.
CANCEL_POLL = 0.05  # seconds
# Rows of logits computed at a time when all are wanted: with BLOOM's vocabulary, 32 MB.
LOGIT_ROWS = 32
# The same when most of them may not be wanted, as of a draft.
DRAFT_ROWS = 8
# The event loop never computes and never waits, so that it answers within milliseconds even on a busy machine.
LOOP_TIMEOUT = 10.0  # seconds


class SwarmSession:
    """An inference session. One thread at a time may use it; any thread may call ``close``.

    It is one sequence of tokens or, with several rows, sequences that begin with the same tokens: those are computed
    once, and then each step adds a token to every row.

    The servers hold attention cache for ``max_length`` tokens of each row from the first step until ``close``. A
    session that is dropped without closing frees it when it is garbage-collected.
    """

    def __init__(self, head: Head, terms: SessionTerms) -> None:
        self.max_length = terms.max_length  # tokens of a row, prefix included
        self.token_ids: list[int] = []  # shared beginning of all rows
        self.branches: list[list[int]] = [[] for _ in range(terms.rows)]  # each row's tokens after it, equally many
        self._head = head
        self._chain = Chain(terms)
        # Tokens that the servers may have processed without knowing whether they follow, and where they begin.
        self._draft: list[int] = []
        self._drafted_at = 0
        # The finaliser may run on any thread, the event loop's included, so it only asks the loop to close.
        self._finalizer = weakref.finalize(self, self._chain.close_soon)
        self._finalizer.atexit = False

    @property
    def position(self) -> int:
        """The number of the session's tokens that the servers have processed."""
        return min(self._chain.position, self._agreed) if self._draft else self._chain.position

    @property
    def _agreed(self) -> int:
        """Up to which position the session's tokens are those of the draft."""
        start = self._drafted_at
        return start + common_prefix(self.token_ids[start : start + len(self._draft)], self._draft)

    @property
    def closed(self) -> bool:
        return self._chain.closed

    @property
    def route(self) -> list[tuple[str, int, int]]:
        """The servers that compute this session: (peer id, first block, block after the last) each. Thread-safe.

        Empty before the first step, and while some of the blocks have no server.
        """
        spans = tuple(self._chain.spans)  # one copy: the event loop may be replacing some of them
        route = [(str(span.peer_id), span.start, span.end) for span in spans if isinstance(span, Span)]
        return route if len(route) == len(spans) else []  # there is a gap

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The newest losses of servers, oldest first. Thread-safe."""
        return self._chain.losses

    def rewinds_to(self, length: int) -> bool:
        """Whether truncating to ``length`` costs nothing: all servers of the session can go back that far."""
        spans = tuple(self._chain.spans)  # see ``route``
        return bool(spans) and all(isinstance(span, Span) and span.rewinds_to(length) for span in spans)

    @property
    def can_verify(self) -> bool:
        """Whether a draft can be tried: there is one row, and all servers can go back to what came before it.

        Servers that compute in 16 bits round otherwise for several tokens than for one. What that may change is less
        than what a draft saves where servers are far; where they are near, the same request has the same answer.
        """
        if len(self.branches) > 1 or not self.rewinds_to(len(self.token_ids)):
            return False
        return all(isinstance(span, Span) and not span.rounds for span in self._chain.spans)

    @property
    def recoveries(self) -> int:
        """How many times a span that had processed tokens was lost and computed again."""
        return self._chain.recoveries

    def append(self, token_ids: Sequence[int]) -> None:
        """Add tokens to the sequence, or to the shared beginning of all rows; the next step processes them.

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
    def step(self, token_ids: Sequence[int] = (), *, waiter: Waiter = PATIENT) -> torch.Tensor:
        """Add tokens, process all unprocessed ones, and return the logits of the next token.

        :param waiter: waits for the step; its ``look`` may end the step with ``Cancelled``
        :returns: logits of shape [vocabulary], float32
        :raises ValueError: if the sequence is empty
        :raises SessionClosed, SessionLengthExceeded, Cancelled, BlocksMissing, CacheFull, SwarmTimeout, ModelMismatch:
            except after ``SessionClosed``, the session stays usable: its tokens are kept, and the next step processes
            what this one did not
        """
        return self._head.next_logits(self._last(token_ids, waiter))

    @torch.inference_mode()
    def step_bounded(self, token_ids: Sequence[int] = (), *, waiter: Waiter = PATIENT) -> Logits:
        """As ``step``, but of a large head return bounds of the logits, of which those that matter can be computed."""
        return self._head.next_bounds(self._last(token_ids, waiter))

    def _last(self, token_ids: Sequence[int], waiter: Waiter) -> torch.Tensor:
        """Add tokens, process all unprocessed ones, and return the hidden states of the last one: [hidden size]."""
        self.append(token_ids)
        for _, hidden in self._process(waiter):
            last = hidden[0, -1]
        return last

    @torch.inference_mode()
    def verify(self, draft: Sequence[int], *, waiter: Waiter = PATIENT) -> Iterator[Logits]:
        """As ``step_bounded``, and process the tokens of a draft, which may follow, in the same pass.

        The session does not get them: whoever chooses them appends them, and the next step goes on from there.

        :returns: what is known of the logits of the next token, and of those after each token of the draft; fewer if
            the servers could not go back, or were lost
        :raises: as ``step``, when the first ones are asked for
        """
        self._settle()
        fits = self._length + len(draft) <= self.max_length and self.position >= self._length - 1
        tried = list(draft) if fits and self.can_verify else []
        self._drafted_at, self._draft = self._length, tried
        for start, hidden in self._process(waiter, tried):
            rows = hidden[0, self._length - 1 - start :]
        for some in rows.split(DRAFT_ROWS):
            yield from self._head.next_bounds_of_each(some)

    @torch.inference_mode()
    def step_rows_bounded(self, token_ids: Sequence[int], *, waiter: Waiter = PATIENT) -> Sequence[Logits]:
        """Add a token to each row and return the logits of each row's next token, or of a large head bounds of them.

        :returns: of shape [vocabulary] each, float32
        :raises: as ``step``
        """
        self._check_room(1)
        for branch, token_id in zip(self.branches, token_ids, strict=True):
            branch.append(token_id)
        for _, hidden in self._process(waiter):
            last = hidden[:, -1]
        return self._head.bounds(last)

    @torch.inference_mode()
    def step_each(self, token_ids: Sequence[int], *, waiter: Waiter = PATIENT) -> Iterator[torch.Tensor]:
        """As ``step``, but yield the logits after each new token, in pieces of shape [tokens, vocabulary]."""
        done = len(self.token_ids)
        self.append(token_ids)
        for start, hidden in self._process(waiter):
            new = hidden[0, max(0, done - start) :]
            if len(new):  # after a loss, earlier positions are yielded again
                for piece in new.split(LOGIT_ROWS):
                    yield self._head.logits(piece)
            done = max(done, start + hidden.shape[1])

    def _process(self, waiter: Waiter, draft: Sequence[int] = ()) -> Iterator[tuple[int, torch.Tensor]]:
        """Process the unprocessed tokens, at least the last one; yield positions and hidden states [1 or rows, n, h].

        If a lost span cannot be restored in place, positions already yielded are yielded again.

        :param draft: tokens to process after them, unless a span is lost
        """
        if not self._length:
            raise ValueError("there is no token to step from")
        if not draft:
            self._settle()
        if self.position == self._length:  # compute the last token's logits again
            self._chain.truncate_soon(self.position - 1).result(timeout=LOOP_TIMEOUT)
        lost_since, furthest = None, 0
        while (start := self._chain.position) < self._length:
            hidden = self._run(self._chain.forward(self._inputs(start, draft), start), waiter)
            if hidden is not None:
                if self._chain.position > furthest:  # the lost positions are restored, and more
                    lost_since, furthest = None, self._chain.position
                yield start, hidden
                if self._chain.position < self._length:
                    waiter.look()  # each piece may finish before `_run` looks for the first time
                continue
            draft = ()
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > self._chain.terms.limits.recovery_timeout:
                raise SwarmTimeout("servers were lost again and again while the session was being restored")

    def _inputs(self, start: int, draft: Sequence[int]) -> torch.Tensor:
        """Return the embeddings of the next tokens: [1, n, hidden size] of what all rows share, or [rows, ...]."""
        if start < len(self.token_ids):
            count = PIECE if self._chain.terms.limits.pipelining else PREFILL_CHUNK
            return self._head.embed([*self.token_ids[start : start + count], *draft])
        first = start - len(self.token_ids)
        count = max(1, PREFILL_CHUNK // len(self.branches))
        return self._head.embed(*(branch[first : first + count] for branch in self.branches))

    def _settle(self) -> None:
        """Have the servers forget what they have processed of a draft that the session's tokens do not follow."""
        if self._draft:
            agreed = self._agreed
            if self._chain.position > agreed:
                self._chain.truncate_soon(agreed).result(timeout=LOOP_TIMEOUT)
            self._draft = []

    def _run(self, coroutine: Coroutine[Any, Any, Result], waiter: Waiter) -> Result:
        """Run a coroutine on the event loop and wait for it, while the waiter looks periodically."""
        if self.closed:
            coroutine.close()
            raise SessionClosed("the session is closed")
        future = RemoteExpertWorker.run_coroutine(coroutine, return_future=True)
        try:
            while True:
                try:
                    return future.result(timeout=CANCEL_POLL)
                except concurrent.futures.TimeoutError:
                    if future.done():  # it finished just now, or the timeout was the step's own
                        return future.result()
                try:
                    waiter.look()
                except BaseException:
                    # We cannot know whether the servers processed this step, so drop them; the tokens are kept.
                    future.cancel()
                    self.release()
                    raise
        except concurrent.futures.CancelledError:
            raise SessionClosed("the session was closed during a step") from None

    def truncate(self, length: int) -> None:
        """Truncate the session to its first ``length`` tokens. Not during a step, and not on the event-loop thread.

        Servers that cannot go back so far are dropped, stock ones always; the next step recomputes their blocks.
        """
        self._settle()
        if length < self.position:
            self._chain.truncate_soon(length).result(timeout=LOOP_TIMEOUT)
        for branch in self.branches:
            del branch[max(0, length - len(self.token_ids)) :]
        del self.token_ids[length:]

    def release(self) -> None:
        """Free the servers' attention cache but keep the tokens; the next step recomputes them.

        Not during a step, and not on the event-loop thread.
        """
        self._chain.reset_soon().result(timeout=LOOP_TIMEOUT)

    def release_soon(self) -> None:
        """As ``release``, but from any thread and without waiting; it takes effect before any later call."""
        self._chain.reset_soon()

    def drop_history(self) -> None:
        """Free the memory for restoring lost spans, which can still be restored from the tokens. Does not wait."""
        self._chain.drop_history_soon()

    def close(self) -> None:
        """Free the servers' attention cache. Does not wait; may be called twice and from any thread."""
        self._finalizer()

    def __enter__(self) -> "SwarmSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
