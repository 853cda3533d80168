"""Which servers hold which blocks, how fast and how full they are; and a session's route through them."""

import asyncio
import collections
import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from swarm.compat import CALL_TIMEOUT, use_view_reader

from hivemind.p2p import PeerID
from petals.client.routing import RemoteSequenceManager
from petals.data_structures import RemoteModuleInfo, RemoteSpanInfo, ServerState
from petals.utils.dht import compute_spans, get_remote_module_infos
from petals.utils.random import sample_up_to

from swarm.background import FIRST_DELAY, Loop
from swarm.client.cheapest_route import cheapest_route
from swarm.client.links import Links
from swarm.errors import BlocksMissing, CacheFull, SessionLengthExceeded, SwarmError
from swarm.lengths import stock_length
from swarm.weights import Fingerprint

log = logging.getLogger(__name__)

# Routing time grows with the number of servers, and anybody can announce thousands. More servers than this of one
# block, or in all, do not help a single session.
MAX_SERVERS_OF_BLOCK, MAX_SERVERS = 16, 256
# A server that has answered rubbish is trusted again after this many good steps, an answer or two.
GOOD_STEPS = 1000
MAX_OFFENDERS = 10_000  # remembered; a peer can take any number of names


@dataclass(frozen=True)
class ServerView:
    """What one server last announced."""

    peer_id: str
    start: int
    end: int  # serves blocks [start, end)
    throughput: float  # as announced, requests/s
    cache_tokens_left: int | None  # free attention cache: tokens times blocks, keys and values counted separately
    torch_dtype: str | None
    version: str | None
    public_name: str | None
    ping: float | None = None  # round trip in seconds, smoothed; None: not measured, or no answer


class CacheRelief(Protocol):
    """The opener of sessions, which can give up some of them."""

    def free_attention_cache(self, model: str, tokens: int) -> bool:
        """Free this many tokens of attention cache from unused sessions of a model. Does not wait.

        :returns: whether there were any
        """


class SwarmState:
    """A view of the servers of one model, kept fresh from the DHT by a background thread.

    It wraps petals' ``RemoteSequenceManager``, uses its routing and fixes its faults: a failed peer leaves the routing
    tables at once instead of at the next refresh, every wait has a limit, and the thread that reads the DHT survives
    failures.
    """

    def __init__(
        self,
        manager: RemoteSequenceManager,
        model: str,
        relief: CacheRelief | None = None,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        """Make a view that has not been read yet; see ``start``.

        :param relief: asked when servers have no attention cache left for a session
        :param fingerprint: of the model; servers that report another one are not used
        """
        self.fingerprint = fingerprint
        self.manager = manager
        self.model = model
        self.num_blocks = len(manager)
        self._stock_length = stock_length(manager.config)
        self._longest_session = self._stock_length  # as last read
        self._relief = relief
        self.cache_turn = asyncio.Lock()  # held by the session that waits for attention cache; on the event loop only
        self.links = Links()  # between servers; on the event loop only
        period = manager.config.update_period
        # A reading begins one period after the last, or two if servers were slow to answer pings, and has a limit.
        self.stale_after = 2 * period + CALL_TIMEOUT  # seconds
        # Replaces petals' thread, but shares its event, by which everybody asks for a reading, petals included.
        self.reader = Loop(
            f"read-swarm {model}",
            self._read,
            period,
            last_delay=max(period, FIRST_DELAY),
            expected=(ConnectionError, TimeoutError),
            wake=manager._thread.trigger,
        )
        self._connected = True
        self._connected_at = 0.0  # seconds, on the clock by which petals dates its readings
        self._answered_at: float | None = None  # seconds, monotonic
        self._failed_at: float | None = None  # seconds, monotonic
        # Peers that have answered rubbish: good steps left until they are trusted again. The oldest are forgotten.
        self._offenders: collections.OrderedDict[PeerID, int] = collections.OrderedDict()

    def _read(self) -> None:
        if self._connected:  # otherwise there is no DHT to read; `connect` will ask for a reading
            self.manager._update()

    def start(self, timeout: float) -> bool:
        """Start the background thread; return whether the DHT was read within ``timeout`` seconds."""
        self.reader.start()
        return self.wait(lambda: self.view_age is not None, timeout)

    def disconnect(self) -> None:
        """Note that this program is currently in no swarm; the view stays as last read."""
        self._connected = False

    def connect(self, dht: Any, p2p: Any) -> None:
        """From now on, read this DHT and reach servers by this P2P. Sessions use it from their next server on."""
        manager = self.manager
        manager.state.p2p = p2p
        manager.dht = manager.ping_aggregator.dht = dht
        # The banned peers were not at fault.
        banned = manager.state.banned_peers
        manager.state.banned_peers = type(banned)(base_time=banned.base_time, backoff_rate=banned.backoff)
        self._connected_at, self._connected = time.perf_counter(), True
        self.refresh()

    @property
    def connected(self) -> bool:
        """Whether this program is in the swarm and has read its DHT since joining."""
        read_at = self.manager.state.sequence_info.last_updated_time
        return self._connected and (read_at is None or read_at >= self._connected_at)

    @property
    def view_age(self) -> float | None:
        """Seconds since the DHT was read; None: not yet."""
        read_at = self.manager.state.sequence_info.last_updated_time  # on a clock that nobody adjusts
        return None if read_at is None else time.perf_counter() - read_at

    @property
    def stale(self) -> bool:
        """Whether the view is older than it can become while the swarm is readable."""
        age = self.view_age
        return age is not None and age > self.stale_after

    def free_attention_cache(self, tokens: int) -> bool:
        """Ask to free attention cache for this many tokens; return whether some will be free. Does not wait."""
        return self._relief is not None and self._relief.free_attention_cache(self.model, tokens)

    def note_answer(self) -> None:
        """Record that a step of some session has passed through all blocks."""
        self._answered_at = time.monotonic()

    def note_failure(self, error: SwarmError) -> None:
        """Record that a step of some session was given up. It counts if other sessions may fail the same way."""
        if not isinstance(error, (CacheFull, SessionLengthExceeded)):
            self._failed_at = time.monotonic()

    @property
    def answer_age(self) -> float | None:
        """Seconds since a step of any session passed through all blocks; None: not yet."""
        answered_at = self._answered_at
        return None if answered_at is None else time.monotonic() - answered_at

    @property
    def doubtful(self) -> bool:
        """Whether the most recent step of all sessions was given up."""
        answered_at, failed_at = self._answered_at, self._failed_at
        return failed_at is not None and (answered_at is None or failed_at > answered_at)

    def wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Refresh until ``condition`` holds or ``timeout`` seconds have passed; return whether it holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if (left := deadline - time.monotonic()) <= 0:
                return False
            self.refresh()
            # `ready` is set at the end of each refresh; the next one sees a server that joins.
            self.manager.ready.wait(min(left, 0.25))
            time.sleep(min(left, 0.05))
        return True

    def refresh(self) -> None:
        """Ask the background thread to read the DHT now; does not wait."""
        self.manager.ready.clear()
        self.manager._thread.trigger.set()

    def missing_blocks(self) -> list[int]:
        """Return the numbers of the blocks that no known server holds. Takes no lock: it works while others hang."""
        # Petals replaces these lists and never changes them.
        spans = self.manager.state.sequence_info.spans_containing_block
        return [block for block in range(self.num_blocks) if not spans[block]]

    def holders(self) -> list[int]:
        """Return for each block how many known servers hold it."""
        return [len(spans) for spans in self.manager.state.sequence_info.spans_containing_block]

    def longest_session(self) -> int:
        """Return how many tokens a session may have on servers that together hold all blocks, as last read.

        Blocks that no server holds at the moment do not count. Takes no lock.
        """
        blocks = self.manager.state.sequence_info.spans_containing_block
        if found := [max(map(self._takes, spans)) for spans in blocks if spans]:
            self._longest_session = min(found)
        return self._longest_session

    def _takes(self, span: RemoteSpanInfo) -> int:
        """Return the longest session that a server accepts; a stock server does not say."""
        return getattr(span.server_info, "longest_session", None) or self._stock_length

    def servers(self) -> list[ServerView]:
        """Return all known servers that are online, longest span first, as last read; asks no server."""
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

    def round_trip(self, peer_id: PeerID) -> float:
        """Return how many seconds a message to a server and back takes; infinity if that is not known."""
        return self.manager.ping_aggregator.to_dict().get(peer_id, math.inf)

    def route(
        self, start: int, end: int, cache_tokens: int, avoid: Collection[PeerID] = frozenset(), *, length: int = 0
    ) -> list[RemoteSpanInfo]:
        """Return spans that together compute blocks [start, end) with the lowest expected latency.

        :param cache_tokens: tokens of attention cache that the session needs; servers without them are avoided
        :param avoid: ids of peers to avoid, as long as the others have all blocks
        :param length: tokens of the session; servers that take none this long are avoided
        :raises BlocksMissing: if no known server holds one of the blocks
        """
        manager = self.manager
        with manager.lock_changes:
            spans = list(manager.state.sequence_info.spans_by_priority)
        pings = manager.ping_aggregator.to_dict()
        others = [span for span in spans if span.peer_id not in avoid]
        long_enough = [span for span in others if self._takes(span) >= length]
        for some in (long_enough, others, spans):
            if (found := cheapest_route(some, start, end, pings, cache_tokens)) is not None:
                return found
        held = {block for span in spans for block in range(span.start, span.end)}
        raise BlocksMissing(self.model, [block for block in range(start, end) if block not in held])

    def has_others(self, start: int, end: int, avoid: Collection[PeerID]) -> bool:
        """Whether the peers outside ``avoid`` together have blocks [start, end)."""
        manager = self.manager
        with manager.lock_changes:
            spans = list(manager.state.sequence_info.spans_by_priority)
        held = {block for span in spans if span.peer_id not in avoid for block in range(span.start, span.end)}
        return held.issuperset(range(start, end))

    def ban(self, peer_id: PeerID, *, offence: bool = False) -> None:
        """Do not route to a peer for a while (petals' ``ban_timeout``, longer with every failure in a row).

        :param offence: whether it did what no sound server does; single good answers do not make up for that
        """
        manager = self.manager
        if offence:
            self._offenders[peer_id] = GOOD_STEPS
            self._offenders.move_to_end(peer_id)
            if len(self._offenders) > MAX_OFFENDERS:
                self._offenders.popitem(last=False)
        manager.on_request_failure(peer_id)
        with manager.lock_changes:
            # petals drops the peer only from `block_infos` and continues to route to it until the next refresh.
            info = manager.state.sequence_info
            info.spans_by_priority, info.spans_containing_block = info._sort_spans(info.block_infos)

    def unban(self, peer_id: PeerID) -> None:
        """Forget the failures of a peer that has answered; an offender's only after it has answered often."""
        if peer_id in self._offenders:
            self._offenders[peer_id] -= 1
            if self._offenders[peer_id]:
                return
            del self._offenders[peer_id]
        manager = self.manager
        manager.on_request_success(peer_id)
        first_seen(manager)[peer_id] = 0.0  # a server that has computed ranks before all that have not

    def close(self) -> None:
        """Stop the background thread; does not wait for it."""
        self.manager._thread.should_shutdown = True  # it runs if petals' own sessions were used
        self.reader.stop()


def read_view(manager: RemoteSequenceManager) -> None:
    """Read which servers hold which blocks, leave out banned and surplus ones, and measure some pings.

    Replaces petals' ``RemoteSequenceManager._update``, on its thread.
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
        # If all are banned, the fault may be ours.
        info.servers = {peer: it for peer, it in allowed.items() if peer not in manager.state.banned_peers} or allowed
    keep_some(infos, preference(manager, infos))
    with manager.lock_changes:
        manager.state.sequence_info.update_(infos)
        holders = [[span.peer_id for span in spans] for spans in manager.state.sequence_info.spans_containing_block]
    groups = holders[0], list(itertools.chain(*holders[1:-1])), holders[-1]
    pinged = {peer for group in groups for peer in sample_up_to(group, config.max_pinged)}
    manager.ping_aggregator.ping(list(pinged), wait_timeout=config.ping_timeout)
    manager.ready.set()


def first_seen(manager: RemoteSequenceManager) -> dict[PeerID, float]:
    """Return when each server of the view was first seen, time.monotonic(); 0 for those that have computed."""
    return vars(manager).setdefault("first_seen", {})


def preference(manager: RemoteSequenceManager, infos: Sequence[RemoteModuleInfo]) -> Callable[[PeerID], Any]:
    """Note which servers are present; return a key that sorts those most likely to be sound first.

    Servers that have computed come first, then those known longest, and among these those whose pings are known.
    Servers announced to crowd others out come after them.
    """
    seen, now = first_seen(manager), time.monotonic()
    present = {peer for info in infos for peer in info.servers}
    for peer in present:
        seen.setdefault(peer, now)
    for peer in [peer for peer in list(seen) if peer not in present and peer not in manager.state.banned_peers]:
        del seen[peer]
    pings = manager.ping_aggregator.to_dict()
    return lambda peer: (seen[peer], not math.isfinite(pings.get(peer, math.inf)), peer)


def keep_some(infos: Sequence[RemoteModuleInfo], key: Callable[[PeerID], Any]) -> None:
    """Keep the first servers by ``key`` in the view, few enough that a route is found in milliseconds."""
    spans = compute_spans(infos, min_state=ServerState.ONLINE)
    kept: set[PeerID] = set()
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
