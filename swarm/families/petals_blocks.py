"""Forward passes of petals' own BLOOM block, which Transformers 5 has taken the ground from.

Petals' block calls private methods of Transformers' models that are gone, and passes keys and values where caches are
expected now. The weights and their names are the same.
"""

from typing import Any

import swarm.compat  # noqa: F401

import torch
import torch.nn.functional as F
from petals.models.bloom.block import WrappedBloomBlock
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from swarm.families.attention import causal_mask


def restore_blocks() -> None:
    """Give petals' blocks forward passes that work."""
    WrappedBloomBlock.forward = bloom_forward


def bloom_forward(
    self: Any, hidden_states: torch.Tensor, *args: Any, layer_past: Any = None, use_cache: bool = False, **options: Any
) -> tuple[Any, ...]:
    """Compute a block of BLOOM: attention with linear biases (ALiBi, https://arxiv.org/abs/2108.12409).

    :param hidden_states: [batch, tokens, hidden size]
    :param layer_past: see ``swarm.families.attention.OneCall``
    :returns: the outputs, and with ``use_cache`` keys and values of all tokens
    """
    batch, length = hidden_states.shape[:2]
    layer = self.self_attention
    past = 0 if layer_past is None else layer_past[0].shape[-1]
    normed = self.input_layernorm(hidden_states)
    residual = normed if self.apply_residual_connection_post_layernorm else hidden_states
    heads = self.num_heads
    fused = layer.query_key_value(normed).view(batch, length, heads, 3, layer.head_dim)
    query, key, value = fused.permute(3, 0, 2, 1, 4).unbind(0)
    if past:
        key = torch.cat([layer_past[0].view(batch, heads, layer.head_dim, -1).transpose(2, 3), key], dim=2)
        value = torch.cat([layer_past[1].view(batch, heads, -1, layer.head_dim), value], dim=2)
    ones = torch.ones(1, past + length, device=hidden_states.device)
    alibi = build_alibi_tensor(ones, heads, dtype=hidden_states.dtype)[None]
    mask = alibi + causal_mask(past, length, None, hidden_states.dtype, hidden_states.device)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
    hidden = layer.dense(output) + residual
    normed = self.post_attention_layernorm(hidden)
    residual = normed if self.apply_residual_connection_post_layernorm else hidden
    outputs = self.mlp(normed, residual)
    present = (key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1))
    return (outputs, present) if use_cache else (outputs,)
