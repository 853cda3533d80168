"""The channel between a handler and the batcher: its messages, and both ends.

Handlers are processes of their own, which take requests from the network; the batcher is a thread of the process that
computes. A channel is a pair of connected sockets, over which each message goes as its length and its pickle.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import pickle
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import swarm.compat  # noqa: F401

import torch

log = logging.getLogger(__name__)

# What may wait for a handler beside one reply of any length. Its sessions wait for one reply each, which it asked for.
SEND_BUFFER = 2**26  # bytes
# A long reply does not fit into a socket at once. A handler that reads makes room within a fraction of the pause; with
# one that reads slowly, the batcher goes on after the limit, and sends the rest later.
SEND_PAUSE, SEND_LIMIT = 0.01, 0.1  # seconds
HEADER = struct.Struct("!I")  # length of a message in bytes
READ_SIZE = 2**18  # bytes read at a time; a step of decoding is some kilobytes


@dataclass(frozen=True)
class Opening:
    """Open a session: from now on it may send steps."""

    session: int  # its number on this channel
    handle: int  # of its attention cache
    first: int  # it is computed by blocks [first, last) of the span
    last: int


@dataclass(frozen=True)
class StepRequest:
    """Compute tokens of a session."""

    session: int
    start: int  # position of the first token
    shape: tuple[int, int, int]  # of the hidden states: [sequences, tokens, hidden size]
    hidden: bytes
    prompts: Sequence[torch.Tensor | None] | None = None  # deep prompts of each block: [sequences, tokens, hidden size]
    hypotheses: Sequence[int] | None = None  # beam search: which sequence each of the sequences goes on from


@dataclass(frozen=True)
class Closing:
    """Forget a session, and what it waits for."""

    session: int


@dataclass(frozen=True)
class Reply:
    """The outputs of a step, or why there are none."""

    session: int
    hidden: bytes = b""
    error: str | None = None


Message = Opening | StepRequest | Closing  # what a handler sends


def pack(message: Message | Reply) -> bytes:
    """Return a message as it goes over a channel."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Return the values of a tensor of any dtype, on the CPU."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor of its own memory with these values."""
    return torch.frombuffer(bytearray(data), dtype=dtype).view(*shape)


class HandlerChannel:
    """A handler's end of its channel. For the handler's event loop.

    Whoever waits is answered, whatever happens: once the channel is broken, at once and for good.
    """

    def __init__(self, connection: socket.socket, dtype: torch.dtype, inherited: Sequence[socket.socket] = ()) -> None:
        """Make an end.

        :param inherited: other ends, which a handler's process has because it was forked, and closes
        """
        self.dtype = dtype
        self.on_break: Callable[[], None] | None = None  # called once, when the channel is broken
        self.broken: str | None = None  # why
        self._connection = connection
        self._inherited = inherited
        self._pid = os.getpid()
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Begin; once, in the handler's process."""
        if self._writer is None:
            if os.getpid() != self._pid:
                for connection in self._inherited:
                    connection.close()  # as long as somebody has one open, the other side does not see an end
            reader, self._writer = await asyncio.open_connection(sock=self._connection)
            self._reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        reason = "the handler ends"
        try:
            while True:
                size = HEADER.unpack(await reader.readexactly(HEADER.size))[0]
                reply: Reply = pickle.loads(await reader.readexactly(size))
                future = self._waiting.pop(reply.session, None)
                if future is not None and not future.done():
                    future.set_result(reply)
        except (asyncio.IncompleteReadError, ConnectionError):
            reason = "the process that computes is gone"
        except Exception as error:
            log.exception("a reply of the batcher cannot be read")
            reason = f"a reply of the process that computes cannot be read: {type(error).__name__}: {error}"
        finally:
            self._break(reason)

    def _break(self, reason: str) -> None:
        self.broken = reason
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(RuntimeError(reason))
        self._waiting.clear()
        if self._writer is not None:
            self._writer.close()
        if self.on_break is not None:
            self.on_break()

    async def _send(self, message: Message) -> None:
        assert self._writer is not None  # connected
        data = pack(message)
        if self.broken is not None:
            raise RuntimeError(self.broken)
        self._writer.write(data)
        await self._writer.drain()

    async def open(self, handle: int, first: int, last: int) -> int:
        """Open a session and return its number; it must be closed.

        :raises RuntimeError: if the channel is broken
        """
        session = next(self._numbers)
        await self._send(Opening(session, handle, first, last))
        return session

    async def step(
        self,
        session: int,
        start: int,
        hidden: torch.Tensor,
        prompts: Sequence[torch.Tensor | None] | None,
        hypotheses: Sequence[int] | None,
    ) -> torch.Tensor:
        """Compute tokens of a session and return their hidden states, of the shape and dtype of ``hidden``.

        :raises RuntimeError: if that failed
        """
        shape = (hidden.shape[0], hidden.shape[1], hidden.shape[2])
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[session] = future
        try:
            await self._send(StepRequest(session, start, shape, to_bytes(hidden), prompts, hypotheses))
            reply = await future
        except ConnectionError as error:
            raise RuntimeError("the process that computes is gone") from error
        finally:
            if self._waiting.get(session) is future:
                del self._waiting[session]
            if not future.cancelled() and future.done():
                future.exception()  # is told already, or nobody is there to be told
        if reply.error is not None:
            raise RuntimeError(reply.error)
        return from_bytes(reply.hidden, hidden.dtype, shape)

    async def close(self, session: int) -> None:
        """Close a session."""
        self._waiting.pop(session, None)
        with contextlib.suppress(ConnectionError, RuntimeError):  # the batcher is gone, and the session with it
            await self._send(Closing(session))


class BatcherChannel:
    """The batcher's end of a channel. Neither reading nor writing waits for the handler."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.setblocking(False)
        self.taken = 0.0  # when the handler took something the last time, or there was nothing; time.monotonic()
        self.unsent = 0  # bytes that wait for the handler
        self._received = bytearray()
        self._sending: deque[memoryview] = deque()
        self._room = select.poll()
        self._room.register(connection, select.POLLOUT)

    def receive(self) -> Iterator[Any]:
        """Yield the messages that have arrived; does not wait.

        :raises EOFError: if the handler is gone
        """
        with contextlib.suppress(BlockingIOError):
            while True:
                data = self.connection.recv(READ_SIZE)
                if not data:
                    raise EOFError("it has closed its channel")
                self._received += data
                if len(data) < READ_SIZE:
                    break
        while len(self._received) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self._received)[0]
            if len(self._received) < end:
                return
            message = pickle.loads(self._received[HEADER.size : end])
            del self._received[:end]
            yield message

    def send(self, reply: Reply) -> None:
        """Send a reply, or let it wait until the handler has room for it: ``flush`` sends what waits.

        :raises OSError: if the handler is gone, or has left too much waiting
        """
        if self.unsent > SEND_BUFFER:
            raise OSError(f"it has not read {self.unsent} bytes of replies")
        waits_already = bool(self.unsent)
        if not waits_already:
            self.taken = time.monotonic()
        data = pack(reply)
        self._sending.append(memoryview(data))
        self.unsent += len(data)
        if not waits_already:
            self.flush()

    def flush(self) -> None:
        """Send what waits, for as long as the handler reads it.

        :raises OSError: if the handler is gone
        """
        began = time.monotonic()
        while self._sending:
            try:
                count = self.connection.send(self._sending[0])
            except BlockingIOError:
                if time.monotonic() - began > SEND_LIMIT or not self._room.poll(1000 * SEND_PAUSE):
                    return
                continue
            self.taken = time.monotonic()
            self.unsent -= count
            self._sending[0] = self._sending[0][count:]
            if not self._sending[0]:
                self._sending.popleft()

    def close(self) -> None:
        """End the channel, also for those who have inherited it."""
        with contextlib.suppress(OSError):  # the other end is closed already
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
