"""Continuous batching: compute the waiting steps of different sessions as one batch.

A server's handlers are separate processes, which take requests from the network; the ``Batcher`` is a thread of the
computing process. A channel, a pair of connected sockets, connects each handler to it. The steps that have arrived when
a batch ends make the next one (Yu et al., "Orca", OSDI 2022): at once, or together with others that are expected back
soon. A lone session never waits. Prompts are cut into chunks, so that others' decoding continues between them (Agrawal
et al., "Sarathi-Serve", OSDI 2024).

A session's errors affect that session alone: an error in a message is reported to its sender, a step that cannot be
computed fails by itself, and a handler that does not read is dropped.
"""

import contextlib
import ctypes
import logging
import math
import multiprocessing
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import swarm.compat  # noqa: F401

import torch

from swarm.hardware import return_free_memory
from swarm.process import set_threads
from swarm.server.blocks import RaggedBlocks
from swarm.server.cache import CacheIsGone, SharedMemoryCache
from swarm.server.channel import (
    BatcherChannel,
    HandlerChannel,
    Message,
    Opening,
    Reply,
    StepRequest,
    from_bytes,
    to_bytes,
)
from swarm.server.checks import check_opening, check_step
from swarm.server.compute import compute_batch, threads_for
from swarm.server.steps import Piece, Session, Step, StepKind, is_draft

log = logging.getLogger(__name__)

# Prompt tokens in one batch, alone and beside sessions that decode. A CPU computes 100 rows as efficiently as more, so
# a small batch keeps the first of many prompts from waiting for the last; beside decoding sessions, the pieces delay
# those by the time of a few steps only. A GPU needs more rows to be busy.
CPU_PREFILL, CPU_MIXED = 192, 64
GPU_PREFILL, GPU_MIXED = 2048, 512
# After this many tokens, a step yields to other long ones. This project's clients send that many at a time, so among
# them it is first come, first served.
TURN_TOKENS = 512
# A handler reads its replies at once; one that reads nothing for this long is stopped or hangs.
SEND_TIMEOUT = 10.0  # seconds
# For the time of how many batches it pays to wait for others. Counting passes over the weights gives 1; with client and
# server on the same two cores, 2 gave 16 sessions 1.3 times the speed of 1: clients are faster while nothing computes.
PATIENCE = 2.0
# A session is late after this many times its last turnaround.
LATENESS = 1.25


class Batcher(threading.Thread):
    """Computes the steps that handlers send, in batches.

    The server depends on it, so neither a session's messages nor the end of a handler stop it.
    """

    def __init__(
        self,
        blocks: RaggedBlocks,
        memory_cache: SharedMemoryCache,
        num_channels: int,
        threads: int | None = None,
        send_timeout: float = SEND_TIMEOUT,
    ) -> None:
        """Make a batcher; start it to compute.

        :param num_channels: number of handlers
        :param threads: of PyTorch's operators; default: unchanged
        :param send_timeout: seconds after which a handler that reads nothing is dropped
        """
        super().__init__(name="batcher", daemon=True)
        self.blocks = blocks
        self._threads = threads
        on_cpu = blocks.device.type == "cpu"
        self._prefill_tokens = (CPU_PREFILL, CPU_MIXED) if on_cpu else (GPU_PREFILL, GPU_MIXED)
        self._memory_cache = memory_cache
        self._send_timeout = send_timeout
        pairs = [socket.socketpair() for _ in range(num_channels)]
        self._channels = [BatcherChannel(ours) for ours, _ in pairs]
        self._handler_ends = [theirs for _, theirs in pairs]
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._sessions: dict[tuple[BatcherChannel, int], Session] = {}  # by channel and number there
        self._refused: dict[tuple[BatcherChannel, int], str] = {}  # sessions that failed to open, and why
        # Waiting steps, by the blocks that they need. The blocks served last are at the end.
        self._queues: dict[tuple[int, int], list[Step]] = {}
        self._away: dict[Session, float] = {}  # when each absent session is expected back
        self._patience = 0.0  # until when it pays to wait for them
        self.batches: Any = multiprocessing.Value(ctypes.c_uint64)  # computed so far; handlers report it
        self.busy_since: float | None = None  # since when it has not waited for messages; None while it waits
        self.lost: str | None = None  # why it dropped a handler, if it did

    def handler_channel(self, index: int) -> HandlerChannel:
        """Return the handler's end of a channel; fork the handler after that."""
        mine = self._handler_ends[index]
        others = [*(channel.connection for channel in self._channels), *self._handler_ends]
        return HandlerChannel(mine, self.blocks.dtype, [other for other in others if other is not mine])

    @torch.inference_mode()
    def run(self) -> None:
        """Compute until ``stop``."""
        if self._threads is not None:
            set_threads(self._threads)
        for connection in self._handler_ends:
            connection.close()  # the handlers have copies; without ours we notice their end
        self._selector.register(self._woken, selectors.EVENT_READ)
        for channel in self._channels:
            self._selector.register(channel.connection, selectors.EVENT_READ, channel)
        try:
            while self._wait_for_messages():
                self._lose_silent_handlers()
                if self._queues and not self._time_to_wait():
                    self._compute_next()
        except Exception:
            log.exception("the batcher has failed; all sessions of this server are lost")
        finally:
            self._selector.close()
            for channel in self._channels:
                channel.close()

    def stop(self) -> None:
        """End the thread after the current batch. Does not wait."""
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def _wait_for_messages(self) -> bool:
        """Wait for something to do; read and send without blocking. Return whether to continue."""
        self.busy_since = None
        events = self._selector.select(timeout=self._time_to_select())
        self.busy_since = time.monotonic()
        for key, mask in events:
            if key.fileobj is self._woken:
                return False
            channel: BatcherChannel = key.data
            try:
                if mask & selectors.EVENT_WRITE:
                    channel.flush()
                    self._watch(channel)
                if mask & selectors.EVENT_READ:
                    for message in channel.receive():
                        if channel in self._channels:  # a reply to an earlier message may have failed
                            self._process(channel, message)
            except Exception as error:  # the handler is gone, or the rest of its stream is unreadable
                self._lose(channel, error)
        return True

    def _time_to_select(self) -> float | None:
        """Return how many seconds to wait for messages; None: until one comes."""
        times = [channel.taken + self._send_timeout for channel in self._channels if channel.unsent]
        if not times:
            return self._time_to_wait()
        until_given_up = max(0.0, min(times) - time.monotonic())
        patience = self._time_to_wait()
        return until_given_up if patience is None else min(patience, until_given_up)

    def _watch(self, channel: BatcherChannel) -> None:
        """Watch a channel for messages, and for room if bytes wait to be sent."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.unsent else 0)
        if self._selector.get_key(channel.connection).events != events:
            self._selector.modify(channel.connection, events, channel)

    def _lose_silent_handlers(self) -> None:
        for channel in list(self._channels):
            if channel.unsent and time.monotonic() - channel.taken > self._send_timeout:
                self._lose(channel, TimeoutError(f"it has read nothing for {self._send_timeout:g} s"))

    def _lose(self, channel: BatcherChannel, error: Exception) -> None:
        """Drop a handler and its sessions."""
        if channel not in self._channels:
            return
        reason = f"{type(error).__name__}: {error}"
        numbers = [number for owner, number in self._sessions if owner is channel]
        if numbers or not isinstance(error, EOFError):  # else it has ended normally
            log.warning("a handler is lost, with %d sessions: %s", len(numbers), reason)
        self._selector.unregister(channel.connection)
        self._channels.remove(channel)
        channel.close()
        for number in numbers:
            self._close(channel, number)
        self._refused = {key: why for key, why in self._refused.items() if key[0] is not channel}
        self.lost = reason

    def _process(self, channel: BatcherChannel, message: Any) -> None:
        """Process a message. Errors are reported to its session.

        :raises TypeError: if it is not a message
        """
        if not isinstance(message, Message):
            raise TypeError(f"{type(message).__name__} is not a message")
        try:
            if isinstance(message, StepRequest):
                self._enqueue(channel, message)
            elif isinstance(message, Opening):
                self._open(channel, message)
            else:
                self._close(channel, message.session)
        except Exception as error:
            if not isinstance(error, ValueError):
                log.exception("cannot process a message of a session")
            if isinstance(message, StepRequest):
                self._reply(channel, Reply(message.session, error=f"{type(error).__name__}: {error}"))

    def _open(self, channel: BatcherChannel, message: Opening) -> None:
        key = (channel, message.session)
        try:
            with self._memory_cache.use_cache(message.handle) as (cache,):
                check_opening(message, cache, self.blocks.windows)
            self._sessions[key] = Session(*key, cache, message.first, message.last)
        except CacheIsGone as error:  # the client has hung up: no steps will come
            self._refused[key] = str(error)
        except Exception as error:
            self._refused[key] = f"{type(error).__name__}: {error}"
            raise

    def _time_to_wait(self) -> float | None:
        """Return how many seconds to wait for messages before the next batch; None: until one comes.

        When a batch ends, some of the other sessions wait already, while its own are just reading their answers. A
        batch of all takes hardly longer than one of a few, so it pays to wait for sessions that usually come back soon,
        but never for one that was late the last time. A lone session does not wait.
        """
        if not self._queues:
            return None
        waiting = [step for steps in self._queues.values() for step in steps]
        prefill = any(step.kind is StepKind.PREFILL for step in waiting)
        if prefill or sum(step.size for step in waiting) >= self._prefill_tokens[0]:
            return 0.0  # the next batch is full without the others
        now = time.monotonic()
        for session, back in list(self._away.items()):
            if back < now:
                session.turnaround = math.inf
                del self._away[session]
        expected = [back for back in self._away.values() if back < self._patience]
        return max(expected) - now if expected else 0.0

    def _enqueue(self, channel: BatcherChannel, request: StepRequest) -> None:
        key = (channel, request.session)
        session = self._sessions.get(key)
        if session is None:
            raise ValueError(self._refused.get(key, "there is no such session"))
        check_step(request, session, self.blocks.config.hidden_size)
        hidden = from_bytes(request.hidden, self.blocks.dtype, request.shape)
        verifies = is_draft(request.start, request.shape[1])
        step = Step(session, request.start, hidden, request.prompts, request.hypotheses, verifies)
        session.reach.advance(step.start, step.start + step.left)
        self._queues.setdefault((session.first, session.last), []).append(step)
        self._away.pop(session, None)
        session.turnaround = time.monotonic() - session.replied

    def _close(self, channel: BatcherChannel, number: int) -> None:
        self._refused.pop((channel, number), None)
        session = self._sessions.pop((channel, number), None)
        if session is not None:
            self._away.pop(session, None)
            for blocks, steps in list(self._queues.items()):
                self._requeue(blocks, [step for step in steps if step.session is not session])
        with self._memory_cache.use_cache():  # frees the session's cache
            pass
        if not self._sessions:
            return_free_memory()  # of all earlier sessions

    def _requeue(self, blocks: tuple[int, int], steps: list[Step]) -> None:
        """Let steps wait behind those for other blocks."""
        self._queues.pop(blocks, None)
        if steps:
            self._queues[blocks] = steps

    def _compute_next(self) -> None:
        blocks, steps = next(iter(self._queues.items()))
        batch = next_batch(steps, *self._prefill_tokens)
        started = time.monotonic()
        failed = self._compute_or_isolate(batch, blocks)
        served = [piece.step for piece in batch if piece.step not in failed]
        answered = [step for step in served if not step.left]
        # Steps that have had a turn yield to others. Requeue before replying: a lost channel takes its steps with it.
        late = [step for step in served if step.left and step.turn >= TURN_TOKENS]
        for step in late:
            step.turn = 0
        gone = {*answered, *failed, *late}
        self._requeue(blocks, [*(step for step in steps if step not in gone), *late])
        for step, reason in failed.items():
            self._reply(step.session.channel, Reply(step.session.number, error=reason))
        for step in answered:
            self._reply(step.session.channel, Reply(step.session.number, to_bytes(step.hidden)))
        self._expect_back([step.session for step in answered], time.monotonic() - started)

    def _compute_or_isolate(self, batch: Sequence[Piece], blocks: tuple[int, int]) -> dict[Step, str]:
        """Compute a batch, or, if that fails, each of its steps alone; return which of those failed, and why.

        This rewrites what the failed batch has written to the caches, with the same values.
        """
        try:
            if self._threads is not None:
                set_threads(threads_for(batch, self._threads))
            compute_batch(self.blocks, batch, *blocks)
            with self.batches.get_lock():
                self.batches.value += 1
        except Exception as error:  # such as out of memory; only a step that fails alone is reported
            log.exception("a batch of %d steps failed", len(batch))
            if self.blocks.device.type == "cuda":
                torch.cuda.synchronize(self.blocks.device)  # raises if the device is unusable: restart
            if len(batch) == 1:
                return {batch[0].step: f"{type(error).__name__}: {error}"}
            failed: dict[Step, str] = {}
            for piece in batch:
                failed |= self._compute_or_isolate([piece], blocks)
            return failed
        return {}

    def _expect_back(self, sessions: Sequence[Session], duration: float) -> None:
        """Note that these sessions were answered, after a batch of ``duration`` seconds."""
        now = time.monotonic()
        self._patience = now + PATIENCE * duration
        for session in sessions:
            session.replied = now
            if session.turnaround < math.inf and (session.channel, session.number) in self._sessions:
                self._away[session] = now + LATENESS * session.turnaround

    def _reply(self, channel: BatcherChannel, reply: Reply) -> None:
        if channel not in self._channels:
            return  # lost by now
        try:
            channel.send(reply)
            self._watch(channel)
        except OSError as error:
            self._lose(channel, error)


def next_batch(steps: Sequence[Step], prefill_tokens: int, mixed_tokens: int) -> list[Piece]:
    """Return the pieces of the steps that the next batch computes.

    Steps that decode or verify take part whole, oldest first, up to ``prefill_tokens``. Prompts, and other steps of
    more than ``mixed_tokens``, share a budget of tokens, oldest first. No piece has more tokens of a sequence than
    the session's cache takes at once.

    :param prefill_tokens: that budget if no step decodes or verifies, and the limit of those that do
    :param mixed_tokens: that budget beside steps that decode or verify
    """
    batch: list[Piece] = []
    others: list[Step] = []
    room = prefill_tokens
    for step in steps:
        if step.kind is StepKind.PREFILL or step.size > mixed_tokens or step.left > step.session.cache.longest:
            others.append(step)
        elif step.size <= room:
            batch.append(Piece(step, step.left, 0, step.rows))
            room -= step.size
        else:
            room = 0  # later steps do not overtake it
    tokens = mixed_tokens if batch else prefill_tokens
    for step in others:
        if tokens > 0:
            count = step.width or max(1, min(step.left, step.session.cache.longest, tokens // step.rows))
            sequences = min(step.rows - step.row, max(1, tokens // count))
            batch.append(Piece(step, count, step.row, sequences))
            tokens -= count * sequences
    return batch
