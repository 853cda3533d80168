"""Falcon in batches, see ``FalconBlocks``."""

from collections.abc import Sequence
from typing import Any

import swarm.compat  # noqa: F401

import torch

from swarm.families.attention import Scoring, causal_mask
from swarm.families.falcon import FalconBlock, alibi_biases
from swarm.families.layers import Positions
from swarm.products.linear import fuse
from swarm.server.blocks import Batch, Part, RaggedBlocks
from swarm.server.families.llama import rotate

# Of a batch: the rotation of each token, once for each key/value head; None with ALiBi.
Context = tuple[torch.Tensor, torch.Tensor] | None


class FalconBlocks(RaggedBlocks):
    """Falcon: rotary positions or ALiBi; queries that share a key and value, by groups or all, or that share none.

    In all of them, a key/value head's queries, its key and its value stand one after the other in one product.
    """

    block_type = FalconBlock

    @classmethod
    def accepts(cls, blocks: Sequence[Any], config: Any) -> bool:
        """Whether the positions' rotation does not depend on how long the sequence is."""
        return config.alibi or config.rope_parameters["rope_type"] not in ("dynamic", "longrope")

    def __init__(self, blocks: Sequence[Any], config: Any, dtype: torch.dtype, max_length: int) -> None:
        device = next(blocks[0].parameters()).device
        self._biases = alibi_biases(config, max_length, dtype, device) if config.alibi else None
        super().__init__(blocks, config, dtype, max_length)
        self._scoring = Scoring(self.head_size**-0.5)
        self._projections = [
            (
                fuse(block.self_attention, "query_key_value"),
                fuse(block.self_attention, "dense"),
                fuse(block.mlp, "dense_h_to_4h"),
                fuse(block.mlp, "dense_4h_to_h"),
            )
            for block in blocks
        ]
        if self._biases is None:
            positions = torch.arange(max_length, device=device)[None]
            cos, sin = Positions(config)(positions, None, dtype)
            half = self.head_size // 2
            # With the signs of the rotation in it, what is left to do is to swap the halves.
            self._rotation = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)

    def biases(self) -> torch.Tensor | None:
        return self._biases

    def mask(self, part: Part, window: int | None) -> torch.Tensor | None:
        if self._biases is None:
            return super().mask(part, window)
        end = part.start + part.length
        biases = self._biases[:, None, :end]
        if part.length > 1:
            biases = biases + causal_mask(part.start, part.length, window, self.dtype, self.device)
        return biases.reshape(1, self.kv_heads, -1, end)

    def context(self, batch: Batch) -> Context:
        if self._biases is not None:
            return None
        positions = torch.from_numpy(batch.positions).to(self.device).repeat_interleave(self.kv_heads)
        cos, sin = self._rotation
        return cos[positions], sin[positions]

    def compute(self, number: int, hidden: torch.Tensor, batch: Batch, context: Context) -> torch.Tensor:
        block: Any = self.blocks[number]
        query_key_value, dense, up, down = self._projections[number]
        two_norms = hasattr(block, "ln_attn")
        normed = block.ln_attn(hidden) if two_norms else block.input_layernorm(hidden)
        fused = query_key_value(normed).view(-1, self.group + 2, self.head_size)
        if context is not None:
            rotate(fused, self.group + 1, *context)
        fused = fused.view(-1, self.kv_heads, self.group + 2, self.head_size)
        queries, new = fused[:, :, : self.group], fused[:, :, self.group :].transpose(1, 2)
        attended = dense(batch.attend(number, queries, new, self._scoring))
        if hasattr(block, "post_attention_layernorm"):  # attention and MLP one after the other
            hidden = attended.add_(hidden)
            return down(block.mlp.act(up(block.post_attention_layernorm(hidden)))).add_(hidden)
        if two_norms:
            normed = block.ln_mlp(hidden)
        return down(block.mlp.act(up(normed))).add_(attended).add_(hidden)
