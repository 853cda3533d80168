"""A model whose blocks are computed by a swarm: tokenizer, embeddings and head here, sessions over the servers."""

import logging
import multiprocessing.util
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarm.compat import shared_dht

import torch
from hivemind.dht.routing import DHTID
from petals import AutoDistributedModelForCausalLM
from petals.constants import PUBLIC_INITIAL_PEERS
from transformers import AutoTokenizer, GenerationConfig

from swarm import weights
from swarm.background import Loop
from swarm.client.head import Head
from swarm.client.node import DHT_TIMEOUT, Node, identity_file, make_identity, with_port
from swarm.client.routing import SwarmState
from swarm.client.session import HistoryBudget, SessionLimits, SwarmSession
from swarm.errors import ModelUnavailable, SessionLengthExceeded, SwarmUnreachable
from swarm.tokenization import TextTokenizer

log = logging.getLogger(__name__)

# What a stock petals server accepts as the longest session, with and without grouped-query attention.
STOCK_MAX_LENGTH, STOCK_MAX_LENGTH_GROUPED = 2048, 8192  # tokens
# The death of the DHT process is noticed at once, whatever this is; what else is looked at costs a millisecond.
WATCH_PERIOD = 0.5  # seconds
KNOWN_PEERS = 32  # of whom one that answers is enough to be in the swarm again
SAME_PORT_TRIES = 4  # after which those who know only the old port, and cannot be connected to, are given up
DEFAULT_HISTORY_BYTES = 2**30  # of hidden states kept to restore lost spans


class Swarm:
    """This program's membership in a swarm: one DHT node and one ``p2pd``, shared by all models.

    Both are watched. When one of them has died, or does not answer any more, both are started again and given to all
    models. The first peer of a swarm comes back with its identity and its addresses, so that those who know it find it
    again; and it connects to the peers that were there last, since they may have forgotten it. Thread-safe.
    """

    def __init__(self, initial_peers: Sequence[str] = (), host_maddrs: Sequence[str] = ()) -> None:
        """Make one that is in no swarm yet; see ``join`` and ``found``.

        :param host_maddrs: none: join the swarm of the initial peers
        """
        # Multiaddrs by which others join: through this program, or as it joined itself. Changed in place.
        self.initial_peers = list(initial_peers)
        self._host_maddrs = list(host_maddrs)
        self._identity = make_identity() if host_maddrs else b""
        self._node_id = DHTID.generate()  # another one would look for itself at its own address
        self._bound: list[str] = []  # host_maddrs with the ports that were free when it was founded
        self._known: dict[str, None] = {}  # multiaddrs of peers, those seen last at the end
        self._failures = 0  # to be there again, in a row
        self._node: Node | None = None
        self._states: set[SwarmState] = set()
        self._lock = threading.Lock()  # of the two above, and never held while anything waits
        self._closing = threading.Event()
        self._watch = Loop("watch-swarm", self._look, 0.0, expected=(SwarmUnreachable,))

    @classmethod
    def join(cls, initial_peers: Sequence[str]) -> "Swarm":
        """Join an existing swarm as a client, which nobody connects to.

        :param initial_peers: multiaddrs of peers, or ``["public"]``
        :raises SwarmUnreachable: if none of the peers answers
        """
        return cls(initial_peers)._begin()

    @classmethod
    def found(cls, host_maddrs: Sequence[str]) -> "Swarm":
        """Start a new swarm, whose first peer this program is.

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
        """The DHT of the moment.

        :raises SwarmUnreachable: while it is being started again
        """
        if (node := self._node) is None:
            raise SwarmUnreachable("the swarm is being joined again")
        return node.dht

    @property
    def loop(self) -> Loop:
        """What watches the DHT node and p2pd."""
        return self._watch

    def _start(self) -> "Node":
        return self._start_first_peer() if self._host_maddrs else self._start_client()

    def _start_client(self) -> "Node":
        peers = PUBLIC_INITIAL_PEERS if self.initial_peers == ["public"] else self.initial_peers
        failure = f"none of the initial peers {', '.join(peers)} answers"
        return Node(failure, self._closing.is_set, initial_peers=[*peers, *self._known], client_mode=True)

    def _start_first_peer(self) -> "Node":
        # Somebody else may listen on its port meanwhile: then any other one, from which it connects to those it knows.
        host_maddrs = self._bound if self._failures < SAME_PORT_TRIES and self._bound else self._host_maddrs
        # p2pd refuses to start when it is given peers of whom none answers.
        known = [] if self._failures % 2 else list(self._known)
        with identity_file(self._identity) as path:
            node = Node(
                f"cannot listen on {', '.join(host_maddrs)}",
                self._closing.is_set,
                host_maddrs=host_maddrs,
                use_auto_relay=False,
                identity_path=str(path),
                node_id=self._node_id,
                initial_peers=known or None,
                check_if_identity_free=False,  # by whom? It takes another p2pd to ask
                ensure_bootstrap_success=False,
            )
        self.initial_peers[:] = node.maddrs
        self._bound = [with_port(maddr, node.maddrs) for maddr in self._host_maddrs]
        return node

    def _look(self) -> None:
        """Wait a moment for the death of the DHT node or p2pd; after it, be there again.

        :raises SwarmUnreachable: if that fails
        """
        node = self._node
        if node is not None:
            reason = node.look(WATCH_PERIOD)
            self._remember(node.peers)
            if reason is None or self._closing.is_set():
                return
            if multiprocessing.util.is_exiting():  # and ends the child processes that are left
                self._watch.stop()
                return
            log.warning("%s; this program joins its swarm again", reason)
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

    def _leave(self, node: "Node") -> None:
        with self._lock:
            self._node, states = None, list(self._states)
        for state in states:
            state.disconnect()
        node.kill()

    def _enter(self, node: "Node") -> None:
        if self._closing.is_set():
            node.kill()
            return
        with self._lock:
            self._node, states = node, list(self._states)
        for state in states:
            state.connect(node.dht, node.p2p)
        self._failures = 0
        log.info("this program is in its swarm again")

    def follow(self, state: SwarmState) -> None:
        """Tell a model's state from now on by which DHT and P2P to reach the swarm."""
        with self._lock:
            self._states.add(state)
            node = self._node
        if node is None:
            state.disconnect()
        elif state.manager.dht is not node.dht:
            state.connect(node.dht, node.p2p)

    def forget(self, state: SwarmState) -> None:
        """Undo ``follow``."""
        with self._lock:
            self._states.discard(state)

    def close(self) -> None:
        """Leave the swarm and end the processes below."""
        self._closing.set()
        self._watch.stop()
        self._watch.join(DHT_TIMEOUT)
        with self._lock:
            node, self._node = self._node, None
        if node is not None:
            node.shut_down()


class SwarmModel:
    """A model served by a swarm. Thread-safe; each session belongs to one thread at a time."""

    def __init__(
        self,
        name: str,
        swarm: Swarm,
        model: Any,
        tokenizer: TextTokenizer,
        limits: SessionLimits,
        budget: HistoryBudget,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.config = model.config
        self.parameters = count_parameters(model)
        self.generation_config: GenerationConfig = model.generation_config
        self.head = Head(model)
        self.state = SwarmState(model.transformer.h.sequence_manager, name)
        self.swarm = swarm
        swarm.follow(self.state)
        self.limits = limits
        self.budget = budget
        self.max_length = longest_session(model.config)

    @classmethod
    def load(
        cls,
        name: str,
        swarm: Swarm,
        *,
        cache_dir: Path,
        device: str,
        torch_dtype: str,
        update_period: float = 10.0,
        limits: SessionLimits | None = None,
        budget: HistoryBudget | None = None,
    ) -> "SwarmModel":
        """Load tokenizer, embeddings and head. The blocks need not be served yet.

        :param name: hub name, local directory, or the name of a bundled model
        :param device: where embeddings and head are computed
        :param torch_dtype: their dtype, or ``"auto"``
        :param update_period: seconds between two readings of the DHT
        :param limits: how long sessions wait for servers
        :param budget: memory for recovery, shared by all sessions of all models that are given the same one
        :raises ModelUnavailable: if the model's files cannot be had or are broken
        :raises SwarmUnreachable: while the swarm is being joined again
        """
        path = weights.locate(name, cache_dir=cache_dir, progress=weights.Progress(log.info))
        try:
            tokenizer = TextTokenizer(AutoTokenizer.from_pretrained(path))
            with shared_dht(swarm.dht):
                model = AutoDistributedModelForCausalLM.from_pretrained(
                    path,
                    initial_peers=[],  # unused: the DHT is there already
                    dht_prefix=weights.dht_prefix(name),
                    torch_dtype=torch_dtype if torch_dtype == "auto" else getattr(torch, torch_dtype),
                    update_period=update_period,
                    show_route=False,
                )
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            # transformers raises all of these for files that are missing, cut short or of another kind.
            raise ModelUnavailable(f"{name}: {error}") from error
        budget = budget or HistoryBudget(DEFAULT_HISTORY_BYTES)
        return cls(name, swarm, model.to(device).eval(), tokenizer, limits or SessionLimits(), budget)

    def open_session(self, max_length: int, rows: int = 1) -> SwarmSession:
        """Open an inference session for up to ``max_length`` tokens of each row. Its first step chooses the servers.

        :raises SessionLengthExceeded: if the model or its servers take no session so long
        """
        if max_length > self.max_length:
            raise SessionLengthExceeded(f"{max_length} tokens exceed the {self.max_length} that {self.name} allows")
        return SwarmSession(self.head, self.state, self.limits, self.budget, max_length, rows)

    def close(self) -> None:
        """Stop following the swarm. Open sessions should be closed before."""
        self.swarm.forget(self.state)
        self.state.close()


def count_parameters(model: Any) -> int:
    """Return how many parameters a petals model has, with those of the blocks that others hold."""
    with torch.device("meta"):  # no memory, no time
        block = model.config.block_class(model.config)
    here = sum(parameter.numel() for parameter in model.parameters())
    return here + len(model.transformer.h) * sum(parameter.numel() for parameter in block.parameters())


def longest_session(config: Any) -> int:
    """Return how many tokens a session may have: what the model was made for and what stock servers accept."""
    grouped = getattr(config, "num_key_value_groups", 1) > 1
    served = STOCK_MAX_LENGTH_GROUPED if grouped else STOCK_MAX_LENGTH
    return min(served, getattr(config, "max_position_embeddings", None) or served)
