"""Llama and what is shaped like it, with loops of this project's in place of Transformers' operators."""

from collections.abc import Sequence
from typing import Any

import swarm.compat  # noqa: F401

import torch
import torch.nn.functional as F

from swarm.families.attention import Scoring
from swarm.products.linear import fuse
from swarm.server import kernels
from swarm.server.blocks import Batch
from swarm.server.families.layers import LayerBlocks

# Beyond this many rows PyTorch's gate, which uses all cores, is faster than a loop that uses one.
KERNEL_ROWS = 32
# The families whose layers may be computed like this. Whether they are is decided by a comparison when they are loaded.
FUSED_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


class FusedLayerBlocks(LayerBlocks):
    """Rotary positions (RoPE, https://arxiv.org/abs/2104.09864), RMS norms, grouped queries, a gated MLP: the layers of
    ``FUSED_FAMILIES``, with queries, keys and values as one product, gates as another, and compiled loops between."""

    @classmethod
    def accepts(cls, blocks: Sequence[Any], config: Any) -> bool:
        """Whether the family may be computed like this, its MLP is gated by SiLU, and whole heads are rotated."""
        return (
            config.model_type in FUSED_FAMILIES
            and config.hidden_act == "silu"
            and not getattr(config, "mlp_bias", False)
            and (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) == 1.0
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
        scales = [block.self_attn.scaling for block in blocks]
        self._scorings = [Scoring(scale, window) for scale, window in zip(scales, self.windows, strict=True)]
        positions = torch.arange(max_length, device=self.device)[None]
        half = self.head_size // 2
        self._rotations = {}
        for kind in {block.layer_type for block in blocks}:
            cos, sin = self.positions(positions, kind, dtype)
            # With the signs of the rotation in it, what is left to do is to swap the halves.
            self._rotations[kind] = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)

    def pack(self) -> None:
        """Do nothing: the projections are packed."""

    def context(self, batch: Batch) -> Any:
        positions = torch.from_numpy(batch.positions).to(self.device)
        return {kind: (cos[positions], sin[positions]) for kind, (cos, sin) in self._rotations.items()}

    def compute(self, number: int, hidden: torch.Tensor, batch: Batch, context: Any) -> torch.Tensor:
        block: Any = self.blocks[number]
        layer = block.self_attn
        heads, kv_heads, size = self.kv_heads * self.group, self.kv_heads, self.head_size
        query_key_value, output, gate_up, down = self._projections[number]
        projected = query_key_value(norm(block.input_layernorm, hidden)).view(-1, heads + 2 * kv_heads, size)
        if hasattr(layer, "q_norm"):
            norm_heads(layer.q_norm, projected[:, :heads])
            norm_heads(layer.k_norm, projected[:, heads : heads + kv_heads])
        rotate(projected, heads + kv_heads, *context[block.layer_type])
        queries = projected[:, :heads].unflatten(1, (kv_heads, self.group))
        new = projected[:, heads:].unflatten(1, (2, kv_heads))
        attended = batch.attend(number, queries, new, self._scorings[number])
        hidden = output(attended).add_(hidden)
        return down(gate(gate_up(norm(block.post_attention_layernorm, hidden)))).add_(hidden)


def norm(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Compute an RMS norm (https://arxiv.org/abs/1910.07467) of [..., size]."""
    if hidden.device.type == "cpu":
        return kernels.norm(hidden, layer.weight, layer.variance_epsilon)
    return F.rms_norm(hidden, layer.weight.shape, layer.weight, layer.variance_epsilon)


def norm_heads(layer: Any, heads: torch.Tensor) -> None:
    """Normalise each of [tokens, heads, head size], in place."""
    heads.copy_(norm(layer, heads.reshape(-1, heads.shape[-1])).view(heads.shape))


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
