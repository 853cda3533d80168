"""The channel between a handler and the batcher: its messages, and both ends.

Handlers are separate processes, which take requests from the network; the batcher is a thread of the computing process.
A channel is a pair of connected sockets. Each message is sent as its length and its pickle.
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

# How much may wait for a handler beside one reply of any length. Each of its sessions waits for one reply at most.
SEND_BUFFER = 2**26  # bytes
# A long reply does not fit into a socket's buffer. A handler that reads makes room within a fraction of the pause; if
# it reads slowly, the batcher continues after the limit, and sends the rest later.
SEND_PAUSE, SEND_LIMIT = 0.01, 0.1  # seconds
HEADER = struct.Struct("!I")  # length of a message in bytes
READ_SIZE = 2**18  # bytes read at a time; a step of decoding is some kilobytes


@dataclass(frozen=True)
class Opening:
    """Open a session, so that it may send steps."""

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
    hypotheses: Sequence[int] | None = None  # beam search: which sequence each sequence continues


@dataclass(frozen=True)
class Closing:
    """Drop a session and its waiting steps."""

    session: int


@dataclass(frozen=True)
class Reply:
    """The outputs of a step, or its error."""

    session: int
    hidden: bytes = b""
    error: str | None = None


Message = Opening | StepRequest | Closing  # what a handler sends


def pack(message: Message | Reply) -> bytes:
    """Return the bytes of a message on a channel."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Return the values of a tensor of any dtype, on the CPU."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Return a new tensor with these values."""
    return torch.frombuffer(bytearray(data), dtype=dtype).view(*shape)


class HandlerChannel:
    """A handler's end of its channel, for the handler's event loop.

    Every call returns or raises: when the channel breaks, waiting and later calls fail at once.
    """

    def __init__(self, connection: socket.socket, dtype: torch.dtype, inherited: Sequence[socket.socket] = ()) -> None:
        """Make an end.

        :param inherited: other ends, which a forked handler inherits and closes
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
        """Connect to the event loop, once. Call it in the handler's process."""
        if self._writer is None:
            if os.getpid() != self._pid:
                for connection in self._inherited:
                    connection.close()  # while any copy is open, the other side sees no end
            reader, self._writer = await asyncio.open_connection(sock=self._connection)
            self._reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        reason = "the handler is ending"
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
            log.exception("cannot read a reply of the batcher")
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
                future.exception()  # reported already, or the caller has gone; either way, do not log it
        if reply.error is not None:
            raise RuntimeError(reply.error)
        return from_bytes(reply.hidden, hidden.dtype, shape)

    async def close(self, session: int) -> None:
        """Close a session."""
        self._waiting.pop(session, None)
        with contextlib.suppress(ConnectionError, RuntimeError):  # the batcher is gone, and with it the session
            await self._send(Closing(session))


class BatcherChannel:
    """The batcher's end of a channel. Neither reading nor writing waits for the handler."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.setblocking(False)
        self.taken = 0.0  # time.monotonic() when the handler last read something, or nothing waited
        self.unsent = 0  # bytes waiting for the handler
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
        """Send a reply; what the handler has no room for waits until ``flush``.

        :raises OSError: if the handler is gone, or too many bytes wait for it
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
        """Send what waits, while the handler reads it.

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
        """Close the channel, also in processes that have inherited it."""
        with contextlib.suppress(OSError):  # the other end is closed already
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
