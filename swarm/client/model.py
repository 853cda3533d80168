"""A model whose blocks a swarm computes: tokenizer, embeddings and head here, sessions over the servers."""

import copy
import logging
import threading
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from swarm.compat import shared_dht

import torch
from petals import AutoDistributedModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

from swarm import weights
from swarm.client.head import Head, is_large
from swarm.client.history import HistoryBudget
from swarm.client.membership import Swarm
from swarm.client.routing import CacheRelief, SwarmState
from swarm.client.session import SwarmSession
from swarm.client.terms import SessionLimits, SessionTerms
from swarm.errors import ModelUnavailable, SessionLengthExceeded
from swarm.families.adopt import adopt
from swarm.families.configuration import read_supported
from swarm.lengths import context_length, stock_length
from swarm.tokenization import TextTokenizer
from swarm.weights.pickles import refusal

if TYPE_CHECKING:
    from swarm.client.draft_model import DraftModel

log = logging.getLogger(__name__)

DEFAULT_HISTORY_BYTES = 2**30  # for hidden states kept to restore lost spans
# Transformers patches torch.nn while it loads: one model at a time in a process.
LOADING = threading.Lock()


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
        relief: CacheRelief | None = None,
        fingerprint: weights.Fingerprint | None = None,
        head: Head | None = None,
    ) -> None:
        """Make a model of its parts; see ``load``.

        :param fingerprint: servers of another model are refused; None: none are
        :param head: None: one that reads all weights for each token
        """
        self.name = name
        self.tokenizer = tokenizer
        self.config = model.config
        self.parameters = count_parameters(model)
        self.generation_config = with_all_ends(model.generation_config, tokenizer.end_token)
        self.head = head or Head(model)
        self.state = SwarmState(model.transformer.h.sequence_manager, name, relief, fingerprint)
        self.swarm = swarm
        swarm.follow(self.state)
        self.limits = limits
        self.budget = budget
        self.draft_model: DraftModel | None = None  # drafts for its answers
        # Tokens of a text, as the model was made; one that does not say is trusted as far as stock servers go.
        self.context_length = context_length(model.config, tokenizer.limit) or stock_length(model.config)

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
        relief: CacheRelief | None = None,
    ) -> "SwarmModel":
        """Load the tokenizer, embeddings and head. The blocks need not be served yet.

        :param name: hub name, local directory, or the name of a bundled model
        :param device: where embeddings and head are computed
        :param torch_dtype: their dtype, or ``"auto"``
        :param update_period: seconds between two readings of the DHT
        :param limits: how long sessions wait for servers
        :param budget: memory for recovery, shared by all sessions of all models given the same budget
        :param relief: asked when the servers have no attention cache left for a session
        :raises ModelUnavailable: if the model's files are unavailable or broken
        :raises SwarmUnreachable: while the swarm is being joined again
        """
        path = weights.locate(name, cache_dir=cache_dir, progress=weights.Progress(log.info))
        try:
            adopt(path)
            large = is_large(read_supported(path), device)
            tokenizer = TextTokenizer(AutoTokenizer.from_pretrained(path))
            with LOADING, shared_dht(swarm.dht):
                model = AutoDistributedModelForCausalLM.from_pretrained(
                    path,
                    initial_peers=[],  # unused: the DHT already exists
                    dht_prefix=weights.dht_prefix(name),
                    # A large head's weights, and embeddings, stay in the checkpoint's files.
                    torch_dtype="auto" if large or torch_dtype == "auto" else getattr(torch, torch_dtype),
                    update_period=update_period,
                    show_route=False,
                    weights_only=True,  # of files that are pickles
                )
        except UnpicklingError as error:
            raise ModelUnavailable(refusal(name, error)) from error
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            # transformers raises all of these for files that are missing, cut short or of another kind.
            raise ModelUnavailable(f"{name}: {error}") from error
        budget, limits = budget or HistoryBudget(DEFAULT_HISTORY_BYTES), limits or SessionLimits()
        model = model.to(device).eval()
        head = make_bounded_head(name, model, torch_dtype, cache_dir, path) if large else None
        return cls(name, swarm, model, tokenizer, limits, budget, relief, weights.fingerprint(path), head)

    @property
    def max_length(self) -> int:
        """How many tokens a session may have: as many as the model allows, and its servers do."""
        return min(self.context_length, self.state.longest_session())

    def open_session(self, max_length: int, rows: int = 1) -> SwarmSession:
        """Open an inference session for up to ``max_length`` tokens per row. Its first step chooses the servers.

        :raises SessionLengthExceeded: if the model or its servers do not accept a session this long
        """
        if max_length > (longest := self.max_length):
            raise SessionLengthExceeded(f"{max_length} tokens exceed the {longest} that {self.name} allows")
        return SwarmSession(self.head, SessionTerms(self.state, self.limits, self.budget, max_length, rows))

    def close(self) -> None:
        """Stop following the swarm. Open sessions should be closed before."""
        self.swarm.forget(self.state)
        self.state.close()


def make_bounded_head(name: str, model: Any, torch_dtype: str, cache_dir: Path, path: str) -> Head:
    """Return a head whose weights stay as they are; what is computed at both ends of the model gets the dtype."""
    if torch_dtype != "auto":
        for norm in (model.transformer.word_embeddings_layernorm, model.transformer.ln_f):
            norm.to(getattr(torch, torch_dtype))
    log.info("%s: its head is prepared", name)
    return Head(model, bounded=True, cache_dir=cache_dir.absolute(), identity=weights.version(path))


def with_all_ends(config: GenerationConfig, end_token: int | None) -> GenerationConfig:
    """Return a checkpoint's settings with all tokens that end a text: its own, and the tokenizer's.

    Checkpoints for chats often have the end of a turn in one place and the end of a document in the other.
    """
    own = config.eos_token_id
    ends = [*(own if isinstance(own, (list, tuple)) else [own]), end_token]
    found = copy.deepcopy(config)
    found.eos_token_id = list(dict.fromkeys(end for end in ends if end is not None)) or None
    return found


def count_parameters(model: Any) -> int:
    """Return how many parameters a petals model has, including those of the blocks on other servers."""
    with torch.device("meta"):  # takes neither memory nor time
        block = model.config.block_class(model.config)
    here = sum(parameter.numel() for parameter in model.parameters())
    return here + len(model.transformer.h) * sum(parameter.numel() for parameter in block.parameters())
