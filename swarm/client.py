"""A model whose blocks are computed by a swarm: tokenizer, embeddings and head here, sessions over the servers."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarm.compat import shared_dht

import hivemind
import torch
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from petals import AutoDistributedModelForCausalLM
from petals.constants import PUBLIC_INITIAL_PEERS
from transformers import AutoTokenizer, GenerationConfig

from swarm import weights
from swarm.errors import ModelUnavailable, SessionLengthExceeded, SwarmUnreachable
from swarm.head import Head
from swarm.session import HistoryBudget, SessionLimits, SwarmSession
from swarm.state import SwarmState
from swarm.tokenization import TextTokenizer

log = logging.getLogger(__name__)

# What a stock petals server accepts as the longest session, with and without grouped-query attention.
STOCK_MAX_LENGTH, STOCK_MAX_LENGTH_GROUPED = 2048, 8192  # tokens
# A swarm's DHT answers within milliseconds on a local network and within seconds over the internet.
DHT_TIMEOUT = 30.0  # seconds
DHT_WORKERS = 32  # keys looked up at a time: as many as a large model has blocks, within a factor
DEFAULT_HISTORY_BYTES = 2**30  # of hidden states kept to restore lost spans


class Swarm:
    """This program's membership in a swarm: one DHT node and one ``p2pd``, shared by all models."""

    def __init__(self, dht: Any) -> None:
        self.dht = dht
        # Multiaddrs by which others join: through this program, or as it joined itself.
        self.initial_peers: list[str] = []

    @classmethod
    def join(cls, initial_peers: Sequence[str]) -> "Swarm":
        """Join an existing swarm as a client, which nobody connects to.

        :param initial_peers: multiaddrs of peers, or ``["public"]``
        :raises SwarmUnreachable: if none of the peers answers
        """
        peers = PUBLIC_INITIAL_PEERS if list(initial_peers) == ["public"] else list(initial_peers)
        failure = f"none of the initial peers {', '.join(peers)} answers"
        joined = cls._start(failure, initial_peers=peers, client_mode=True)
        joined.initial_peers = list(initial_peers)
        return joined

    @classmethod
    def found(cls, host_maddrs: Sequence[str]) -> "Swarm":
        """Start a new swarm, whose first peer this program is.

        :param host_maddrs: addresses to listen on, such as ``/ip4/127.0.0.1/tcp/0``
        :raises SwarmUnreachable: if the addresses cannot be listened on
        """
        failure = f"cannot listen on {', '.join(host_maddrs)}"
        founded = cls._start(failure, host_maddrs=list(host_maddrs), use_auto_relay=False)
        founded.initial_peers = [str(maddr) for maddr in founded.dht.get_visible_maddrs()]
        return founded

    @classmethod
    def _start(cls, failure: str, **options: Any) -> "Swarm":
        dht = hivemind.DHT(start=False, num_workers=DHT_WORKERS, **options)
        try:
            dht.run_in_background(await_ready=True, timeout=DHT_TIMEOUT)
        except Exception as error:  # hivemind raises whatever its child process met
            dht.terminate()
            raise SwarmUnreachable(f"{failure}: {str(error) or type(error).__name__}") from error
        return cls(dht)

    def close(self) -> None:
        """Leave the swarm and end the processes below."""
        if (p2p := self.dht._p2p_replica) is not None:
            # Left to the garbage collector it would look for its event loop on a thread that has none.
            RemoteExpertWorker.run_coroutine(p2p.shutdown(), return_future=True).result(timeout=DHT_TIMEOUT)
        self.dht.shutdown()


class SwarmModel:
    """A model served by a swarm. Thread-safe; each session belongs to one thread at a time."""

    def __init__(
        self,
        name: str,
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
        """
        path = weights.locate(name, cache_dir=cache_dir, progress=log.info)
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
        return cls(name, model.to(device).eval(), tokenizer, limits or SessionLimits(), budget)

    def open_session(self, max_length: int, rows: int = 1) -> SwarmSession:
        """Open an inference session for up to ``max_length`` tokens of each row. Its first step chooses the servers.

        :raises SessionLengthExceeded: if the model or its servers take no session so long
        """
        if max_length > self.max_length:
            raise SessionLengthExceeded(f"{max_length} tokens exceed the {self.max_length} that {self.name} allows")
        return SwarmSession(self.head, self.state, self.limits, self.budget, max_length, rows)

    def close(self) -> None:
        """Stop following the swarm. Open sessions should be closed before."""
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
