"""Continuous batching: steps of different sessions that wait at the same time are computed as one batch.

A server's handlers are processes of their own, which take requests from the network; the ``Batcher`` is a thread of the
process that computes. Each handler has a line to it, a pair of connected sockets. What has arrived when a batch ends
makes the next one (Yu et al., "Orca", OSDI 2022), at once or, if others are known to be on their way back, with them. A
session that is alone never waits. Prompts are cut into chunks, so that others' decoding goes on between them (Agrawal
et al., "Sarathi-Serve", OSDI 2024).
"""

import asyncio
import contextlib
import ctypes
import itertools
import logging
import math
import multiprocessing
import pickle
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from swarm.compat import set_threads

import torch
from petals.server.memory_cache import MemoryCache

from swarm.blocks import Part, RaggedBlocks
from swarm.hardware import return_free_memory

log = logging.getLogger(__name__)

# Tokens of prompts in one batch, alone and beside sessions that decode. A CPU computes 100 rows as efficiently as more,
# so that of many prompts the first are not kept waiting for the last; beside decoding sessions it takes pieces that
# delay those by a few steps' time only. A GPU needs more rows to be busy.
CPU_PREFILL, CPU_MIXED = 192, 64
GPU_PREFILL, GPU_MIXED = 2048, 512
# A handler reads whatever it is sent at once; one that takes nothing for so long is stopped or hangs.
SEND_TIMEOUT = 10  # seconds
# Batches of more tokens are bound by computation.
DECODING_ROWS = 32
# For how many batches' time waiting for others pays. By counting passes over the weights it would be 1; with client and
# server on the same two cores, 2 gave 16 sessions 1.3 times the speed of 1: clients are faster while nobody computes.
PATIENCE = 2.0
# A session is late when it takes so many times as long as the last time.
LATENESS = 1.25
HEADER = struct.Struct("!I")  # length of a message in bytes
READ_SIZE = 2**18  # bytes read at a time; a step of decoding is some kilobytes


class SharedMemoryCache(MemoryCache):
    """Petals' account of attention cache, used by its own runtime and by the batcher, which are two threads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock_tensors = threading.Lock()

    @contextlib.contextmanager
    def use_cache(self, *handles: int) -> Iterator[Sequence[torch.Tensor]]:
        """Return the tensors of these handles; with no handle, only allocate and free what was asked for."""
        with self._lock_tensors, super().use_cache(*handles) as tensors:
            pass
        yield tensors


@dataclass(frozen=True)
class Opening:
    """Open a session: from now on it may send steps."""

    session: int  # its number on this line
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


def pack(message: Any) -> bytes:
    """Return a message as it goes over a line."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Return the values of a tensor of any dtype, on the CPU."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor of its own memory with these values."""
    return torch.frombuffer(bytearray(data), dtype=dtype).view(*shape)


class HandlerLine:
    """A handler's end of its line. For the handler's event loop."""

    def __init__(self, connection: socket.socket, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._connection = connection
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Begin; once, in the handler's process."""
        if self._writer is None:
            reader, self._writer = await asyncio.open_connection(sock=self._connection)
            self._reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                size = HEADER.unpack(await reader.readexactly(HEADER.size))[0]
                reply: Reply = pickle.loads(await reader.readexactly(size))
                future = self._waiting.pop(reply.session, None)
                if future is not None and not future.done():
                    future.set_result(reply)
        except (asyncio.IncompleteReadError, ConnectionError):
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(RuntimeError("the process that computes is gone"))

    async def _send(self, message: Any) -> None:
        assert self._writer is not None  # connected
        self._writer.write(pack(message))
        await self._writer.drain()

    async def open(self, handle: int, first: int, last: int) -> int:
        """Open a session and return its number; it must be closed."""
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
        self._waiting[session] = future = asyncio.get_running_loop().create_future()
        shape = (hidden.shape[0], hidden.shape[1], hidden.shape[2])
        await self._send(StepRequest(session, start, shape, to_bytes(hidden), prompts, hypotheses))
        reply = await future
        if reply.error is not None:
            raise RuntimeError(reply.error)
        return from_bytes(reply.hidden, hidden.dtype, shape)

    async def close(self, session: int) -> None:
        """Close a session."""
        self._waiting.pop(session, None)
        with contextlib.suppress(ConnectionError):  # the batcher is gone, and the session with it
            await self._send(Closing(session))


class _BatcherLine:
    """The batcher's end of a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT, 0))
        self.sessions: dict[int, _Session] = {}
        self._received = bytearray()

    def receive(self) -> Iterator[Any]:
        """Yield the messages that have arrived; does not wait.

        :raises EOFError: if the handler is gone
        """
        with contextlib.suppress(BlockingIOError):
            while True:
                data = self.connection.recv(READ_SIZE, socket.MSG_DONTWAIT)
                if not data:
                    raise EOFError
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
        """Send a reply.

        :raises OSError: if the handler is gone, or takes nothing
        """
        self.connection.sendall(pack(reply))


@dataclass(eq=False)
class _Session:
    line: _BatcherLine
    number: int
    cache: torch.Tensor  # see RaggedBlocks.cache_descriptor
    first: int
    last: int
    replied: float = 0.0  # when its last step was answered, time.monotonic()
    turnaround: float = math.inf  # seconds from that answer to the next step, as it was the last time


@dataclass(eq=False)
class _Step:
    session: _Session
    start: int
    hidden: torch.Tensor  # inputs, and outputs where the step is done: [sequences or 1, tokens, hidden size]
    prompts: Sequence[torch.Tensor | None] | None
    hypotheses: Sequence[int] | None
    done: int = 0  # tokens that are computed

    @property
    def left(self) -> int:
        return self.hidden.shape[1] - self.done


class Batcher(threading.Thread):
    """Computes the steps that handlers send, in batches."""

    def __init__(
        self, blocks: RaggedBlocks, memory_cache: SharedMemoryCache, num_lines: int, threads: int | None = None
    ) -> None:
        """Make a batcher; it computes once it is started.

        :param num_lines: how many handlers there are
        :param threads: of PyTorch's operators; default: as they are
        """
        super().__init__(name="batcher", daemon=True)
        self.blocks = blocks
        self._threads = threads
        on_cpu = blocks.device.type == "cpu"
        self._prefill_tokens = (CPU_PREFILL, CPU_MIXED) if on_cpu else (GPU_PREFILL, GPU_MIXED)
        self._memory_cache = memory_cache
        pairs = [socket.socketpair() for _ in range(num_lines)]
        self._lines = [_BatcherLine(ours) for ours, _ in pairs]
        self._handler_ends = [theirs for _, theirs in pairs]
        self._wake, self._woken = socket.socketpair()
        # Waiting steps by the blocks that they need. Whoever was served goes to the end.
        self._queues: dict[tuple[int, int], list[_Step]] = {}
        self._away: dict[_Session, float] = {}  # sessions that are expected back, and when
        self._patience = 0.0  # until when waiting for them pays
        self.batches: Any = multiprocessing.Value(ctypes.c_uint64)  # computed so far; handlers tell it

    def handler_line(self, index: int) -> HandlerLine:
        """Return the other end of a line, for a handler that is not forked yet."""
        return HandlerLine(self._handler_ends[index], self.blocks.dtype)

    @torch.inference_mode()
    def run(self) -> None:
        """Compute until ``stop``."""
        if self._threads is not None:
            set_threads(self._threads)
        for connection in self._handler_ends:
            connection.close()  # the handlers have theirs: this process sees when they are gone
        selector = selectors.DefaultSelector()
        selector.register(self._woken, selectors.EVENT_READ)
        for line in self._lines:
            selector.register(line.connection, selectors.EVENT_READ, line)
        try:
            while True:
                for key, _ in selector.select(timeout=self._time_to_wait()):
                    if key.fileobj is self._woken:
                        return
                    if not self._receive(key.data):
                        selector.unregister(key.fileobj)
                if self._queues and not self._time_to_wait():
                    self._compute_next()
        except Exception:
            log.exception("the batcher fails; all sessions of this server are lost")
        finally:
            selector.close()
            for line in self._lines:
                line.connection.close()

    def stop(self) -> None:
        """End the thread after the batch that it computes. Does not wait."""
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def _receive(self, line: _BatcherLine) -> bool:
        """Take the messages of a line; return whether there may be more later."""
        try:
            for message in line.receive():
                if isinstance(message, StepRequest):
                    self._add(line, message)
                elif isinstance(message, Opening):
                    with self._memory_cache.use_cache(message.handle) as (cache,):
                        session = _Session(line, message.session, cache, message.first, message.last)
                    line.sessions[message.session] = session
                else:
                    self._close(line, message.session)
        except (EOFError, ConnectionError):
            if line.sessions:
                log.warning("a handler is gone, and with it %d sessions", len(line.sessions))
            for number in list(line.sessions):
                self._close(line, number)
            return False
        return True

    def _time_to_wait(self) -> float | None:
        """Return for how many seconds to wait for messages before the next batch; None: until there is one.

        When a batch ends some of the other sessions wait already, while those that were in it are just reading their
        answers. A batch of all takes hardly longer than one of a few, so it pays to wait for those that are known to
        come back soon, and never for one that was late the last time.
        A session that is alone has nobody to wait for.
        """
        if not self._queues:
            return None
        if any(step.left > 1 for steps in self._queues.values() for step in steps):
            return 0.0
        now = time.monotonic()
        for session, back in list(self._away.items()):
            if back < now:
                session.turnaround = math.inf
                del self._away[session]
        expected = [back for back in self._away.values() if back < self._patience]
        return max(expected) - now if expected else 0.0

    def _add(self, line: _BatcherLine, request: StepRequest) -> None:
        session = line.sessions.get(request.session)
        if session is None:
            return  # closed meanwhile: nobody waits for it
        hidden = from_bytes(request.hidden, self.blocks.dtype, request.shape)
        step = _Step(session, request.start, hidden, request.prompts, request.hypotheses)
        self._queues.setdefault((session.first, session.last), []).append(step)
        self._away.pop(session, None)
        session.turnaround = time.monotonic() - session.replied

    def _close(self, line: _BatcherLine, number: int) -> None:
        session = line.sessions.pop(number, None)
        if session is not None:
            self._away.pop(session, None)
        for blocks, steps in list(self._queues.items()):
            self._put_back(blocks, [step for step in steps if step.session is not session])
        with self._memory_cache.use_cache():  # frees what it had
            pass
        if not any(line.sessions for line in self._lines):
            return_free_memory()  # of all the sessions that were here

    def _put_back(self, blocks: tuple[int, int], steps: list[_Step]) -> None:
        """Let steps wait, behind those for other blocks."""
        self._queues.pop(blocks, None)
        if steps:
            self._queues[blocks] = steps

    def _compute_next(self) -> None:
        blocks, steps = next(iter(self._queues.items()))
        batch = choose(steps, *self._prefill_tokens)
        started = time.monotonic()
        try:
            self._compute(batch, *blocks)
        except Exception as error:  # out of memory, for one; the sessions are told, the others go on
            log.exception("a batch of %d steps failed", len(batch))
            for step, _ in batch:
                self._reply(step, Reply(step.session.number, error=f"{type(error).__name__}: {error}"))
            failed = {id(step) for step, _ in batch}
            self._put_back(blocks, [step for step in steps if id(step) not in failed])
            return
        for step, _ in batch:
            if not step.left:
                self._reply(step, Reply(step.session.number, to_bytes(step.hidden)))
        self._expect([step.session for step, _ in batch if not step.left], time.monotonic() - started)
        self._put_back(blocks, [step for step in steps if step.left])

    def _expect(self, sessions: Sequence[_Session], duration: float) -> None:
        """Note that these were answered, after a batch of ``duration`` seconds."""
        now = time.monotonic()
        self._patience = now + PATIENCE * duration
        for session in sessions:
            session.replied = now
            if session.turnaround < math.inf:
                self._away[session] = now + LATENESS * session.turnaround

    @staticmethod
    def _reply(step: _Step, reply: Reply) -> None:
        # If it fails the handler is gone: reading from it tells so, and then its sessions are closed.
        with contextlib.suppress(OSError):
            step.session.line.send(reply)

    def _compute(self, batch: Sequence[tuple["_Step", int]], first: int, last: int) -> None:
        parts: list[Part] = []
        pieces: list[torch.Tensor] = []
        for step, count in batch:
            if step.hypotheses is not None and not step.done:
                cache = step.session.cache[:, :, : step.start]
                cache.copy_(cache[:, list(step.hypotheses)])
            inputs = step.hidden[:, step.done : step.done + count]
            for row, cache in enumerate(step.session.cache.unbind(1)[: len(inputs)]):
                parts.append(Part(cache, step.start + step.done, count, self._prompts(step, row)))
                pieces.append(inputs[row])
        if self._threads is not None:
            # Decoding is bound by memory, which one core less hardly slows, while the handlers, connections and clients
            # of several sessions need a core as well.
            decoding = len(batch) > 1 and sum(map(len, pieces)) <= DECODING_ROWS
            set_threads(max(1, self._threads - 1) if decoding else self._threads)
        hidden = torch.cat(pieces).to(self.blocks.device)
        outputs = iter(self.blocks.forward(hidden, parts, first, last).cpu().split([part.length for part in parts]))
        for step, count in batch:
            for row in step.hidden[:, step.done : step.done + count]:
                row.copy_(next(outputs))
            if len(step.hidden) < step.session.cache.shape[1]:  # one sequence stands for all of the session
                new = step.session.cache[:, :, step.start + step.done : step.start + step.done + count]
                new[:, 1:] = new[:, :1]
            step.done += count
        with self.batches.get_lock():
            self.batches.value += 1

    def _prompts(self, step: _Step, row: int) -> list[torch.Tensor | None] | None:
        """Return what is left of a sequence's deep prompts."""
        if step.prompts is None:
            return None
        return [None if p is None else p[row, step.done :].to(self.blocks.device) for p in step.prompts]


def choose(steps: Sequence[_Step], prefill_tokens: int, mixed_tokens: int) -> list[tuple[_Step, int]]:
    """Return the steps of the next batch, and how many tokens of each.

    All that decode take part. Prompts share a bounded number of tokens, the oldest first.

    :param prefill_tokens: that number, if none decodes
    :param mixed_tokens: that number beside steps that decode
    """
    batch = [(step, 1) for step in steps if step.left == 1]
    tokens = mixed_tokens if batch else prefill_tokens
    for step in steps:
        if step.left > 1 and tokens > 0:
            count = max(1, min(step.left, tokens // step.hidden.shape[0]))
            batch.append((step, count))
            tokens -= count * step.hidden.shape[0]
    return batch
