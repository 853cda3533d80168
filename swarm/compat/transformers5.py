"""What the released petals, written for Transformers 4.34, needs of Transformers 5. ``swarm.compat`` applies it.

Each function names what it restores, and why. Nothing here imports petals before ``before_petals`` has run.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import transformers.utils
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers.cache_utils import Cache

# The modules with adapters' names that PEFT 0.5 knew; PEFT 0.21 has no such list.
ADAPTER_LAYERS = ["layers", "h", "block", "blocks", "layer"]


def before_petals() -> None:
    """Restore what petals looks for while it is imported."""
    os.environ["PETALS_IGNORE_DEPENDENCY_VERSION"] = "1"  # it asserts Transformers < 4.35
    transformers.utils.get_file_from_repo = get_file_from_repo  # removed in Transformers 5


def after_petals() -> None:
    """Adapt petals' classes, once they exist."""
    _give_tied_heads_a_parameter()
    _make_remote_caches_caches()


def before_adapters() -> None:
    """Restore what ``petals.utils.peft`` looks for while it is imported."""
    import peft.utils

    peft.utils.COMMON_LAYERS_PATTERN = ADAPTER_LAYERS  # type: ignore[attr-defined]


def get_file_from_repo(
    path: str, filename: str, *, use_auth_token: Any = None, token: Any = None, **options: Any
) -> str | None:
    """Return the path of a model's file, downloaded if it is on the hub; None if the model has no such file.

    :param path: directory or hub name
    """
    if os.path.isdir(path):
        file = os.path.join(path, filename)
        return file if os.path.isfile(file) else None
    try:
        return hf_hub_download(path, filename, token=token or use_auth_token, **options)
    except EntryNotFoundError:  # also: not in the cache, when only that may be read
        return None


def _give_tied_heads_a_parameter() -> None:
    """Give heads that share the embeddings' weight an empty parameter: Transformers 5 ties only what is one."""
    from petals.client.lm_head import LMHead

    init = LMHead.__init__

    def __init__(self: Any, config: Any) -> None:
        init(self, config)
        if self.weight is None:
            self.weight = torch.nn.Parameter(torch.empty(config.vocab_size, config.hidden_size), requires_grad=False)

    LMHead.__init__ = __init__


class RemotePastKeyValues(Cache):
    """Petals' stand-in for caches that the servers hold, as a cache that Transformers 5 accepts."""

    def __init__(self, hypo_ids: torch.Tensor | None = None) -> None:
        super().__init__(layers=[])
        self.hypo_ids = hypo_ids  # the beams that go on, and from which each does

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # petals itself leaves out the tokens that the servers have


def _make_remote_caches_caches() -> None:
    """Make petals' own ``generate`` start with ``RemotePastKeyValues``: Transformers would make a local cache."""
    from petals.client.remote_generation import RemoteGenerationMixin

    generate: Callable[..., Any] = RemoteGenerationMixin.generate

    def generate_remotely(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("cache", RemotePastKeyValues())
        return generate(self, *args, **kwargs)

    RemoteGenerationMixin.generate = generate_remotely
    # The wire takes beams' indices of 64 bits.
    RemoteGenerationMixin._reorder_cache = staticmethod(lambda cache, beams: RemotePastKeyValues(beams.long()))
