"""Who serves which blocks, how fast, how full; and the route of a session through them."""

import asyncio
import collections
import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swarm.compat import CALL_TIMEOUT, use_view_reader

from petals.client.routing import RemoteSequenceManager
from petals.data_structures import RemoteModuleInfo, RemoteSpanInfo, ServerState
from petals.utils.dht import compute_spans, get_remote_module_infos
from petals.utils.random import sample_up_to

from swarm.background import FIRST_DELAY, Loop
from swarm.errors import BlocksMissing, CacheFull, SessionLengthExceeded, SwarmError

log = logging.getLogger(__name__)

# Routing takes time with the number of servers, and anybody can announce thousands. More than these of one block, or
# in all, are not better for one session than these.
MAX_SERVERS_OF_BLOCK, MAX_SERVERS = 16, 256
# From which servers a route goes on at one block: those that are reached soonest.
MAX_DOORS = 8
# What a route is expected to cost, as petals reckons.
OVERHEAD = 0.018  # seconds for a request
DEFAULT_RPS = 300.0  # requests per second of a server that does not say
FULL_DELAY = 10.0  # seconds to wait for attention cache
DEFAULT_DELAY, LONGEST_DELAY = 0.15, 5.0  # seconds there: not measured, not reachable
# A server that has answered rubbish is trusted again after so many good steps, an answer or two.
GOOD_STEPS = 1000
MAX_OFFENDERS = 10_000  # remembered; peers can have any number of names


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
        # Peers that have answered rubbish: good steps until they are trusted again. The oldest are forgotten.
        self._offenders: collections.OrderedDict[Any, int] = collections.OrderedDict()

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
        manager = self.manager
        pings = manager.ping_aggregator.to_dict()
        with manager.lock_changes:
            spans = list(manager.state.sequence_info.spans_by_priority)
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

    def route(
        self, start: int, end: int, cache_tokens: int, avoid: Collection[Any] = frozenset()
    ) -> list[RemoteSpanInfo]:
        """Return spans that together compute blocks [start, end) with the least expected latency.

        :param cache_tokens: tokens of attention cache that the session needs; servers without them are avoided
        :param avoid: ids of peers not to route to, as long as the others have all blocks
        :raises BlocksMissing: if no known server holds one of the blocks
        """
        manager = self.manager
        with manager.lock_changes:
            spans = list(manager.state.sequence_info.spans_by_priority)
        pings = manager.ping_aggregator.to_dict()
        others = [span for span in spans if span.peer_id not in avoid]
        found = cheapest_route(others, start, end, pings, cache_tokens)
        if found is None:
            found = cheapest_route(spans, start, end, pings, cache_tokens)
        if found is None:
            held = {block for span in spans for block in range(span.start, span.end)}
            raise BlocksMissing(self.model, [block for block in range(start, end) if block not in held])
        return found

    def has_others(self, start: int, end: int, avoid: Collection[Any]) -> bool:
        """Whether peers that are not in ``avoid`` have blocks [start, end) all together."""
        manager = self.manager
        with manager.lock_changes:
            spans = list(manager.state.sequence_info.spans_by_priority)
        held = {block for span in spans if span.peer_id not in avoid for block in range(span.start, span.end)}
        return held.issuperset(range(start, end))

    def ban(self, peer_id: object, *, offence: bool = False) -> None:
        """Do not route to a peer for a while (petals' ``ban_timeout``, longer with every failure in a row).

        :param offence: whether it did what no sound server does. Single good answers do not make up for that
        """
        manager = self.manager
        if offence:
            self._offenders[peer_id] = GOOD_STEPS
            self._offenders.move_to_end(peer_id)
            if len(self._offenders) > MAX_OFFENDERS:
                self._offenders.popitem(last=False)
        manager.on_request_failure(peer_id)
        with manager.lock_changes:
            # petals drops the peer from `block_infos` only and goes on routing to it until the next refresh.
            info = manager.state.sequence_info
            info.spans_by_priority, info.spans_containing_block = info._sort_spans(info.block_infos)

    def unban(self, peer_id: object) -> None:
        """Forget the failures of a peer that has answered; those of an offender after it has answered often."""
        if peer_id in self._offenders:
            self._offenders[peer_id] -= 1
            if self._offenders[peer_id]:
                return
            del self._offenders[peer_id]
        manager = self.manager
        manager.on_request_success(peer_id)
        first_seen(manager)[peer_id] = 0.0  # whoever has computed is known better than all who have not

    def close(self) -> None:
        """End the background thread; does not wait for it."""
        self.manager._thread.should_shutdown = True  # it runs if petals' own sessions were used
        self.reader.stop()


def cheapest_route(
    spans: Sequence[RemoteSpanInfo], start: int, end: int, pings: Mapping[Any, float], cache_tokens: int
) -> list[RemoteSpanInfo] | None:
    """Return the spans that are expected to compute blocks [start, end) soonest; None if some have no server.

    A route stays with a server to the end of its span, or of the blocks. It is the shortest path through nodes
    (server, block), found block by block, since edges lead to the same block or the next. The costs are those of
    ``RemoteSequenceManager._build_inference_graph`` in petals.

    :param pings: seconds there and back, by peer
    """
    # For each server at the present block: seconds until there, and (the way before, its span, the block it began at).
    ways: dict[int, tuple[float, Any]] = {}
    for block in range(start, end):
        here = [(index, span) for index, span in enumerate(spans) if span.start <= block < span.end]
        doors = sorted((way for index, way in ways.items() if spans[index].end == block), key=lambda way: way[0])
        reached: dict[int, tuple[float, Any]] = {}
        for index, span in here:
            cost, before = _cheapest_door(span, doors[:MAX_DOORS], pings, first=block == start)
            if cost < math.inf and not has_cache(span, cache_tokens):
                cost += FULL_DELAY
            best = (cost, (before, span, block))
            if index in ways and ways[index][0] <= cost:
                best = ways[index]
            if best[0] < math.inf:
                reached[index] = (best[0] + 1 / (span.server_info.inference_rps or DEFAULT_RPS), best[1])
        ways = reached
    goals = [(cost + _delay(pings.get(spans[index].peer_id)), way) for index, (cost, way) in ways.items()]
    if not goals:
        return None
    _, way = min(goals, key=lambda goal: goal[0])
    route: list[RemoteSpanInfo] = []
    while way is not None:
        way, span, begin = way
        route.insert(0, RemoteSpanInfo(span.peer_id, begin, end, span.server_info))
        end = begin
    return route


def _cheapest_door(
    span: RemoteSpanInfo, doors: Sequence[tuple[float, Any]], pings: Mapping[Any, float], *, first: bool
) -> tuple[float, Any]:
    """Return after how many seconds a span can begin that is not under way yet, and the way before it."""
    if first:
        return _delay(pings.get(span.peer_id)) + OVERHEAD, None
    found: tuple[float, Any] = (math.inf, None)
    for cost, way in doors:
        next_pings = way[1].server_info.next_pings
        cost += _delay(next_pings.get(span.peer_id.to_base58()) if next_pings else None) + OVERHEAD
        if cost < found[0]:
            found = (cost, way)
    return found


def _delay(ping: float | None) -> float:
    """Return seconds there, by seconds there and back."""
    return DEFAULT_DELAY if ping is None else min(ping / 2, LONGEST_DELAY)


def has_cache(span: RemoteSpanInfo, tokens: int) -> bool:
    """Whether a server announces attention cache for so many tokens: keys and values of all its blocks."""
    left = span.server_info.cache_tokens_left
    return left is None or tokens * 2 * span.length <= left


def read_view(manager: RemoteSequenceManager) -> None:
    """Read who serves which blocks, leave out who is banned and who is too many, and measure some pings.

    In the place of petals' ``RemoteSequenceManager._update``, on its thread.
    """
    config = manager.config
    infos = get_remote_module_infos(manager.dht, manager.block_uids, active_adapter=config.active_adapter, latest=True)
    for info in infos:
        allowed = {
            peer: server
            for peer, server in info.servers.items()
            if (manager.allowed_servers is None or peer in manager.allowed_servers)
            and (manager.blocked_servers is None or peer not in manager.blocked_servers)
        }
        # If all are banned the fault may be ours.
        info.servers = {peer: it for peer, it in allowed.items() if peer not in manager.state.banned_peers} or allowed
    keep_some(infos, preference(manager, infos))
    with manager.lock_changes:
        manager.state.sequence_info.update_(infos)
        holders = [[span.peer_id for span in spans] for spans in manager.state.sequence_info.spans_containing_block]
    groups = holders[0], list(itertools.chain(*holders[1:-1])), holders[-1]
    pinged = {peer for group in groups for peer in sample_up_to(group, config.max_pinged)}
    manager.ping_aggregator.ping(list(pinged), wait_timeout=config.ping_timeout)
    manager.ready.set()


def first_seen(manager: RemoteSequenceManager) -> dict[Any, float]:
    """Return since when each server of the view is known, time.monotonic(); 0 for those that have computed."""
    return vars(manager).setdefault("first_seen", {})


def preference(manager: RemoteSequenceManager, infos: Sequence[RemoteModuleInfo]) -> Callable[[Any], Any]:
    """Note which servers are there; return a key that puts those first which are most likely to be sound ones.

    Those that have computed come first, then those that are known for longest, and among these those whose pings are
    known: what is announced in order to crowd others out comes after them.
    """
    seen, now = first_seen(manager), time.monotonic()
    present = {peer for info in infos for peer in info.servers}
    for peer in present:
        seen.setdefault(peer, now)
    for peer in [peer for peer in list(seen) if peer not in present and peer not in manager.state.banned_peers]:
        del seen[peer]
    pings = manager.ping_aggregator.to_dict()
    return lambda peer: (seen[peer], not math.isfinite(pings.get(peer, math.inf)), peer)


def keep_some(infos: Sequence[RemoteModuleInfo], key: Callable[[Any], Any]) -> None:
    """Leave only so many servers in the view that a route is found in milliseconds, by ``key`` the first ones."""
    spans = compute_spans(infos, min_state=ServerState.ONLINE)
    kept: set[Any] = set()
    counts = [0] * len(infos)
    for peer in sorted(spans, key=key):
        blocks = range(spans[peer].start, spans[peer].end)
        if len(kept) < MAX_SERVERS and any(counts[block] < MAX_SERVERS_OF_BLOCK for block in blocks):
            kept.add(peer)
            for block in blocks:
                counts[block] += 1
    for info in infos:
        info.servers = {peer: server for peer, server in info.servers.items() if peer in kept}


use_view_reader(read_view)
