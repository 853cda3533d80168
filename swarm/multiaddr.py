"""Multiaddrs, the addresses of peers, such as ``/ip4/192.0.2.1/tcp/31330/p2p/12D3KooW...``.

They are checked before p2pd and hivemind read them, which say late and in many words what they do not understand. The
format: https://github.com/multiformats/multiaddr
"""

import ipaddress
import re
from collections.abc import Callable

import base58

PUBLIC = "public"  # stands for the peers of the public swarm
SHA2_256, IDENTITY = 0x12, 0x00  # how a peer's key became its id: hashed, or as it is if it is short


def check_peer(text: str) -> None:
    """Refuse what is no address of a peer to join: it ends with the peer's id.

    :raises ValueError: saying what is wrong
    """
    if text == PUBLIC:
        return
    parts = read(text)
    _check_transport(parts)
    if parts[-1][0] not in ("p2p", "ipfs"):
        raise ValueError("it must end with /p2p/ and the peer's id")


def check_listening(text: str) -> None:
    """Refuse what is no address to listen on: an address of this machine, and a port; 0 is any that is free.

    :raises ValueError: saying what is wrong
    """
    parts = read(text)
    _check_transport(parts)
    if parts[0][0] not in ("ip4", "ip6"):
        raise ValueError("it must begin with /ip4/ or /ip6/ and an address")
    if any(name in ("p2p", "ipfs", "p2p-circuit") for name, _ in parts):
        raise ValueError("no peer's id belongs to an address to listen on")


def check_announced(text: str) -> None:
    """Refuse what is no address at which others can find a server.

    :raises ValueError: saying what is wrong
    """
    parts = read(text)
    _check_transport(parts)
    if any(name in ("tcp", "udp") and int(value) == 0 for name, value in parts):
        raise ValueError("others cannot connect to port 0")


def read(text: str) -> list[tuple[str, str]]:
    """Return the protocols of a multiaddr, each with its value, which may be empty.

    :raises ValueError: saying what is wrong
    """
    begin, *words = text.rstrip("/").split("/")
    if begin or not words:
        raise ValueError("it must begin with /")
    parts = []
    waiting = iter(words)
    for name in waiting:
        if name in FLAGS:
            parts.append((name, ""))
            continue
        if name not in VALUES:
            raise ValueError(f"{name or 'nothing'} is no protocol that is known here")
        is_right, words_for_it = VALUES[name]
        value = next(waiting, "")
        if not is_right(value):
            raise ValueError(f"{value or 'nothing'} is no {words_for_it}")
        parts.append((name, value))
    return parts


def _check_transport(parts: list[tuple[str, str]]) -> None:
    names = [name for name, _ in parts]
    first = 1 if names[0] == "ip6zone" else 0
    if names[first] == "dnsaddr":  # the name's record tells the rest
        return
    if names[first] not in ("ip4", "ip6", "dns", "dns4", "dns6"):
        raise ValueError("it must begin with an address or a name, as /ip4/192.0.2.1")
    if names[first + 1 : first + 2] not in (["tcp"], ["udp"]):
        raise ValueError("after the address, it needs /tcp/ and a port")


def _is_ip(version: int) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        try:
            return ipaddress.ip_address(text).version == version and "%" not in text
        except ValueError:
            return False

    return check


def _is_port(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,5}", text) is not None and int(text) <= 65535


def _is_name(text: str) -> bool:
    return re.fullmatch(r"(?a)[\w.-]{1,253}", text) is not None


def _is_peer_id(text: str) -> bool:
    try:
        multihash = base58.b58decode(text)
    except ValueError:
        return False
    if len(multihash) < 3 or multihash[1] != len(multihash) - 2:
        return False
    return multihash[0] == IDENTITY or (multihash[0] == SHA2_256 and len(multihash) == 34)


# Protocols with a value: whether it is one, and what it is called. Then those without.
VALUES: dict[str, tuple[Callable[[str], bool], str]] = {
    "ip4": (_is_ip(4), "IPv4 address"),
    "ip6": (_is_ip(6), "IPv6 address"),
    "ip6zone": (_is_name, "network card"),
    **dict.fromkeys(("dns", "dns4", "dns6", "dnsaddr"), (_is_name, "name of a host")),
    **dict.fromkeys(("tcp", "udp"), (_is_port, "port from 0 to 65535")),
    **dict.fromkeys(("p2p", "ipfs"), (_is_peer_id, "id of a peer, such as 12D3KooW and 44 characters more")),
}
FLAGS = ("quic", "quic-v1", "ws", "wss", "tls", "http", "https", "p2p-circuit")
