"""The route through a swarm's servers with the lowest expected latency."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import swarm.compat  # noqa: F401

from hivemind.p2p import PeerID
from petals.data_structures import RemoteSpanInfo

# Servers from which a route may continue at one block: those reached soonest.
MAX_DOORS = 8
# The expected costs of a route, as petals estimates them.
OVERHEAD = 0.018  # seconds for a request
DEFAULT_RPS = 300.0  # requests per second of a server that does not announce them
FULL_DELAY = 10.0  # seconds to wait for attention cache
DEFAULT_DELAY, LONGEST_DELAY = 0.15, 5.0  # seconds one way: if not measured, if unreachable


def cheapest_route(
    spans: Sequence[RemoteSpanInfo], start: int, end: int, pings: Mapping[PeerID, float], cache_tokens: int
) -> list[RemoteSpanInfo] | None:
    """Return the spans expected to compute blocks [start, end) soonest; None if some blocks have no server.

    A route stays with a server to the end of its span or of the blocks. It is the shortest path through nodes
    (server, block), found block by block, since edges lead to the same block or the next. The costs are those of
    ``RemoteSequenceManager._build_inference_graph`` in petals.

    :param pings: round-trip times in seconds, by peer
    """
    # For each server at the current block: seconds to reach it, and (the path before, its span, the block it began at).
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
    span: RemoteSpanInfo, doors: Sequence[tuple[float, Any]], pings: Mapping[PeerID, float], *, first: bool
) -> tuple[float, Any]:
    """Return the seconds until a route can enter this span, and the path before it."""
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
    """Return the one-way delay in seconds for a round-trip time in seconds."""
    return DEFAULT_DELAY if ping is None else min(ping / 2, LONGEST_DELAY)


def has_cache(span: RemoteSpanInfo, tokens: int) -> bool:
    """Whether a server announces attention cache for this many tokens: keys and values of all its blocks."""
    left = span.server_info.cache_tokens_left
    return left is None or tokens * 2 * span.length <= left
