"""Who serves which blocks, how fast, how full; and the route of a session through them."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import swarm.compat  # noqa: F401

from petals.client.routing import RemoteSequenceManager
from petals.data_structures import RemoteSpanInfo, ServerState

from swarm.errors import BlocksMissing


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
    """A view of the servers of one model, kept fresh from the DHT by a background thread of petals.

    It wraps petals' ``RemoteSequenceManager``, whose routing it uses and whose faults it mends: a failed peer leaves
    the routing tables at once instead of with the next refresh, and no wait is without a limit.
    """

    def __init__(self, manager: RemoteSequenceManager, model: str) -> None:
        self.manager = manager
        self.model = model
        self.num_blocks = len(manager)
        # Called on the event loop when servers have no attention cache left for so many tokens; tells if it frees some.
        self.make_room: Callable[[int], bool] = lambda tokens: False
        self.cache_turn = asyncio.Lock()  # held by the session that waits for attention cache; for the event loop

    def start(self, timeout: float) -> bool:
        """Start the background thread; return whether the DHT was read within ``timeout`` seconds."""
        with self.manager._thread_start_lock:
            if not self.manager._thread.is_alive():
                self.manager._thread.start()
        return self.wait(lambda: self.manager.state.sequence_info.last_updated_time is not None, timeout)

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
        """Return the numbers of the blocks that no known server holds."""
        with self.manager.lock_changes:
            spans = self.manager.state.sequence_info.spans_containing_block
            return [block for block in range(self.num_blocks) if not spans[block]]

    def holders(self) -> list[int]:
        """Return for each block how many known servers hold it."""
        with self.manager.lock_changes:
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
        self.manager._thread.should_shutdown = True
        self.manager._thread.trigger.set()
