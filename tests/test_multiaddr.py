"""Multiaddrs: what p2pd and hivemind cannot use is refused before they are asked, and nothing else is."""

from collections.abc import Callable

import pytest
from hivemind.utils.multiaddr import Multiaddr
from petals.constants import PUBLIC_INITIAL_PEERS

from swarm.multiaddr import FLAGS, VALUES, check_announced, check_listening, check_peer, read

ID = "12D3KooWShqmq4DrhL2nCmvR6vxuq9GdQzjGNaHzEnU1xbZqKeaj"
OLD_ID = "QmT6m7Lu7nrH5DgrC5cEV8hEe7ME35k4CLnuEKRKHSDJQN"
PEER = f"/ip4/192.0.2.1/tcp/31330/p2p/{ID}"


@pytest.mark.parametrize(
    "text",
    [
        PEER,
        f"/ip6/2001:db8::1/tcp/0/p2p/{OLD_ID}",
        f"/dns/example.org/tcp/31330/p2p/{ID}/",
        f"/dnsaddr/example.org/p2p/{ID}",
        f"/ip6zone/eth0/ip6/fe80::1/tcp/1/ipfs/{OLD_ID}",
        f"/ip4/192.0.2.1/udp/1/quic-v1/p2p/{ID}",
        f"/ip4/192.0.2.1/tcp/1/ws/p2p/{ID}/p2p-circuit/p2p/{OLD_ID}",
        *PUBLIC_INITIAL_PEERS,
    ],
)
def test_peers(text: str) -> None:
    check_peer(text)
    Multiaddr(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "192.0.2.1",
        "example.org/tcp/1",
        "/foo/bar",
        "/ip4",
        "/ip4/300.0.0.1/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip4/01.2.3.4/tcp/1",
        "/ip6/192.0.2.1/tcp/1",
        "/ip4/192.0.2.1//tcp/1",
        "/ip4/192.0.2.1/tcp",
        "/ip4/192.0.2.1/tcp/x",
        "/ip4/192.0.2.1/tcp/-1",
        "/ip4/192.0.2.1/tcp/65536",
        "/ip4/192.0.2.1/tcp/1/p2p",
        "/ip4/192.0.2.1/tcp/1/p2p/12D3KooW...",
        f"{PEER}x",
        PEER[:-1],
        PEER.replace("Shqmq", "Shqm0"),  # base58 has no 0
    ],
)
def test_what_is_no_multiaddr(text: str) -> None:
    with pytest.raises(ValueError):
        read(text)
    with pytest.raises(Exception):  # noqa: B017  of many kinds
        Multiaddr(text)


def test_all_protocols_are_known_to_hivemind() -> None:
    from hivemind.utils.multiaddr import protocols

    known = {protocol.name for protocol in protocols.PROTOCOLS} | {"ipfs"}
    assert {*VALUES, *FLAGS} <= known


@pytest.mark.parametrize(
    ("check", "text", "reason"),
    [
        (check_peer, "/ip4/192.0.2.1/tcp/31330", "it must end with /p2p/ and the peer's id"),
        (check_peer, f"/ip4/192.0.2.1/p2p/{ID}", "after the address, it needs /tcp/ and a port"),
        (check_peer, f"/p2p/{ID}", "it must begin with an address or a name"),
        (check_peer, "/foo/1", "foo is no protocol that is known here"),
        (check_peer, "/ip4/192.0.2.1/tcp/1/p2p/12D3KooW...", "12D3KooW... is no id of a peer"),
        (check_listening, "/ip4/0.0.0.0", "after the address, it needs /tcp/ and a port"),
        (check_listening, "/dns/localhost/tcp/1", "it must begin with /ip4/ or /ip6/ and an address"),
        (check_listening, PEER, "no peer's id belongs to an address to listen on"),
        (check_announced, "/ip4/192.0.2.1/tcp/0", "others cannot connect to port 0"),
    ],
)
def test_what_cannot_be_used(check: Callable[[str], None], text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}"):
        check(text)


def test_what_can_be_used() -> None:
    check_peer("public")
    for text in ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/31330", "/ip4/127.0.0.1/udp/0/quic"):
        check_listening(text)
    check_announced("/dns/example.org/tcp/31330")
