"""Who sends a request, as far as the network shows: one client, however many connections it opens."""

import ipaddress
from collections.abc import Sequence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# A household or a machine is given a network of this size, and may use every address of it (RFC 6177).
IPV6_PREFIX = 64  # bits


def parse_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Read addresses and networks, such as ``127.0.0.1`` and ``10.0.0.0/8``.

    :raises ValueError: naming the text that is neither
    """
    return tuple(ipaddress.ip_network(text, strict=False) for text in texts)


def client_address(peer: str, forwarded_for: str, trusted: Sequence[Network]) -> str:
    """Return the address of a client: of the last hop that is no trusted proxy.

    :param peer: the other end of the connection; empty for a Unix socket, whose other end is always trusted
    :param forwarded_for: the header ``X-Forwarded-For``: every proxy adds the address it was asked from to its end, and
        what a client has written itself stands before
    :returns: an IPv4 address, the network of an IPv6 address, or "" if there is no address
    """
    hops = [hop.strip() for hop in forwarded_for.split(",") if hop.strip()]
    current = peer
    while hops and is_trusted(current, trusted):
        current = hops.pop()
    return _canonical(current)


def is_trusted(peer: str, trusted: Sequence[Network]) -> bool:
    """Whether the other end of a connection is a trusted proxy, as that of a Unix socket always is."""
    address = _parse(peer)
    return not peer or (address is not None and any(address in network for network in trusted))


def _canonical(text: str) -> str:
    address = _parse(text)
    if address is None:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, IPV6_PREFIX), strict=False))
    return str(address)


def _parse(text: str) -> Address | None:
    """Read an address, with or without a port; None if it is none."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
