"""Hosts of the tests' own: network namespaces whose network can fall silent. Needs root and iproute2."""

import dataclasses
import subprocess
from collections.abc import Sequence

from swarm.local import LocalServer, LocalSwarm
from swarm.options import ServerOptions


def can_make_hosts() -> bool:
    """Whether this process may make network namespaces."""
    try:
        with Host(99):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


class Host:
    """A network namespace, connected to this one by a pair of virtual network cards."""

    def __init__(self, number: int) -> None:
        self.name = f"petals-host-{number}"
        self._card = f"petals{number}"
        # TEST-NET-2 of RFC 5737, which is routed nowhere, in networks of four addresses.
        self.gateway = f"198.51.100.{4 * number % 256 + 1}"
        self.address = f"198.51.100.{4 * number % 256 + 2}"

    def __enter__(self) -> "Host":
        ip("netns", "add", self.name)
        try:
            ip("link", "add", self._card, "type", "veth", "peer", "name", "eth0", "netns", self.name)
            ip("addr", "add", f"{self.gateway}/30", "dev", self._card)
            ip("link", "set", self._card, "up")
            ip("-n", self.name, "addr", "add", f"{self.address}/30", "dev", "eth0")
            ip("-n", self.name, "link", "set", "eth0", "up")
            ip("-n", self.name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        ip("netns", "del", self.name)  # its cards go with it

    def start_server(self, local: LocalSwarm, options: ServerOptions) -> "ServerOnHost":
        """Start a server here; the swarm must listen on all addresses."""
        options = dataclasses.replace(options, host_maddrs=(f"/ip4/{self.address}/tcp/0",))
        # The swarm's first peer announces only the addresses of its loopback and its default route.
        peers = {peer.replace("/ip4/127.0.0.1/", f"/ip4/{self.gateway}/") for peer in local.swarm.initial_peers}
        server = ServerOnHost(self, options, sorted(peers))
        local.servers.append(server)
        return server

    def silence(self) -> None:
        """Drop, without a word to anybody, all that the host would send."""
        ip("-n", self.name, "route", "add", "blackhole", f"{self.gateway}/32")

    def speak(self) -> None:
        """Send again."""
        ip("-n", self.name, "route", "del", "blackhole", f"{self.gateway}/32")


class ServerOnHost(LocalServer):
    """A server of the embedded swarm on a host of its own."""

    def __init__(self, host: Host, options: ServerOptions, initial_peers: Sequence[str]) -> None:
        self.host = host
        super().__init__(options, initial_peers)

    def command(self) -> list[str]:
        return ["ip", "netns", "exec", self.host.name, *super().command()]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)
