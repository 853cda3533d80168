"""One block's weights from a checkpoint, in the names and shapes of Transformers' layer."""

import logging
import re
from typing import Any

import swarm.compat  # noqa: F401

import torch
from petals.server import from_pretrained as petals_loading
from petals.server.block_utils import resolve_block_dtype
from petals.utils.disk_cache import DEFAULT_CACHE_DIR
from torch import nn

from swarm.families import files  # noqa: F401  petals reads files by it
from swarm.families.layers import SwarmLayer
from swarm.families.quantised import dequantised

log = logging.getLogger(__name__)

# Mixtral's own names of the three matrices of an expert.
EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")


def load_block(model: str, number: int, *, config: Any, torch_dtype: Any = "auto", **options: Any) -> nn.Module:
    """Load a block; in place of petals' ``load_pretrained_block``, whose blocks do not know their number.

    :param options: revision, token, cache_dir, max_disk_space: as petals has them
    :raises ValueError: if weights are missing, or there are some that are not known
    """
    if not issubclass(config.block_class, SwarmLayer):
        return petals_loading.load_pretrained_block(model, number, config=config, torch_dtype=torch_dtype, **options)
    dtype = resolve_block_dtype(config, torch_dtype)
    with torch.device("meta"):
        block: Any = config.block_class(config, number)
    options["cache_dir"] = options.get("cache_dir") or DEFAULT_CACHE_DIR
    state = petals_loading._load_state_dict_from_repo(model, f"{config.block_prefix}.{number}.", **options)
    try:
        state = fuse_experts(dequantised(state, getattr(config, "quantisation", None), dtype), block)
        block.load_state_dict({name: converted(tensor, dtype) for name, tensor in state.items()}, assign=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"block {number} of {model}: {error}") from error
    log.info("loaded block %d of %s", number, model)
    return block.eval()


def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight in the dtype that is computed in; integers stay."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def fuse_experts(state: dict[str, torch.Tensor], block: nn.Module) -> dict[str, torch.Tensor]:
    """Put the matrices of all experts together: checkpoints have one for each, Transformers 5 has all in one tensor.

    :param state: the block's weights by their names in the checkpoint
    """
    if {name for name, _ in block.named_parameters()} <= set(state):
        return state
    state = {re.sub(r"^block_sparse_moe\.", "mlp.", name): tensor for name, tensor in state.items()}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name in list(state):
        if found := EXPERT.fullmatch(name):
            kind = EXPERT_NAMES.get(found[2], found[2])
            experts.setdefault(kind, {})[int(found[1])] = state.pop(name)
    if experts:
        stacked = {kind: torch.stack([parts[i] for i in sorted(parts)]) for kind, parts in experts.items()}
        state["mlp.experts.gate_up_proj"] = torch.cat([stacked["gate_proj"], stacked["up_proj"]], dim=1)
        state["mlp.experts.down_proj"] = stacked["down_proj"]
    return state
