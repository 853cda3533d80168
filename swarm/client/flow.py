"""Tokens on their way through all spans of a chain at once: chunk after chunk, from server to server.

The client sends each chunk to the first server, which passes its outputs on to the second while the client receives
them too, and so on: n servers take half a round trip each, and one more half. The client sends to a server what does
not come to it in time, or cannot be pushed there. All chunks are on their way at a time, so all servers compute.

A flow only goes as long as nothing fails; what it has computed until then stays, and ``swarm.client.chain`` does the
rest. Used on hivemind's event-loop thread only.
"""

import asyncio
import itertools
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import swarm.compat  # noqa: F401

import torch

from swarm.client.links import Link, Links
from swarm.client.span import PREFILL_CHUNK, STEPS, ServerFailed, Span
from swarm.client.stream import Awaited
from swarm.client.terms import SessionTerms
from swarm.wire.pushes import MAX_PUSH, Label
from swarm.wire.replies import SLACK, StepNews

# Tokens that are on their way at a time, at most. Cancelling takes effect at once.
PIECE = 2048
MIN_CHUNK = 64  # tokens
# Before Python 3.12 asyncio's waits may lose a cancellation.
CANCEL_AGAIN = 0.1  # seconds


class Broken(Exception):
    """A server has failed, so the flow ends here."""

    def __init__(self, index: int, failure: ServerFailed) -> None:
        super().__init__(str(failure))
        self.index = index  # of its span
        self.failure = failure


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some of the tokens: one step of each span."""

    number: int
    start: int  # position of the first token
    end: int


@dataclass(eq=False)
class Inputs:
    """The inputs of one chunk for one span, as far as the client knows them."""

    hidden: "asyncio.Future[torch.Tensor]"
    since: float = 0.0  # loop time at which they became known


def chunk_size(inputs: torch.Tensor, spans: Sequence[Span], terms: SessionTerms) -> int:
    """Return how many tokens to send at a time.

    A chunk costs each server some time of its own, but all servers compute only while there are chunks for all: so the
    longer the chain, the smaller they are.
    """
    rows = inputs.shape[0]
    if not terms.limits.pipelining:
        return max(1, PREFILL_CHUNK // rows)
    if terms.rows > 1 and not all(span.spreads for span in spans):
        rows = terms.rows
    size = max(MIN_CHUNK, PREFILL_CHUNK // len(spans)) // rows
    pushed = (MAX_PUSH - SLACK) // (inputs.shape[2] * inputs.element_size() * rows)
    return max(1, min(size, pushed))


class Flow:
    """One piece of tokens and the spans that it goes through, none of which has processed any of it."""

    @classmethod
    def if_it_pays(cls, spans: Sequence[Span], inputs: torch.Tensor, start: int, terms: SessionTerms) -> "Flow | None":
        """Return a flow, if it is faster than one span and one chunk after the other. ``run`` it once.

        :param inputs: of the first span: [1 or rows, n, hidden size]
        :param start: position of the first token
        """
        links = pushing_links(spans, terms.state.links)
        pieces = inputs.split(chunk_size(inputs, spans, terms), dim=1)
        if not any(links) and len(pieces) == 1:
            return None
        return cls(spans, links, pieces, start, terms.rows)

    def __init__(
        self, spans: Sequence[Span], links: Sequence[Link | None], pieces: Sequence[torch.Tensor], start: int, rows: int
    ) -> None:
        """See ``if_it_pays``.

        :param links: the way to each span from the one before it, if steps can be pushed along it
        :param pieces: the inputs, in chunks
        :param rows: of the session
        """
        self.outputs: list[torch.Tensor] = []  # of the last span so far
        self._spans, self._links = spans, links
        self._rows, _, self._width = pieces[0].shape
        self._all_rows = rows
        ends = list(itertools.accumulate((piece.shape[1] for piece in pieces), initial=start))
        self._opening = next(STEPS)
        self._chunks = [Chunk(next(STEPS), *bounds) for bounds in itertools.pairwise(ends)]
        loop = asyncio.get_running_loop()
        self._inputs = [[Inputs(loop.create_future()) for _ in self._chunks] for _ in spans]
        for first, piece, end in zip(self._inputs[0], pieces, ends[1:], strict=True):
            first.hidden.set_result(piece)
            spans[0].history.extend(piece, end)

    async def run(self) -> None:
        """Process all tokens by all spans.

        :raises Broken: at the first failure; what was processed by then is noted in the spans, and in ``outputs``
        """
        await at_once([self._stage(index) for index in range(len(self._spans))])

    async def _stage(self, index: int) -> None:
        """Process all tokens by one span."""
        span = self._spans[index]
        try:
            # One that gets its inputs from a server is opened before they come.
            early = not span.opened and (self._all_rows > 1 or self._links[index] is not None)
            opening = span.expect_opening(self._opening, self._width) if early else None
            shapes = [(self._rows, chunk.end - chunk.start, self._width) for chunk in self._chunks]
            awaited = [span.expect(chunk.number, shape) for chunk, shape in zip(self._chunks, shapes, strict=True)]
            if opening is not None:
                await span.open(opening)
            await at_once([self._send(index, awaited), self._receive(index, awaited)])
        except ServerFailed as failure:
            raise Broken(index, failure) from failure

    async def _send(self, index: int, awaited: Sequence[Awaited]) -> None:
        """Send a span what no server sends it, as soon as it is known."""
        loop, link = asyncio.get_running_loop(), self._links[index]
        for chunk, inputs, reply in zip(self._chunks, self._inputs[index], awaited, strict=True):
            hidden = await inputs.hidden
            if link is not None:
                patience = inputs.since + link.patience(chunk.end - chunk.start) - loop.time()
                if patience > 0:
                    await asyncio.wait({reply.response}, timeout=patience)
                if reply.response.done():
                    continue
            await self._spans[index].send(hidden, self._label(index, chunk))

    def _label(self, index: int, chunk: Chunk) -> Label:
        """Return a step's label for a span, with the spans after it that it can be passed on to."""
        ways = zip(self._spans[index + 1 :], self._links[index + 1 :], strict=True)
        after = itertools.takewhile(lambda way: way[1] is not None, ways)
        hops = [span.hop(chunk.number, chunk.start, chunk.end - chunk.start) for span, _ in after]
        return Label(chunk.number, chunk.start, tuple(hops))

    async def _receive(self, index: int, awaited: Sequence[Awaited]) -> None:
        """Take a span's replies; they are the inputs of the next span."""
        span, loop = self._spans[index], asyncio.get_running_loop()
        for number, (chunk, inputs, reply) in enumerate(zip(self._chunks, self._inputs[index], awaited, strict=True)):
            # A server is not late before its inputs are there.
            await asyncio.wait({reply.response, inputs.hidden}, return_when=asyncio.FIRST_COMPLETED)
            output, news = await span.answer(reply, self._rows)
            now = loop.time()
            self._learn(index, chunk, news, now - inputs.since if inputs.hidden.done() else 0.0)
            span.processed = chunk.end
            if index + 1 == len(self._spans):
                self.outputs.append(output)
                continue
            self._spans[index + 1].history.extend(output, chunk.end)
            following = self._inputs[index + 1][number]
            following.since = now
            following.hidden.set_result(output)

    def _learn(self, index: int, chunk: Chunk, news: StepNews, seconds: float) -> None:
        """Note how a step has come to a span, and what its server says of the way to the next.

        :param seconds: since the reply of the span before
        """
        if (link := self._links[index]) is not None:
            if news.pushed:
                link.note_push(chunk.end - chunk.start, seconds)
            else:
                link.note_relay(chunk.end - chunk.start)
        if news.unreachable and index + 1 < len(self._spans):
            after = self._links[index + 1]
            if after is not None and self._spans[index + 1].peer_id.to_base58() in news.unreachable:
                after.note_unreachable()


def pushing_links(spans: Sequence[Span], links: Links) -> list[Link | None]:
    """Return for each span the way from the one before it, if steps can be pushed along it."""
    found: list[Link | None] = [None]
    for first, second in itertools.pairwise(spans):
        pays = first.pushing and second.pushing and second.far
        link = links.between(first.peer_id, second.peer_id) if pays else None
        found.append(link if link is not None and link.usable else None)
    return found


async def at_once(coroutines: "Sequence[Coroutine[Any, Any, None]]") -> None:
    """Run coroutines until all have ended, or one fails; cancel the others.

    :raises Exception: what the first of them that has failed raises
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        while left := [task for task in tasks if not task.done()]:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=CANCEL_AGAIN)
        for task in tasks:
            task.cancelled() or task.exception()  # it is no fault that nobody asks for it
