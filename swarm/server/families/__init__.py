"""The model families as they are computed in batches.

``BloomBlocks`` and ``FalconBlocks`` compute one family each; ``LayerBlocks`` computes any family of ``swarm.families``
by Transformers' layers, and ``FusedLayerBlocks`` does so faster for some.
"""

import logging
from collections.abc import Sequence
from typing import Any

import swarm.compat  # noqa: F401

import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from swarm.families.layers import SwarmLayer
from swarm.products.linear import PackedLinear, separate
from swarm.server.blocks import Part, RaggedBlocks
from swarm.server.families.bloom import BloomBlocks
from swarm.server.families.falcon import FalconBlocks
from swarm.server.families.layers import LayerBlocks
from swarm.server.families.llama import FusedLayerBlocks

log = logging.getLogger(__name__)

# Those that are computed by a class of their own.
FAMILIES: tuple[type[RaggedBlocks], ...] = (BloomBlocks, FalconBlocks)

# How far fused blocks may be from Transformers' layers: rounding differs, and errors of mathematics are far larger.
# Relative to the largest output. float32 differs by 1e-6 to 1e-5, bfloat16 by up to 1e-2.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# Tokens of the comparison: a prompt that is computed by PyTorch, then single ones that loops compute.
CHECK_PROMPT, CHECK_STEPS = 48, 3


def make_ragged_blocks(modules: Sequence[Any], config: Any, dtype: torch.dtype, max_length: int) -> RaggedBlocks | None:
    """Return the blocks of a server for batches, or None if they can only be computed by petals.

    That is so for other families, quantised weights, adapters, weights split over devices, and what a family does not
    accept.

    :param modules: what petals has loaded, wrapped in ``TensorParallel``
    """
    shards = [module.module_shards for module in modules]
    if any(len(blocks) != 1 for blocks in shards):
        return None
    blocks = [blocks[0] for blocks in shards]
    if not all(has_plain_layers(block) for block in blocks):
        return None
    if all(isinstance(block, SwarmLayer) for block in blocks):
        ragged: RaggedBlocks = layer_blocks(blocks, config, dtype, max_length)
        unmap_checkpoint(blocks)
        return ragged
    for family in FAMILIES:
        if all(type(block) is family.block_type for block in blocks) and family.accepts(blocks, config):
            ragged = family(blocks, config, dtype, max_length)
            unmap_checkpoint(blocks)
            return ragged
    return None


def layer_blocks(blocks: Sequence[Any], config: Any, dtype: torch.dtype, max_length: int) -> LayerBlocks:
    """Return Transformers' layers for batches: fused where that computes the same, which is tried."""
    plain = LayerBlocks(blocks, config, dtype, max_length)
    if FusedLayerBlocks.accepts(blocks, config):
        expected = sample_outputs(plain)
        fused = FusedLayerBlocks(blocks, config, dtype, max_length)
        error = relative_error(sample_outputs(fused), expected)
        if error <= TOLERANCES[dtype]:
            return fused
        log.warning(
            "fused blocks of %s differ from Transformers' layers by %.1e: using Transformers'", config.model_type, error
        )
        for block in blocks:
            separate(block)
    plain.pack()
    return plain


@torch.inference_mode()
def sample_outputs(blocks: RaggedBlocks) -> torch.Tensor:
    """Return what each block makes of the same random inputs: [blocks, tokens, hidden size], float32."""
    length = min(CHECK_PROMPT, blocks.max_length - CHECK_STEPS)
    total = length + CHECK_STEPS
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(total, blocks.config.hidden_size, generator=generator).to(blocks.device, blocks.dtype)
    outputs = []
    for number in range(len(blocks.blocks)):
        cache = blocks.cache_descriptor(number, number + 1, 1, total).make_zeros().sequences[0]
        parts = [(0, length), *((position, 1) for position in range(length, total))]
        rows = [
            blocks.forward(inputs[start : start + size].clone(), [Part(cache, start, size)], number, number + 1)
            for start, size in parts
        ]
        outputs.append(torch.cat(rows).float())
    return torch.stack(outputs)


def relative_error(outputs: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of any block, relative to that block's largest output; infinite for nonsense."""
    scale = expected.abs().amax(dim=(1, 2))
    error = float(((outputs - expected).abs().amax(dim=(1, 2)) / scale).max())
    return error if error == error else float("inf")


def unmap_checkpoint(blocks: Sequence[nn.Module]) -> None:
    """Copy what packing has left of the blocks' weights, if it has taken the large ones.

    Where a checkpoint has the dtype that is computed in, the weights are its file, mapped into memory: as long as one
    norm of a block is in there, so are all the weights that were packed, for a second time.
    """
    for block in blocks:
        if any(isinstance(module, PackedLinear) and module.holds_copy for module in block.modules()):
            for tensor in (*block.parameters(), *block.buffers()):
                tensor.data = tensor.data.clone()


def has_plain_layers(block: nn.Module) -> bool:
    """Whether a block's linear layers are those that it was published with, neither quantised nor with an adapter."""
    kinds = {type(module) for module in block.modules()}
    return not any(issubclass(kind, nn.Linear) and kind not in (nn.Linear, FalconLinear) for kind in kinds)
