"""Who serves which blocks, how fast, how full; and the route of a session through them."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swarm.compat import CALL_TIMEOUT

from petals.client.routing import RemoteSequenceManager
from petals.data_structures import RemoteSpanInfo, ServerState

from swarm.background import FIRST_DELAY, Loop
from swarm.errors import BlocksMissing, CacheFull, SessionLengthExceeded, SwarmError


@dataclass(frozen=True)
class ServerView:
    """What one server announced last."""

    peer_id: str
    start: int
    end: int  # serves blocks [start, end)
    throughput: float  # as announced, requests/s
    cache_tokens_left: int | None  # free attention cache: tokens times blocks, keys and values counted apart
    torch_dtype: str | None
    version: str | None
    public_name: str | None
    ping: float | None = None  # seconds there and back, smoothed; None: not measured, or it does not answer


class SwarmState:
    """A view of the servers of one model, kept fresh from the DHT by a background thread.

    It wraps petals' ``RemoteSequenceManager``, whose routing it uses and whose faults it mends: a failed peer leaves
    the routing tables at once instead of with the next refresh, no wait is without a limit, and the thread that reads
    the DHT outlives its failures.
    """

    def __init__(self, manager: RemoteSequenceManager, model: str) -> None:
        self.manager = manager
        self.model = model
        self.num_blocks = len(manager)
        # Called on the event loop when servers have no attention cache left for so many tokens; tells if it frees some.
        self.make_room: Callable[[int], bool] = lambda tokens: False
        self.cache_turn = asyncio.Lock()  # held by the session that waits for attention cache; for the event loop
        period = manager.config.update_period
        # A reading begins a period after the last one, or two when servers were slow to answer pings, and has a limit.
        self.stale_after = 2 * period + CALL_TIMEOUT  # seconds
        # In place of petals' thread, with whose event everybody asks for a reading, petals included.
        self.reader = Loop(
            f"read-swarm {model}",
            self._read,
            period,
            last_delay=max(period, FIRST_DELAY),
            expected=(ConnectionError, TimeoutError),
            wake=manager._thread.trigger,
        )
        self._connected = True
        self._connected_at = 0.0  # seconds, of the clock that petals dates its readings with
        self._answered_at: float | None = None  # seconds, monotonic
        self._failed_at: float | None = None  # seconds, monotonic

    def _read(self) -> None:
        if self._connected:  # else there is no DHT to read, and `connect` asks for a reading
            self.manager._update()

    def start(self, timeout: float) -> bool:
        """Start the background thread; return whether the DHT was read within ``timeout`` seconds."""
        self.reader.start()
        return self.wait(lambda: self.view_age is not None, timeout)

    def disconnect(self) -> None:
        """Note that this program is in no swarm for the time being; the view stays as it was read last."""
        self._connected = False

    def connect(self, dht: Any, p2p: Any) -> None:
        """From now on read this DHT and reach servers by this P2P. Sessions take it with their next server."""
        manager = self.manager
        manager.state.p2p = p2p
        manager.dht = manager.ping_aggregator.dht = dht
        # They were banned for what was not their fault.
        banned = manager.state.banned_peers
        manager.state.banned_peers = type(banned)(base_time=banned.base_time, backoff_rate=banned.backoff)
        self._connected_at, self._connected = time.perf_counter(), True
        self.refresh()

    @property
    def connected(self) -> bool:
        """Whether this program is in the swarm, and has read its DHT since it is."""
        read_at = self.manager.state.sequence_info.last_updated_time
        return self._connected and (read_at is None or read_at >= self._connected_at)

    @property
    def view_age(self) -> float | None:
        """Seconds since the DHT was read; None: not yet."""
        read_at = self.manager.state.sequence_info.last_updated_time  # of a clock that nobody sets
        return None if read_at is None else time.perf_counter() - read_at

    @property
    def stale(self) -> bool:
        """Whether the view is older than a swarm that can be read lets it become."""
        age = self.view_age
        return age is not None and age > self.stale_after

    def note_answer(self) -> None:
        """A step of some session has passed all blocks."""
        self._answered_at = time.monotonic()

    def note_failure(self, error: SwarmError) -> None:
        """A step of some session was given up. It counts if other sessions may meet with the same."""
        if not isinstance(error, (CacheFull, SessionLengthExceeded)):
            self._failed_at = time.monotonic()

    @property
    def answer_age(self) -> float | None:
        """Seconds since a step of any session has passed all blocks; None: not yet."""
        answered_at = self._answered_at
        return None if answered_at is None else time.monotonic() - answered_at

    @property
    def doubtful(self) -> bool:
        """Whether the last step of any session was given up."""
        answered_at, failed_at = self._answered_at, self._failed_at
        return failed_at is not None and (answered_at is None or failed_at > answered_at)

    def wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Refresh until ``condition`` holds or ``timeout`` seconds are over; return whether it holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if (left := deadline - time.monotonic()) <= 0:
                return False
            self.refresh()
            # `ready` is set at the end of each refresh; a server that joins is seen by the next one.
            self.manager.ready.wait(min(left, 0.25))
            time.sleep(min(left, 0.05))
        return True

    def refresh(self) -> None:
        """Ask the background thread to read the DHT now; does not wait."""
        self.manager.ready.clear()
        self.manager._thread.trigger.set()

    def missing_blocks(self) -> list[int]:
        """Return the numbers of the blocks that no known server holds. Takes no lock: it is asked while things hang."""
        # Petals replaces these lists and never changes them.
        spans = self.manager.state.sequence_info.spans_containing_block
        return [block for block in range(self.num_blocks) if not spans[block]]

    def holders(self) -> list[int]:
        """Return for each block how many known servers hold it."""
        return [len(spans) for spans in self.manager.state.sequence_info.spans_containing_block]

    def servers(self) -> list[ServerView]:
        """Return all known servers that are online, longest span first. Asks nobody: it is what was read last."""
        pings = self.manager.ping_aggregator.to_dict()
        with self.manager.lock_changes:
            spans = list(self.manager.state.sequence_info.spans_by_priority)
        return [
            ServerView(
                peer_id=span.peer_id.to_base58(),
                start=span.start,
                end=span.end,
                throughput=span.server_info.throughput,
                cache_tokens_left=span.server_info.cache_tokens_left,
                torch_dtype=span.server_info.torch_dtype,
                version=span.server_info.version,
                public_name=span.server_info.public_name,
                ping=ping if math.isfinite(ping := pings.get(span.peer_id, math.inf)) else None,
            )
            for span in spans
            if span.server_info.state == ServerState.ONLINE
        ]

    def route(self, start: int, end: int, cache_tokens: int) -> list[RemoteSpanInfo]:
        """Return spans that together compute blocks [start, end) with the least expected latency.

        :param cache_tokens: tokens of attention cache that the session needs; servers without them are avoided
        :raises BlocksMissing: if no known server holds one of the blocks
        """
        missing = [block for block in self.missing_blocks() if start <= block < end]
        if missing:
            raise BlocksMissing(self.model, missing)
        spans = self.manager._make_sequence_with_min_latency(start, end, cache_tokens_needed=cache_tokens)
        spans[-1].end = min(spans[-1].end, end)  # petals may return a route that goes on to the end of the last server
        return spans

    def ban(self, peer_id: object) -> None:
        """Do not route to a peer for a while (petals' ``ban_timeout``, longer with every failure in a row)."""
        self.manager.on_request_failure(peer_id)
        with self.manager.lock_changes:
            # petals drops the peer from `block_infos` only and goes on routing to it until the next refresh.
            info = self.manager.state.sequence_info
            info.spans_by_priority, info.spans_containing_block = info._sort_spans(info.block_infos)

    def unban(self, peer_id: object) -> None:
        """Forget the failures of a peer that has answered."""
        self.manager.on_request_success(peer_id)

    def close(self) -> None:
        """End the background thread; does not wait for it."""
        self.manager._thread.should_shutdown = True  # it runs if petals' own sessions were used
        self.reader.stop()
