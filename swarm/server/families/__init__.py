"""Model families whose blocks are computed in batches. To add one, add a file here and a line in ``FAMILIES``."""

from collections.abc import Sequence
from typing import Any

import swarm.compat  # noqa: F401

import torch
from torch import nn

from swarm.packed_linear import PackedLinear
from swarm.server.blocks import RaggedBlocks
from swarm.server.families.bloom import BloomBlocks
from swarm.server.families.llama import LlamaBlocks

FAMILIES: tuple[type[RaggedBlocks], ...] = (
    BloomBlocks,
    LlamaBlocks,
)


def make_ragged_blocks(modules: Sequence[Any], config: Any, dtype: torch.dtype, max_length: int) -> RaggedBlocks | None:
    """Return a server's blocks for batching, or None if only petals can compute them.

    Petals computes other families, quantised weights, adapters, weights split over devices, and blocks that a family
    does not accept.

    :param modules: loaded by petals, wrapped in ``TensorParallel``
    """
    shards = [module.module_shards for module in modules]
    if any(len(blocks) != 1 for blocks in shards):
        return None
    blocks = [blocks[0] for blocks in shards]
    if not all(has_plain_layers(block) for block in blocks):
        return None
    for family in FAMILIES:
        if all(type(block) is family.block_type for block in blocks) and family.accepts(blocks, config):
            ragged = family(blocks, config, dtype, max_length)
            unmap_checkpoint(blocks)
            return ragged
    return None


def unmap_checkpoint(blocks: Sequence[nn.Module]) -> None:
    """If packing has copied the large weights, copy the remaining ones too, to release the checkpoint's file.

    If the checkpoint has the dtype of the computation, the weights are its file, mapped into memory. As long as one
    norm of a block refers to it, it keeps the packed weights in memory for a second time.
    """
    for block in blocks:
        if any(isinstance(module, PackedLinear) and module.packed is not None for module in block.modules()):
            for tensor in (*block.parameters(), *block.buffers()):
                tensor.data = tensor.data.clone()


def has_plain_layers(block: nn.Module) -> bool:
    """Whether a block's linear layers are the original ones, neither quantised nor with an adapter."""
    kinds = {type(module) for module in block.modules()}
    return not any(issubclass(kind, nn.Linear) and kind is not nn.Linear for kind in kinds)
