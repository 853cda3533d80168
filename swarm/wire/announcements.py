"""Which servers hold which blocks, from the records that servers store in the DHT."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hivemind.p2p import PeerID
from hivemind.utils import get_dht_time

from swarm.wire.packing import read_integer, read_number, read_text
from swarm.wire.records import MAX_RECORD
from swarm.wire.text import MAX_NAME, MAX_TEXT, Malformed, clean, quoted

MAX_RPS = 1e6  # requests per second; a small block on the best GPU does 10,000 or so
MAX_BLOCKS = 10_000  # of a model
MAX_ADAPTERS = 64
MAX_SESSION = 10**9  # tokens
MAX_PINGS = 256


async def read_module_infos(
    dht: Any,
    node: Any,
    uids: Sequence[str],
    active_adapter: str | None,
    expiration_time: float | None,
    latest: bool,
) -> list[Any]:
    """Read which servers hold which blocks; replaces petals' function, in the DHT's process.

    Petals' function fails for all blocks at the first record of an unexpected kind.
    """
    from petals.data_structures import RemoteModuleInfo  # petals cannot be imported before compat

    workers = len(uids) if dht.num_workers is None else min(len(uids), dht.num_workers)
    wanted = math.inf if latest else get_dht_time() if expiration_time is None else expiration_time
    found = await node.get_many(uids, wanted, num_workers=workers)
    infos = []
    for uid in uids:
        servers = read_announcements(uid, getattr(found[uid], "value", None))
        kept = {peer: info for peer, info in servers.items() if not active_adapter or active_adapter in info.adapters}
        infos.append(RemoteModuleInfo(uid=uid, servers=kept))
    return infos


def read_announcements(uid: str, members: object) -> dict[PeerID, Any]:
    """Return the announcements of a block's servers; each malformed one is left out by itself.

    :param members: what the DHT keeps for the block: subkeys to values with expiration times
    """
    servers: dict[PeerID, Any] = {}
    block = int(uid.rpartition(".")[2])
    if isinstance(members, dict):
        for subkey, member in members.items():
            with contextlib.suppress(Malformed):
                servers[read_peer_id(subkey)] = read_announcement(getattr(member, "value", None), block)
    return servers


def read_peer_id(text: object) -> PeerID:
    """Parse a peer id in base58.

    :raises Malformed: if it is not one
    """
    try:
        peer = PeerID.from_base58(read_text(text, "a peer id"))
    except Exception as error:  # base58 raises several kinds
        raise Malformed(f"{quoted(text)} is no peer id") from error
    data = peer.to_bytes()
    # A multihash: SHA-256, or a short public key itself. See libp2p's specification of peer ids.
    if not (
        len(data) == 34 and data[:2] == b"\x12\x20" or 3 <= len(data) <= 44 and data[:2] == bytes((0, len(data) - 2))
    ):
        raise Malformed(f"{quoted(text)} is no peer id")
    return peer


def read_announcement(value: object, block: int) -> Any:
    """Return what a server announces about itself.

    :param value: (state, throughput, the rest)
    :param block: the number of the block whose key it is stored under
    :raises Malformed: if it cannot be true
    """
    from petals.data_structures import ServerState

    from swarm.wire.server_info import AnnouncedInfo

    match value:
        case [state, throughput]:
            rest: Mapping[Any, Any] = {}
        case [state, throughput, dict(rest), *_]:
            pass
        case _:
            raise Malformed(f"{quoted(value)} is no announcement")
    start, end = rest.get("start_block"), rest.get("end_block")
    if (start, end) != (None, None):
        start = read_integer(start, "start_block", 0, block)
        end = read_integer(end, "end_block", block + 1, MAX_BLOCKS)
    cache = rest.get("cache_tokens_left")
    relay = rest.get("using_relay")
    longest = rest.get("longest_session")
    return AnnouncedInfo(
        state=ServerState(read_integer(state, "state", 0, 2)),
        throughput=min(read_number(throughput, "throughput", high=math.inf), MAX_RPS),
        start_block=start,
        end_block=end,
        public_name=_shown_text(rest, "public_name"),
        version=_shown_text(rest, "version"),
        network_rps=_rate(rest, "network_rps"),
        forward_rps=_rate(rest, "forward_rps"),
        inference_rps=_rate(rest, "inference_rps"),
        adapters=_adapters(rest.get("adapters") or ()),
        torch_dtype=_shown_text(rest, "torch_dtype"),
        quant_type=_shown_text(rest, "quant_type"),
        using_relay=relay if isinstance(relay, bool) else None,
        cache_tokens_left=None if cache is None else read_integer(cache, "cache_tokens_left", 0, 2**62),
        next_pings=_pings(rest.get("next_pings")),
        longest_session=None if longest is None else read_integer(longest, "longest_session", 1, MAX_SESSION),
        pushing=rest.get("pushing") is True,
    )


def _shown_text(announced: Mapping[Any, Any], name: str) -> str | None:
    value = announced.get(name)
    return None if value is None else clean(read_text(value, name, MAX_RECORD), MAX_NAME)


def _rate(announced: Mapping[Any, Any], name: str) -> float | None:
    """Return requests per second, always positive, since callers divide by them."""
    value = announced.get(name)
    return None if value is None else min(read_number(value, name, 1 / MAX_RPS), MAX_RPS)


def _adapters(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_ADAPTERS:
        raise Malformed(f"adapters must be a list of at most {MAX_ADAPTERS} names")
    return tuple(read_text(name, "an adapter", MAX_TEXT) for name in value)


def _pings(value: object) -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_PINGS:
        raise Malformed(f"next_pings must be a dictionary of at most {MAX_PINGS} peers")
    return {read_text(peer, "a peer id"): read_number(ping, "a ping") for peer, ping in value.items()}
