"""The stream of a session to one server: requests go out, and replies come back in the order of the steps.

A server that takes pushes may compute a step that another server has sent, so its replies name their steps. A stock
server's replies are those to the client's own requests, in their order. Used on hivemind's event-loop thread only.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import swarm.compat  # noqa: F401

import torch
from hivemind.p2p import P2P, PeerID
from hivemind.proto import runtime_pb2
from petals.server.handler import TransformerConnectionHandler

from swarm.wire.messages import receive
from swarm.wire.replies import SLACK, read_step_id, reply_limit
from swarm.wire.text import Malformed, clean


class Refused(Exception):
    """A server has answered with an error. The message is safe to log and show."""


@dataclass(eq=False)
class Awaited:
    """A reply that is expected."""

    number: int  # of the step
    shape: torch.Size  # of its hidden states
    response: "asyncio.Future[runtime_pb2.ExpertResponse]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Stream:
    """A stream, which is opened with the first request."""

    def __init__(self, p2p: P2P, peer_id: PeerID) -> None:
        self._p2p = p2p
        self._peer_id = peer_id
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._awaited: deque[Awaited] = deque()
        self._limit = SLACK  # bytes of the largest reply
        self._failure: Exception | None = None

    @property
    def is_open(self) -> bool:
        """Whether it was opened. It may have broken since."""
        return self._writer is not None

    def expect(self, number: int, shape: Sequence[int]) -> Awaited:
        """Return a reply to come. It fails if the stream breaks.

        :param number: of the step, larger than those before
        :param shape: of its hidden states
        """
        awaited = Awaited(number, torch.Size(shape))
        self._limit = max(self._limit, reply_limit(shape))
        if self._failure is not None:
            fail(awaited, self._failure)
        else:
            self._awaited.append(awaited)
        return awaited

    def forget(self) -> bool:
        """Expect nothing any more; return whether something was expected."""
        found = bool(self._awaited)
        self._awaited.clear()
        return found

    async def open(self, timeout: float) -> None:
        """Open the stream.

        :raises TimeoutError, OSError, P2PDaemonError: if the server cannot be reached
        """
        handle = TransformerConnectionHandler._get_handle_name(None, "rpc_inference")
        call = self._p2p.call_binary_stream_handler(self._peer_id, handle)
        _, reader, self._writer = await asyncio.wait_for(call, timeout)
        self._reading = asyncio.create_task(self._read(reader))

    async def send(self, request: runtime_pb2.ExpertRequest) -> None:
        """Send a request; waits while the server takes none.

        :raises OSError: if the stream is broken
        """
        assert self._writer is not None  # it is open
        if self._writer.is_closing():  # uvloop would raise a RuntimeError
            raise ConnectionResetError("the connection is closed")
        await P2P.send_protobuf(request, self._writer)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                response, error = await receive(runtime_pb2.ExpertResponse, reader, lambda: self._limit)
                if error is not None:
                    raise Refused(clean(error.message))
                self._give(response)
        except Exception as failure:
            self._failure = failure
            while self._awaited:
                fail(self._awaited.popleft(), failure)

    def _give(self, response: Any) -> None:
        """Give a response to whoever expects it.

        :raises Malformed: if nobody does
        """
        number = read_step_id(response.metadata)
        if number is not None and (not self._awaited or number < self._awaited[0].number):
            return  # to a step that was given up
        if not self._awaited or number not in (None, self._awaited[0].number):
            raise Malformed("it answers what it was not asked")
        awaited = self._awaited.popleft()
        if not awaited.response.done():
            awaited.response.set_result(response)

    def close(self) -> None:
        """Close the stream, which makes the server free the attention cache. Does not wait."""
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()
        self._awaited.clear()


def fail(awaited: Awaited, failure: Exception) -> None:
    """Let whoever waits for a reply know that it does not come."""
    if not awaited.response.done():
        awaited.response.set_exception(failure)
        awaited.response.exception()  # whether or not somebody waits, it is no fault of the program's
