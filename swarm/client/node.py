"""A program's node in a swarm: the DHT process and its ``p2pd``, started, watched and ended together."""

import asyncio
import contextlib
import multiprocessing.connection
import re
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from swarm.compat import await_dht, repair_futures

import hivemind
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import P2P
from hivemind.proto import crypto_pb2

from swarm.clock import clock_off
from swarm.errors import SwarmUnreachable
from swarm.process import kill_descendants

Result = TypeVar("Result")

# A swarm's DHT answers within milliseconds on a local network and within seconds over the internet.
DHT_TIMEOUT = 30.0  # seconds
DHT_WORKERS = 32  # keys looked up at a time: about as many as a large model has blocks, within a factor
# Each look asks p2pd for its peers. On loopback it answers within milliseconds, and on a machine that is short of
# memory within seconds; after this many silent looks it will never answer.
SILENT_LOOKS = 60  # of half a second each: 30 s
KILL_TIMEOUT = 5.0  # seconds; a killed process ends when its system call returns


class Node:
    """A DHT process, its ``p2pd``, and this process's connection to p2pd; they start and end together."""

    def __init__(self, failure: str, given_up: Callable[[], bool], **options: Any) -> None:
        """Start the processes and connect.

        :param failure: the error message if that fails
        :param given_up: polled during the wait, which ends when it returns true
        :param options: for hivemind's ``DHT``
        :raises SwarmUnreachable: if that fails; ClockOff, if that is why
        """
        self.dht = hivemind.DHT(start=False, num_workers=DHT_WORKERS, **options)
        self.maddrs: list[str] = []  # by which others reach this node
        self.peers: list[str] = []  # multiaddrs of connected peers, as last reported
        self._question: Any = None  # pending in the DHT process
        self._silent_looks = 0  # since its last answer
        try:
            self.dht.start()
            await_dht(self.dht, self.dht._ready, DHT_TIMEOUT, given_up)
            if not options.get("client_mode"):
                self.maddrs = [str(maddr) for maddr in self.dht.get_visible_maddrs()]
            pid, maddr = self.dht.run_coroutine(describe_daemon)
            self._daemon = psutil.Process(pid)
            self._sockets = [Path(maddr["unix"]), Path(maddr["unix"].replace("p2pd-", "p2pclient-"))]
            self.p2p = on_loop(P2P.replicate(maddr))
        except Exception as error:  # hivemind re-raises any error of its child process
            self._end_process()
            self._close_pipes()
            unreachable = SwarmUnreachable(f"{failure}: {str(error) or type(error).__name__}")
            raise clock_off(error) or unreachable from error
        self.dht._p2p_replica = self.p2p  # otherwise hivemind would create it on the event loop and block that

    def look(self, seconds: float) -> str | None:
        """Wait this long, or until the DHT process ends. Return what is wrong, or None."""
        if multiprocessing.connection.wait([self.dht.sentinel], timeout=seconds):
            self.dht.join(KILL_TIMEOUT)
            return f"the DHT process or its p2pd has ended with {self.dht.exitcode}"
        if self._question is not None and self._question.done():
            self._hear()
        if self._question is None:
            self._question = self.dht.run_coroutine(list_peers, return_future=True)
        # Count looks rather than seconds: this process may have been suspended too.
        self._silent_looks += 1
        return "the DHT process or its p2pd does not answer" if self._silent_looks > SILENT_LOOKS else None

    def _hear(self) -> None:
        question, self._question = self._question, None
        if (peers := question.result()) is not None:
            self.peers, self._silent_looks = peers, 0

    def kill(self) -> None:
        """Kill whatever is left of the node at once."""
        self._end_process()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._daemon.kill()
        repair_futures()
        for path in self._sockets:
            path.unlink(missing_ok=True)
        self._disconnect()
        self._close_pipes()

    def shut_down(self) -> None:
        """Leave the swarm cleanly and end the processes."""
        self._disconnect()
        self.dht.shutdown()
        self._end_process()
        self._close_pipes()

    def _end_process(self) -> None:
        if self.dht.is_alive():
            kill_descendants(self.dht.pid)
        self.dht.kill()
        self.dht.join(KILL_TIMEOUT)

    def _disconnect(self) -> None:
        # If left to the garbage collector, it would look for its event loop on a thread that has none.
        on_loop(self.p2p.shutdown())

    def _close_pipes(self) -> None:
        self.dht._inner_pipe.close()
        self.dht._outer_pipe.close()


async def describe_daemon(dht: Any, node: Any) -> tuple[int, Any]:
    """In the DHT process: return the process id of p2pd and the multiaddr of its socket."""
    return node.p2p._child.pid, node.p2p.daemon_listen_maddr


async def list_peers(dht: Any, node: Any) -> list[str] | None:
    """In the DHT process: return the multiaddrs of the peers that p2pd is connected to; None if it does not answer."""
    try:
        peers = await asyncio.wait_for(node.p2p.list_peers(), DHT_TIMEOUT)
    except Exception:  # any error means that p2pd has not answered
        return None
    return [f"{maddr}/p2p/{peer.peer_id.to_base58()}" for peer in peers for maddr in peer.addrs]


def on_loop(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine on hivemind's event loop and wait for it.

    :raises TimeoutError: if it takes longer than a DHT may
    """
    limited = asyncio.wait_for(coroutine, DHT_TIMEOUT)
    return RemoteExpertWorker.run_coroutine(limited, return_future=True).result(timeout=2 * DHT_TIMEOUT)


def make_identity() -> bytes:
    """Return a new private key as p2pd reads it, of the kind p2pd generates itself: RSA keys take long to generate.

    The format: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md#ed25519
    """
    key = Ed25519PrivateKey.generate()
    data = key.private_bytes_raw() + key.public_key().public_bytes_raw()
    return crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.Ed25519, data=data).SerializeToString()


def with_port(maddr: str, bound: Sequence[str]) -> str:
    """Return an address to listen on; if it asks for any free port, with the port that was found.

    :param bound: the addresses that p2pd listens on
    """
    if (found := re.search(r"^/(ip[46])/([^/]+)/(tcp|udp)/0(?=/|$)", maddr)) is None:
        return maddr
    family, host, transport = found.groups()
    host = "[^/]+" if host in ("0.0.0.0", "::") else re.escape(host)
    ports = (re.match(f"/{family}/{host}/{transport}/([0-9]+)", address) for address in bound)
    port = next((port[1] for port in ports if port), "0")
    return f"/{family}/{found[2]}/{transport}/{port}{maddr[found.end() :]}"
