"""This program's membership in a swarm: it founds or joins one, and rejoins whenever it has dropped out."""

import logging
import multiprocessing.util
import threading
from collections.abc import Sequence
from typing import Any

import swarm.compat  # noqa: F401

from hivemind.dht.routing import DHTID
from petals.constants import PUBLIC_INITIAL_PEERS

from swarm.background import Loop
from swarm.client.node import DHT_TIMEOUT, Node, make_identity, with_port
from swarm.client.routing import SwarmState
from swarm.errors import SwarmUnreachable
from swarm.key_file import key_file

log = logging.getLogger(__name__)

# The death of the DHT process is noticed at once, whatever this is; the other checks cost a millisecond.
WATCH_PERIOD = 0.5  # seconds
KNOWN_PEERS = 32  # one that answers is enough to rejoin the swarm
SAME_PORT_TRIES = 4  # afterwards we give up peers that know only the old port and cannot be connected to


class Swarm:
    """This program's membership in a swarm: one DHT node and one ``p2pd``, shared by all models.

    Both are watched. When one of them dies or stops answering, both are restarted and given to all models. The first
    peer of a swarm comes back with its identity and addresses, so that peers that know it find it again; and it
    connects to the peers it saw last, since they may have forgotten it. Thread-safe.
    """

    def __init__(self, initial_peers: Sequence[str] = (), host_maddrs: Sequence[str] = ()) -> None:
        """Make a membership that is in no swarm yet; see ``join`` and ``found``.

        :param host_maddrs: empty: join the swarm of the initial peers
        """
        # Multiaddrs by which others join: this program's, or those it joined by itself. Changed in place.
        self.initial_peers = list(initial_peers)
        self._host_maddrs = list(host_maddrs)
        self._identity = make_identity() if host_maddrs else b""
        self._node_id = DHTID.generate()  # a restarted node with another id would look for itself at its own address
        self._bound: list[str] = []  # host_maddrs with the ports that were free when the swarm was founded
        self._known: dict[str, None] = {}  # multiaddrs of peers, the last seen at the end
        self._failures = 0  # to rejoin, in a row
        self._node: Node | None = None
        self._states: set[SwarmState] = set()
        self._lock = threading.Lock()  # guards the two above; never held during a wait
        self._closing = threading.Event()
        self._watch = Loop("watch-swarm", self._look, 0.0, expected=(SwarmUnreachable,))

    @classmethod
    def join(cls, initial_peers: Sequence[str]) -> "Swarm":
        """Join an existing swarm as a client, which accepts no connections.

        :param initial_peers: multiaddrs of peers, or ``["public"]``
        :raises SwarmUnreachable: if none of the peers answers
        """
        return cls(initial_peers)._begin()

    @classmethod
    def found(cls, host_maddrs: Sequence[str]) -> "Swarm":
        """Start a new swarm with this program as its first peer.

        :param host_maddrs: addresses to listen on, such as ``/ip4/127.0.0.1/tcp/0``
        :raises SwarmUnreachable: if the addresses cannot be listened on
        """
        return cls(host_maddrs=host_maddrs)._begin()

    def _begin(self) -> "Swarm":
        self._node = self._start()
        self._watch.start()
        return self

    @property
    def dht(self) -> Any:
        """The current DHT.

        :raises SwarmUnreachable: while it is being restarted
        """
        if (node := self._node) is None:
            raise SwarmUnreachable("the swarm is being joined again")
        return node.dht

    @property
    def loop(self) -> Loop:
        """The loop that watches the DHT node and p2pd."""
        return self._watch

    def _start(self) -> Node:
        return self._start_first_peer() if self._host_maddrs else self._start_client()

    def _start_client(self) -> Node:
        peers = PUBLIC_INITIAL_PEERS if self.initial_peers == ["public"] else self.initial_peers
        failure = f"none of the initial peers {', '.join(peers)} answers"
        return Node(failure, self._closing.is_set, initial_peers=[*peers, *self._known], client_mode=True)

    def _start_first_peer(self) -> Node:
        # Another program may have taken its port: then it takes any free one, and connects to the peers it knows.
        host_maddrs = self._bound if self._failures < SAME_PORT_TRIES and self._bound else self._host_maddrs
        # p2pd refuses to start if none of the peers it is given answers.
        known = [] if self._failures % 2 else list(self._known)
        with key_file(self._identity) as path:
            node = Node(
                f"cannot listen on {', '.join(host_maddrs)}",
                self._closing.is_set,
                host_maddrs=host_maddrs,
                use_auto_relay=False,
                identity_path=str(path),
                node_id=self._node_id,
                initial_peers=known or None,
                check_if_identity_free=False,  # the check needs a second p2pd to ask
                ensure_bootstrap_success=False,
            )
        self.initial_peers[:] = node.maddrs
        self._bound = [with_port(maddr, node.maddrs) for maddr in self._host_maddrs]
        return node

    def _look(self) -> None:
        """Wait a moment for the DHT node or p2pd to die; if one does, rejoin.

        :raises SwarmUnreachable: if rejoining fails
        """
        node = self._node
        if node is not None:
            reason = node.look(WATCH_PERIOD)
            self._remember(node.peers)
            if reason is None or self._closing.is_set():
                return
            if multiprocessing.util.is_exiting():  # the interpreter ends the remaining child processes
                self._watch.stop()
                return
            log.warning("%s; this program rejoins its swarm", reason)
            self._leave(node)
        try:
            self._enter(self._start())
        except SwarmUnreachable:
            self._failures += 1
            raise

    def _remember(self, peers: Sequence[str]) -> None:
        for maddr in peers:
            self._known.pop(maddr, None)
            self._known[maddr] = None
        for maddr in list(self._known)[:-KNOWN_PEERS]:
            del self._known[maddr]

    def _leave(self, node: Node) -> None:
        with self._lock:
            self._node, states = None, list(self._states)
        for state in states:
            state.disconnect()
        node.kill()

    def _enter(self, node: Node) -> None:
        with self._lock:
            closing = self._closing.is_set()  # `close` takes the node away after it has said so, under this lock
            if not closing:
                self._node = node
            states = list(self._states)
        if closing:
            node.kill()
            return
        for state in states:
            state.connect(node.dht, node.p2p)
        self._failures = 0
        log.info("this program has rejoined its swarm")

    def follow(self, state: SwarmState) -> None:
        """Keep a model's state connected to the current DHT and P2P from now on."""
        with self._lock:
            self._states.add(state)
            node = self._node
        if node is not None and state.manager.dht is node.dht:
            return
        while True:
            if node is None:
                state.disconnect()
            else:
                state.connect(node.dht, node.p2p)
            with self._lock:
                if self._node is node:
                    return
                node = self._node  # the loop may have told the state of it already, and this undone that

    def forget(self, state: SwarmState) -> None:
        """Undo ``follow``."""
        with self._lock:
            self._states.discard(state)

    def close(self) -> None:
        """Leave the swarm and end its processes."""
        self._closing.set()
        self._watch.stop()
        self._watch.join(DHT_TIMEOUT)
        with self._lock:
            node, self._node = self._node, None
        if node is not None:
            node.shut_down()
