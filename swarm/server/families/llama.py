"""Batched computation of Llama, see ``LlamaBlocks``."""

from collections.abc import Sequence
from typing import Any

import swarm.compat  # noqa: F401

import torch
import torch.nn.functional as F
from petals.models.llama.block import WrappedLlamaBlock
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDynamicNTKScalingRotaryEmbedding

from swarm.packed_linear import fuse
from swarm.server import kernels
from swarm.server.blocks import Batch, Part, RaggedBlocks, causal_mask

# With more rows than this, PyTorch's gate, on all cores, is faster than our loop on one.
KERNEL_ROWS = 32


class LlamaBlocks(RaggedBlocks):
    """Llama: rotary positions (RoPE, https://arxiv.org/abs/2104.09864), RMS norms, grouped queries, gated MLP."""

    block_type = WrappedLlamaBlock

    @classmethod
    def accepts(cls, blocks: Sequence[nn.Module], config: Any) -> bool:
        """Accept weights that are not split into slices, an MLP gated by SiLU, and positions that do not depend on a
        sequence's length (as they do with dynamic NTK scaling)."""
        return (
            getattr(config, "pretraining_tp", 1) == 1
            and getattr(config, "hidden_act", "silu") == "silu"
            and not any(type(module) is LlamaDynamicNTKScalingRotaryEmbedding for b in blocks for module in b.modules())
        )

    def __init__(self, blocks: Sequence[Any], config: Any, dtype: torch.dtype, max_length: int) -> None:
        super().__init__(blocks, config, dtype, max_length)
        self._projections = [
            (
                fuse(block.self_attn, "q_proj", "k_proj", "v_proj"),
                fuse(block.self_attn, "o_proj"),
                fuse(block.mlp, "gate_proj", "up_proj"),
                fuse(block.mlp, "down_proj"),
            )
            for block in blocks
        ]
        rotary: Any = blocks[0].self_attn.rotary_emb
        cos, sin = rotary(torch.empty(0, dtype=dtype, device=self.device), seq_len=max_length)
        half = self.head_size // 2
        self._cos = cos[0, 0, :max_length]  # [max length, head size]
        # With the rotation's signs in the sines, only the halves remain to be swapped.
        self._sin = torch.cat([-sin[0, 0, :max_length, :half], sin[0, 0, :max_length, half:]], dim=-1)

    def slopes(self) -> torch.Tensor:
        return torch.zeros(self.config.num_attention_heads)

    def mask(self, part: Part) -> torch.Tensor | None:
        if part.length == 1:
            return None
        return causal_mask(part, self.dtype, self.device).repeat(self.group, 1)

    def context(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.from_numpy(batch.positions).to(self.device)
        return self._cos[positions], self._sin[positions]

    def compute(
        self, number: int, hidden: torch.Tensor, batch: Batch, context: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        block: Any = self.blocks[number]
        heads, kv_heads, size = self.kv_heads * self.group, self.kv_heads, self.head_size
        query_key_value, output, gate_up, down = self._projections[number]
        projected = query_key_value(norm(block.input_layernorm, hidden)).view(-1, heads + 2 * kv_heads, size)
        rotate(projected, heads + kv_heads, *context)
        queries = projected[:, :heads].unflatten(1, (kv_heads, self.group))
        attended = batch.attend(number, queries, projected[:, heads:].unflatten(1, (2, kv_heads)))
        hidden = output(attended).add_(hidden)
        return down(gate(gate_up(norm(block.post_attention_layernorm, hidden)))).add_(hidden)


def norm(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Compute an RMS norm (https://arxiv.org/abs/1910.07467)."""
    if hidden.device.type == "cpu":
        return kernels.norm(hidden, layer.weight, layer.variance_epsilon)
    return F.rms_norm(hidden, layer.weight.shape, layer.weight, layer.variance_epsilon)


def rotate(heads: torch.Tensor, count: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate queries and keys, the first ``count`` of [tokens, heads, head size], in place."""
    if heads.device.type == "cpu":
        kernels.rotate(heads, count, cos, sin)
        return
    heads = heads[:, :count]
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    torch.addcmul(heads * cos[:, None], swapped, sin[:, None], out=heads)


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute the gated unit (SwiGLU, https://arxiv.org/abs/2002.05202) of [tokens, gate and up]."""
    if gate_up.device.type == "cpu" and len(gate_up) <= KERNEL_ROWS:
        return kernels.gate(gate_up)
    gates, ups = gate_up.chunk(2, dim=-1)
    return F.silu(gates) * ups
