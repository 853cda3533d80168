"""One block's weights from a checkpoint, in the names and shapes of Transformers' layer."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import swarm.compat  # noqa: F401

import torch
from petals.server import from_pretrained as petals_loading
from petals.server.block_utils import resolve_block_dtype
from petals.utils.disk_cache import DEFAULT_CACHE_DIR
from torch import nn

from swarm.errors import ModelUnavailable
from swarm.families import files  # noqa: F401  petals reads files by it
from swarm.families.experts import rounded_experts
from swarm.families.layers import SwarmLayer
from swarm.families.packed import take_packed
from swarm.families.quantised import dequantised
from swarm.products import loops
from swarm.products.formats import Weights
from swarm.products.linear import rounded_layers

NAMED = 3  # tensors that a message names

log = logging.getLogger(__name__)

# Mixtral's own names of the three matrices of an expert.
EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")


def load_block(
    model: str, number: int, *, config: Any, torch_dtype: Any = "auto", quant: str | None = None, **options: Any
) -> nn.Module:
    """Load a block; in place of petals' ``load_pretrained_block``, whose blocks do not know their number.

    :param quant: how to round the weights of its linear layers and experts, see ``swarm.products.linear.rounding``;
        None: not
    :param options: revision, token, cache_dir, max_disk_space: as petals has them
    :raises ModelUnavailable: if weights are missing, or there are some that are not known
    """
    if not issubclass(config.block_class, SwarmLayer):
        block = petals_loading.load_pretrained_block(model, number, config=config, torch_dtype=torch_dtype, **options)
        return prepared(block, quant)
    dtype = resolve_block_dtype(config, torch_dtype)
    block = empty_block(config, number)
    options["cache_dir"] = options.get("cache_dir") or DEFAULT_CACHE_DIR
    prefix = f"{config.block_prefix}.{number}."
    state = petals_loading._load_state_dict_from_repo(model, prefix, **options)
    state, packed = take_packed({name: tensor for name, tensor in state.items() if not ignored(name)})
    kept = {name: weights for name, weights in packed.items() if quant == "auto" and loops_take(block, name, weights)}
    for name, weights in packed.items():
        shape = weights.outputs, weights.inputs
        state[name] = torch.empty(shape, device="meta") if name in kept else weights.dense()
    try:
        state = dequantised(state, getattr(config, "quantisation", None), dtype)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelUnavailable(f"block {number} of {model}: {error}") from error
    if reason := differences(state, block, prefix):
        raise ModelUnavailable(f"{model}: {reason}")
    state = fuse_experts(state, block)
    block.load_state_dict({name: converted(tensor, dtype) for name, tensor in state.items()}, assign=True)
    log.info("loaded block %d of %s", number, model)
    return prepared(block, quant, kept)


def loops_take(block: nn.Module, name: str, weights: Weights) -> bool:
    """Whether a weight is a linear layer's that loops can compute."""
    layer = dict(block.named_modules()).get(name.removesuffix(".weight"))
    return isinstance(layer, nn.Linear) and weights.outputs >= loops.OUTPUTS


def prepared(block: nn.Module, quant: str | None, known: Mapping[str, Weights] | None = None) -> nn.Module:
    """Return a loaded block, ready to compute.

    :param known: weights that were rounded before, by their names
    """
    if quant is not None:
        rounded_layers(block, quant, known)
        rounded_experts(block, quant)
    return block.eval()  # petals leaves its blocks in training mode, where dropout would be computed


def empty_block(config: Any, number: int) -> nn.Module:
    """Return a block on the meta device: names and shapes, and no weights.

    :param config: petals' configuration of the model
    """
    with torch.device("meta"):
        numbered = issubclass(config.block_class, SwarmLayer)
        block: nn.Module = config.block_class(config, number) if numbered else config.block_class(config)
    return block


def ignored(name: str) -> bool:
    """Whether a tensor of a checkpoint is not the model's: Llama's once held what follows from the configuration."""
    return name.endswith("rotary_emb.inv_freq")


def differences(state: dict[str, torch.Tensor], block: nn.Module, prefix: str) -> str | None:
    """Return in a sentence how a block's weights differ from what they should be, in names and shapes; None: they fit.

    :param state: by their names in the checkpoint, without the prefix; they may be on the meta device
    """
    try:
        fused = fuse_experts(state, block)
    except (KeyError, RuntimeError) as error:
        return f"the experts of {prefix}mlp do not fit together: {error}"
    wanted = block.state_dict()
    return sentence(
        [prefix + name for name in wanted if name not in fused],
        [prefix + name for name in fused if name not in wanted],
        [prefix + name for name in wanted if name in fused and fused[name].shape != wanted[name].shape],
    )


def sentence(missing: Sequence[str], unknown: Sequence[str], misfits: Sequence[str]) -> str | None:
    """Return in one sentence what is wrong with tensors of these names, or None."""
    if missing:
        return f"its weights lack {some(missing)}, which its configuration asks for"
    if unknown:
        return f"its weights have {some(unknown)}, of which its configuration does not know"
    if misfits:
        return f"the shape of {some(misfits)} is not what its configuration asks for"
    return None


def some(names: Iterable[str]) -> str:
    """Return a few names as a sentence has them."""
    names = sorted(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


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
