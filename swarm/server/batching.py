"""Continuous batching: steps of different sessions that wait at the same time are computed as one batch.

A server's handlers are processes of their own, which take requests from the network; the ``Batcher`` is a thread of the
process that computes. Each handler has a line to it, a pair of connected sockets. What has arrived when a batch ends
makes the next one (Yu et al., "Orca", OSDI 2022), at once or, if others are known to be on their way back, with them. A
session that is alone never waits. Prompts are cut into chunks, so that others' decoding goes on between them (Agrawal
et al., "Sarathi-Serve", OSDI 2024).

What one session sends is that session's affair alone: a message that cannot be processed is answered to it, a step that
cannot be computed fails by itself, and a handler that does not read is left behind.
"""

import asyncio
import contextlib
import ctypes
import itertools
import logging
import math
import multiprocessing
import os
import pickle
import select
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import swarm.compat  # noqa: F401

import torch
from petals.server.memory_cache import MemoryCache

from swarm.hardware import return_free_memory
from swarm.process import set_threads
from swarm.server.blocks import Part, RaggedBlocks

log = logging.getLogger(__name__)

# Tokens of prompts in one batch, alone and beside sessions that decode. A CPU computes 100 rows as efficiently as more,
# so that of many prompts the first are not kept waiting for the last; beside decoding sessions it takes pieces that
# delay those by a few steps' time only. A GPU needs more rows to be busy.
CPU_PREFILL, CPU_MIXED = 192, 64
GPU_PREFILL, GPU_MIXED = 2048, 512
# A step that has taken part with so many tokens lets other long ones go first: it is as much as this project's clients
# send at a time, so that among them it is first come, first served.
TURN_TOKENS = 512
# A handler reads whatever it is sent at once; one that takes nothing for so long is stopped or hangs.
SEND_TIMEOUT = 10.0  # seconds
# What may wait for a handler beside one reply of any length. Its sessions wait for one reply each, which it asked for.
SEND_BUFFER = 2**26  # bytes
# A long reply does not fit into a socket at once. A handler that reads makes room within a fraction of the pause; with
# one that reads slowly, the batcher goes on after the limit, and sends the rest later.
SEND_PAUSE, SEND_LIMIT = 0.01, 0.1  # seconds
# Batches of more tokens are bound by computation.
DECODING_ROWS = 32
# For how many batches' time waiting for others pays. By counting passes over the weights it would be 1; with client and
# server on the same two cores, 2 gave 16 sessions 1.3 times the speed of 1: clients are faster while nobody computes.
PATIENCE = 2.0
# A session is late when it takes so many times as long as the last time.
LATENESS = 1.25
HEADER = struct.Struct("!I")  # length of a message in bytes
READ_SIZE = 2**18  # bytes read at a time; a step of decoding is some kilobytes


class CacheIsGone(KeyError):
    """Attention cache was given back before it was used."""


class SharedMemoryCache(MemoryCache):
    """Petals' account of attention cache, used by its own runtime and by the batcher, which are two threads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock_tensors = threading.Lock()
        self._failures: dict[int, str] = {}  # why there is no tensor for a handle that is not given back yet

    @contextlib.contextmanager
    def use_cache(self, *handles: int) -> Iterator[Sequence[torch.Tensor]]:
        """Return the tensors of these handles; with no handle, only allocate and free what was asked for.

        :raises CacheIsGone: if one was given back meanwhile
        :raises MemoryError: if there was no memory for one
        """
        with self._lock_tensors:
            while self._pipe_recv.poll():
                try:
                    self._follow(*self._pipe_recv.recv())
                except Exception:  # sent by a handler that died over it; whoever asks now may have what is there
                    log.exception("a request for attention cache cannot be read")
                    break
            tensors = tuple(map(self._find, handles))
        yield tensors

    def _follow(self, handles: Sequence[int], descriptors: Sequence[Any] | None) -> None:
        """Allocate what a session has asked for, or free what it gives back. If that fails, it is that session's."""
        if descriptors is None:
            for handle in handles:
                self._failures.pop(handle, None)
                self._allocated_tensors.pop(handle, None)
            return
        for handle, descriptor in zip(handles, descriptors, strict=True):
            try:
                self._allocated_tensors[handle] = descriptor.make_zeros()
            except Exception as error:  # PyTorch has no type of its own for memory that a CPU does not have
                log.exception("no attention cache could be made")
                self._failures[handle] = f"{type(error).__name__}: {error}"

    def _find(self, handle: int) -> torch.Tensor:
        if handle in self._failures:
            raise MemoryError(self._failures[handle])
        if handle not in self._allocated_tensors:
            raise CacheIsGone("the session's attention cache was given back")
        return self._allocated_tensors[handle]


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
    """A handler's end of its line. For the handler's event loop.

    Whoever waits is answered, whatever happens: once the line is broken, at once and for good.
    """

    def __init__(self, connection: socket.socket, dtype: torch.dtype, inherited: Sequence[socket.socket] = ()) -> None:
        """Make an end.

        :param inherited: other ends, which a handler's process has because it was forked, and closes
        """
        self.dtype = dtype
        self.on_break: Callable[[], None] | None = None  # called once, when the line is broken
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

    async def _send(self, message: Any) -> None:
        assert self._writer is not None  # connected
        data = pack(message)
        if self.broken is not None:
            raise RuntimeError(self.broken)
        self._writer.write(data)
        await self._writer.drain()

    async def open(self, handle: int, first: int, last: int) -> int:
        """Open a session and return its number; it must be closed.

        :raises RuntimeError: if the line is broken
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


class _BatcherLine:
    """The batcher's end of a line. Neither reading nor writing waits for the handler."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.setblocking(False)
        self.sessions: dict[int, _Session] = {}
        self.refused: dict[int, str] = {}  # sessions that could not be opened, and why
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
                    raise EOFError("it has closed its line")
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
        """End the line, also for those who have inherited it."""
        with contextlib.suppress(OSError):  # the other end is closed already
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


@dataclass(eq=False)
class _Session:
    line: _BatcherLine
    number: int
    cache: torch.Tensor  # see RaggedBlocks.cache_descriptor
    first: int
    last: int
    replied: float = 0.0  # when its last step was answered, time.monotonic()
    turnaround: float = math.inf  # seconds from that answer to the next step, as it was the last time

    @property
    def rows(self) -> int:
        """Its sequences."""
        return self.cache.shape[1]


@dataclass(eq=False)
class _Step:
    session: _Session
    start: int
    hidden: torch.Tensor  # inputs, and outputs where the step is done: [sequences or 1, tokens, hidden size]
    prompts: Sequence[torch.Tensor | None] | None
    hypotheses: Sequence[int] | None  # None as well once the cache is in their order
    done: int = 0  # tokens that are computed, for all sequences
    width: int = 0  # tokens in work, if they are computed for some sequences; then no others are begun
    row: int = 0  # sequences for which those are computed
    turn: int = 0  # tokens computed since it was let go first

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def left(self) -> int:
        return self.hidden.shape[1] - self.done

    @property
    def long(self) -> bool:
        """Whether it is more than one token, or one that has not been computed for all sequences at once."""
        return self.left > 1 or self.row > 0


@dataclass(frozen=True)
class Piece:
    """What a batch computes of a step: some tokens of some of its sequences."""

    step: _Step
    tokens: int
    row: int  # the first of its sequences
    rows: int


class Batcher(threading.Thread):
    """Computes the steps that handlers send, in batches.

    Without it nobody is served: nothing that a session sends, and nothing that becomes of a handler, ends it.
    """

    def __init__(
        self,
        blocks: RaggedBlocks,
        memory_cache: SharedMemoryCache,
        num_lines: int,
        threads: int | None = None,
        send_timeout: float = SEND_TIMEOUT,
    ) -> None:
        """Make a batcher; it computes once it is started.

        :param num_lines: how many handlers there are
        :param threads: of PyTorch's operators; default: as they are
        :param send_timeout: seconds after which a handler that reads nothing is given up
        """
        super().__init__(name="batcher", daemon=True)
        self.blocks = blocks
        self._threads = threads
        on_cpu = blocks.device.type == "cpu"
        self._prefill_tokens = (CPU_PREFILL, CPU_MIXED) if on_cpu else (GPU_PREFILL, GPU_MIXED)
        self._memory_cache = memory_cache
        self._send_timeout = send_timeout
        pairs = [socket.socketpair() for _ in range(num_lines)]
        self._lines = [_BatcherLine(ours) for ours, _ in pairs]
        self._handler_ends = [theirs for _, theirs in pairs]
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        # Waiting steps by the blocks that they need. Whoever was served goes to the end.
        self._queues: dict[tuple[int, int], list[_Step]] = {}
        self._away: dict[_Session, float] = {}  # sessions that are expected back, and when
        self._patience = 0.0  # until when waiting for them pays
        self.batches: Any = multiprocessing.Value(ctypes.c_uint64)  # computed so far; handlers tell it
        self.busy_since: float | None = None  # when it last stopped waiting for messages; None while it waits
        self.lost: str | None = None  # which handler it has given up, and why

    def handler_line(self, index: int) -> HandlerLine:
        """Return the other end of a line, for a handler that is not forked yet."""
        mine = self._handler_ends[index]
        others = [*(line.connection for line in self._lines), *self._handler_ends]
        return HandlerLine(mine, self.blocks.dtype, [other for other in others if other is not mine])

    @torch.inference_mode()
    def run(self) -> None:
        """Compute until ``stop``."""
        if self._threads is not None:
            set_threads(self._threads)
        for connection in self._handler_ends:
            connection.close()  # the handlers have theirs: this process sees when they are gone
        self._selector.register(self._woken, selectors.EVENT_READ)
        for line in self._lines:
            self._selector.register(line.connection, selectors.EVENT_READ, line)
        try:
            while self._take_messages():
                self._give_up_the_silent()
                if self._queues and not self._time_to_wait():
                    self._compute_next()
        except Exception:
            log.exception("the batcher fails; all sessions of this server are lost")
        finally:
            self._selector.close()
            for line in self._lines:
                line.close()

    def stop(self) -> None:
        """End the thread after the batch that it computes. Does not wait."""
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def _take_messages(self) -> bool:
        """Wait until there is something to do, and read and send what can be; return whether to go on."""
        self.busy_since = None
        events = self._selector.select(timeout=self._time_to_select())
        self.busy_since = time.monotonic()
        for key, mask in events:
            if key.fileobj is self._woken:
                return False
            line: _BatcherLine = key.data
            try:
                if mask & selectors.EVENT_WRITE:
                    line.flush()
                    self._watch(line)
                if mask & selectors.EVENT_READ:
                    for message in line.receive():
                        if line in self._lines:  # a reply to an earlier message may have shown that it is gone
                            self._take(line, message)
            except Exception as error:  # it is gone, or what it sends cannot be understood from here on
                self._lose(line, error)
        return True

    def _time_to_select(self) -> float | None:
        """Return for how many seconds to wait for messages; None: until there is one."""
        times = [line.taken + self._send_timeout for line in self._lines if line.unsent]
        if not times:
            return self._time_to_wait()
        until_given_up = max(0.0, min(times) - time.monotonic())
        patience = self._time_to_wait()
        return until_given_up if patience is None else min(patience, until_given_up)

    def _watch(self, line: _BatcherLine) -> None:
        """Look for messages of a line, and for room if something waits to be sent."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if line.unsent else 0)
        if self._selector.get_key(line.connection).events != events:
            self._selector.modify(line.connection, events, line)

    def _give_up_the_silent(self) -> None:
        for line in list(self._lines):
            if line.unsent and time.monotonic() - line.taken > self._send_timeout:
                self._lose(line, TimeoutError(f"it has read nothing for {self._send_timeout:g} s"))

    def _lose(self, line: _BatcherLine, error: Exception) -> None:
        """Give up a handler, and with it its sessions."""
        if line not in self._lines:
            return
        reason = f"{type(error).__name__}: {error}"
        if line.sessions or not isinstance(error, EOFError):  # else it has ended in order
            log.warning("a handler is lost, and with it %d sessions: %s", len(line.sessions), reason)
        self._selector.unregister(line.connection)
        self._lines.remove(line)
        line.close()
        for number in list(line.sessions):
            self._close(line, number)
        self.lost = reason

    def _take(self, line: _BatcherLine, message: Any) -> None:
        """Do what a message says. What goes wrong is told to its session.

        :raises TypeError: if it is no message
        """
        if not isinstance(message, Opening | StepRequest | Closing):
            raise TypeError(f"{type(message).__name__} is no message")
        try:
            if isinstance(message, StepRequest):
                self._add(line, message)
            elif isinstance(message, Opening):
                self._open(line, message)
            else:
                self._close(line, message.session)
        except Exception as error:
            if not isinstance(error, ValueError):
                log.exception("a message of a session cannot be processed")
            if isinstance(message, StepRequest):
                self._reply(line, Reply(message.session, error=f"{type(error).__name__}: {error}"))

    def _open(self, line: _BatcherLine, message: Opening) -> None:
        try:
            with self._memory_cache.use_cache(message.handle) as (cache,):
                check_opening(message, cache, len(self.blocks.blocks))
            line.sessions[message.session] = _Session(line, message.session, cache, message.first, message.last)
        except CacheIsGone as error:  # the client has hung up meanwhile: nobody sends steps any more
            line.refused[message.session] = str(error)
        except Exception as error:
            line.refused[message.session] = f"{type(error).__name__}: {error}"
            raise

    def _time_to_wait(self) -> float | None:
        """Return for how many seconds to wait for messages before the next batch; None: until there is one.

        When a batch ends some of the other sessions wait already, while those that were in it are just reading their
        answers. A batch of all takes hardly longer than one of a few, so it pays to wait for those that are known to
        come back soon, and never for one that was late the last time.
        A session that is alone has nobody to wait for.
        """
        if not self._queues:
            return None
        waiting = [step for steps in self._queues.values() for step in steps]
        if any(step.long for step in waiting) or sum(step.rows for step in waiting) >= self._prefill_tokens[0]:
            return 0.0  # the next batch is full without the others
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
            raise ValueError(line.refused.get(request.session, "there is no such session"))
        check_step(request, session.cache.shape, self.blocks.config.hidden_size)
        hidden = from_bytes(request.hidden, self.blocks.dtype, request.shape)
        step = _Step(session, request.start, hidden, request.prompts, request.hypotheses)
        self._queues.setdefault((session.first, session.last), []).append(step)
        self._away.pop(session, None)
        session.turnaround = time.monotonic() - session.replied

    def _close(self, line: _BatcherLine, number: int) -> None:
        line.refused.pop(number, None)
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
        failed = self._compute_or_part(batch, blocks)
        served = [piece.step for piece in batch if piece.step not in failed]
        answered = [step for step in served if not step.left]
        # Who has had a turn lets others go first. Before the replies: a line that is lost takes its steps with it.
        late = [step for step in served if step.left and step.turn >= TURN_TOKENS]
        for step in late:
            step.turn = 0
        gone = {*answered, *failed, *late}
        self._put_back(blocks, [*(step for step in steps if step not in gone), *late])
        for step, reason in failed.items():
            self._reply(step.session.line, Reply(step.session.number, error=reason))
        for step in answered:
            self._reply(step.session.line, Reply(step.session.number, to_bytes(step.hidden)))
        self._expect([step.session for step in answered], time.monotonic() - started)

    def _compute_or_part(self, batch: Sequence[Piece], blocks: tuple[int, int]) -> dict[_Step, str]:
        """Compute a batch, or, if that fails, each step of it by itself; return which failed then, and why.

        What the failed batch has written to the caches is written once more, with the same values.
        """
        try:
            self._compute(batch, *blocks)
        except Exception as error:  # out of memory, for one; whose step fails alone is told, the others go on
            log.exception("a batch of %d steps failed", len(batch))
            if self.blocks.device.type == "cuda":
                torch.cuda.synchronize(self.blocks.device)  # raises if nothing will be computed any more: start anew
            if len(batch) == 1:
                return {batch[0].step: f"{type(error).__name__}: {error}"}
            failed: dict[_Step, str] = {}
            for piece in batch:
                failed |= self._compute_or_part([piece], blocks)
            return failed
        return {}

    def _expect(self, sessions: Sequence[_Session], duration: float) -> None:
        """Note that these were answered, after a batch of ``duration`` seconds."""
        now = time.monotonic()
        self._patience = now + PATIENCE * duration
        for session in sessions:
            session.replied = now
            if session.turnaround < math.inf and session.number in session.line.sessions:
                self._away[session] = now + LATENESS * session.turnaround

    def _reply(self, line: _BatcherLine, reply: Reply) -> None:
        if line not in self._lines:
            return  # lost meanwhile
        try:
            line.send(reply)
            self._watch(line)
        except OSError as error:
            self._lose(line, error)

    def _compute(self, batch: Sequence[Piece], first: int, last: int) -> None:
        parts: list[Part] = []
        inputs: list[torch.Tensor] = []
        for piece in batch:
            step = piece.step
            if step.hypotheses is not None:
                reorder(step.session.cache[:, :, : step.start], step.hypotheses)
                step.hypotheses = None  # once more would be another order
            rows = slice(piece.row, piece.row + piece.rows)
            start, end = step.done, step.done + piece.tokens
            for row, cache in enumerate(step.session.cache[:, rows].unbind(1), piece.row):
                parts.append(Part(cache, step.start + start, piece.tokens, self._prompts(step, row)))
            inputs.append(step.hidden[rows, start:end].flatten(0, 1))
        if self._threads is not None:
            # Decoding is bound by memory, which one core less hardly slows, while the handlers, connections and clients
            # of several sessions need a core as well.
            decoding = len(batch) > 1 and sum(map(len, inputs)) <= DECODING_ROWS
            set_threads(max(1, self._threads - 1) if decoding else self._threads)
        sizes = [len(tokens) for tokens in inputs]
        hidden = torch.cat(inputs).to(self.blocks.device)
        outputs = self.blocks.forward(hidden, parts, first, last).cpu().split(sizes)
        for piece, output in zip(batch, outputs, strict=True):
            finish(piece, output)
        with self.batches.get_lock():
            self.batches.value += 1

    def _prompts(self, step: _Step, row: int) -> list[torch.Tensor | None] | None:
        """Return what is left of a sequence's deep prompts."""
        if step.prompts is None:
            return None
        return [None if p is None else p[row, step.done :].to(self.blocks.device) for p in step.prompts]


def reorder(cache: torch.Tensor, hypotheses: Sequence[int]) -> None:
    """Let each sequence go on from the past of another, in place.

    :param cache: [blocks, sequences, tokens, ...]
    """
    cache.copy_(cache[:, list(hypotheses)])


def finish(piece: Piece, output: torch.Tensor) -> None:
    """Note what was computed of a step.

    :param output: [sequences times tokens, hidden size]
    """
    step = piece.step
    start, end = step.done, step.done + piece.tokens
    step.hidden[piece.row : piece.row + piece.rows, start:end] = output.view(piece.rows, piece.tokens, -1)
    if step.rows < step.session.rows:  # one sequence stands for all of the session
        new = step.session.cache[:, :, step.start + start : step.start + end]
        new[:, 1:] = new[:, :1]
    step.turn += piece.rows * piece.tokens
    step.width, step.row = piece.tokens, piece.row + piece.rows
    if step.row == step.rows:
        step.done, step.width, step.row = end, 0, 0


def is_number(value: Any, low: int, high: int) -> bool:
    """Whether a value is an integer of [low, high); a float or a truth value is none."""
    return type(value) is int and low <= value < high


def check_opening(opening: Opening, cache: torch.Tensor, num_blocks: int) -> None:
    """Refuse a session that cannot be computed.

    :raises ValueError: telling why
    """
    first, last = opening.first, opening.last
    if not (is_number(first, 0, num_blocks) and is_number(last, first + 1, num_blocks + 1)):
        raise ValueError(f"there are no blocks [{first}, {last}) among {num_blocks}")
    if cache.shape[0] != last - first or not cache.shape[1]:
        raise ValueError(f"attention cache of shape {list(cache.shape)} is none for {last - first} blocks")


def check_step(request: StepRequest, cache_shape: Sequence[int], hidden_size: int) -> None:
    """Refuse a step that does not fit its session. Handlers check more kindly; here it would be others' failure.

    :param cache_shape: of the session's attention cache, see ``RaggedBlocks.cache_descriptor``
    :raises ValueError: telling what does not fit
    """
    blocks, rows, max_length = cache_shape[:3]
    if len(request.shape) != 3 or not all(type(size) is int for size in request.shape):
        raise ValueError(f"hidden states of shape {request.shape} are none")
    sequences, tokens, size = request.shape
    if sequences not in (1, rows) or tokens < 1 or size != hidden_size:
        raise ValueError(f"hidden states of shape {list(request.shape)} are not [{rows}, tokens, {hidden_size}]")
    if not is_number(request.start, 0, max_length - tokens + 1):
        raise ValueError(f"{tokens} tokens from position {request.start!r} do not fit {max_length}")
    if request.hypotheses is not None and not (
        len(request.hypotheses) == rows and all(is_number(number, 0, rows) for number in request.hypotheses)
    ):
        raise ValueError(f"hypotheses are not {rows} numbers of the session's sequences")
    if request.prompts is not None:
        if len(request.prompts) != blocks:
            raise ValueError(f"there are deep prompts of {len(request.prompts)} blocks, not of {blocks}")
        for prompt in request.prompts:
            if prompt is not None and (prompt.ndim != 3 or len(prompt) < sequences or prompt.shape[2] != hidden_size):
                raise ValueError(f"deep prompts of shape {list(prompt.shape)} do not fit {sequences} sequences")


def choose(steps: Sequence[_Step], prefill_tokens: int, mixed_tokens: int) -> list[Piece]:
    """Return what the next batch computes of the steps.

    Those that decode take part, up to a bounded number of sequences, the oldest first. Prompts, and decoding steps of
    more sequences than a prompt may bring tokens, share a bounded number of tokens, the oldest first.

    :param prefill_tokens: that number, if none decodes, and the number of sequences that decode
    :param mixed_tokens: that number beside steps that decode
    """
    batch: list[Piece] = []
    others: list[_Step] = []
    rows = prefill_tokens
    for step in steps:
        if step.long or step.rows > mixed_tokens:
            others.append(step)
        elif step.rows <= rows:
            batch.append(Piece(step, 1, 0, step.rows))
            rows -= step.rows
        else:
            rows = 0  # who comes later does not overtake it
    tokens = mixed_tokens if batch else prefill_tokens
    for step in others:
        if tokens > 0:
            count = step.width or max(1, min(step.left, tokens // step.rows))
            sequences = min(step.rows - step.row, max(1, tokens // count))
            batch.append(Piece(step, count, step.row, sequences))
            tokens -= count * sequences
    return batch
