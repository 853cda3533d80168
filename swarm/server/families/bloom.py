"""Batched computation of BLOOM, see ``BloomBlocks``."""

from collections.abc import Sequence
from typing import Any

import swarm.compat  # noqa: F401

import torch
import torch.nn.functional as F
from petals.models.bloom.block import WrappedBloomBlock
from torch import nn
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from swarm.families.attention import Scoring, causal_mask
from swarm.products.linear import fuse
from swarm.server.blocks import Batch, Part, RaggedBlocks


class BloomBlocks(RaggedBlocks):
    """BLOOM: attention with linear biases (ALiBi, https://arxiv.org/abs/2108.12409) on the keys' positions."""

    block_type = WrappedBloomBlock

    @classmethod
    def accepts(cls, blocks: Sequence[nn.Module], config: Any) -> bool:
        """Accept weights that are not split into slices."""
        return getattr(config, "pretraining_tp", 1) == 1

    def __init__(self, blocks: Sequence[Any], config: Any, dtype: torch.dtype, max_length: int) -> None:
        super().__init__(blocks, config, dtype, max_length)
        self._projections = [
            (
                fuse(block.self_attention, "query_key_value"),
                fuse(block.self_attention, "dense"),
                fuse(block.mlp, "dense_h_to_4h"),
                fuse(block.mlp, "dense_4h_to_h"),
            )
            for block in blocks
        ]
        ones = torch.ones(1, max_length, device=self.device)
        self._scoring = Scoring(self.head_size**-0.5)
        self._alibi = build_alibi_tensor(ones, config.num_attention_heads, dtype)[None]  # [1, heads, 1, max length]

    def biases(self) -> torch.Tensor:
        # In float32, as the kernel computes.
        return build_alibi_tensor(torch.ones(1, self.max_length), self.config.num_attention_heads, torch.float32)[:, 0]

    def mask(self, part: Part, window: int | None) -> torch.Tensor:
        alibi = self._alibi[..., : part.start + part.length]
        if part.length == 1:
            return alibi
        return alibi + causal_mask(part.start, part.length, window, self.dtype, self.device)

    def context(self, batch: Batch) -> None:
        return None

    def compute(self, number: int, hidden: torch.Tensor, batch: Batch, context: None) -> torch.Tensor:
        block: Any = self.blocks[number]
        query_key_value, dense, up, down = self._projections[number]
        post_norm = block.apply_residual_connection_post_layernorm
        normed = block.input_layernorm(hidden)
        # In the checkpoints, query, key and value of a head are adjacent.
        fused = query_key_value(normed).view(-1, self.kv_heads, 3, self.head_size)
        attended = batch.attend(number, fused[:, :, :1], fused[:, :, 1:].transpose(1, 2), self._scoring)
        hidden = dense(attended).add_(normed if post_norm else hidden)
        normed = block.post_attention_layernorm(hidden)
        return down(F.gelu(up(normed), approximate="tanh")).add_(normed if post_norm else hidden)
