"""Falcon as a block of petals: Transformers' own decoder layer, in all its variants.

Petals' block is a copy of an older layer. It calls what is gone from Transformers, and it cannot compute Falcon-7B,
whose queries share one key and value, nor Falcon2-11B, which has one norm where 40B has two. The names of the weights
are the same.
"""

import math
from collections.abc import Iterator
from typing import Any

import swarm.compat  # noqa: F401

import torch
from petals.models.falcon.config import DistributedFalconConfig
from transformers.models.falcon.modeling_falcon import (
    FalconDecoderLayer,
    FalconRotaryEmbedding,
    build_alibi_tensor,
)

from swarm.families.attention import causal_mask
from swarm.families.layers import Positions


def restore_falcon() -> None:
    """Give petals' configuration of Falcon a block that works."""
    DistributedFalconConfig.block_class = FalconBlock


def check_falcon(config: Any) -> Iterator[str]:
    """Yield what is wrong with a Falcon's settings: Transformers would fail in the middle of a computation."""
    newer, heads, kv_heads = config.new_decoder_architecture, config.num_attention_heads, config.num_kv_heads
    norms = config.num_ln_in_parallel_attn
    if newer and not config.parallel_attn:
        yield "new_decoder_architecture without parallel_attn is not supported"
    if config.parallel_attn and norms not in ((None, 1, 2) if newer else (None, 1)):
        yield f"num_ln_in_parallel_attn {norms} with new_decoder_architecture {bool(newer)} is not supported"
    if newer and heads % kv_heads:
        yield f"num_attention_heads {heads} is no multiple of num_kv_heads {kv_heads}"
    if not newer and not config.multi_query and kv_heads != heads:
        yield f"num_kv_heads {kv_heads} of {heads} heads needs new_decoder_architecture"


def alibi_biases(config: Any, length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what each head adds to its scores for each position of a key: [heads, length].

    Unlike BLOOM's, these biases (ALiBi, https://arxiv.org/abs/2108.12409) are scaled as products of queries and keys
    are, and they do not quite grow linearly: they are rounded to what bfloat16 can hold.
    """
    ones = torch.ones(1, length, dtype=torch.long, device=device)
    biases = build_alibi_tensor(ones, config.num_attention_heads, dtype)[:, 0]
    return biases / math.sqrt(config.head_dim)


class FalconBlock(FalconDecoderLayer):
    """A block with rotary positions or with ALiBi; with a key and value for all heads, for some or for each; with
    attention and MLP side by side or one after the other."""

    rotary_class = FalconRotaryEmbedding  # see ``Positions``

    def __init__(self, config: Any, layer_idx: int = 0) -> None:
        """Make a block without weights.

        :param layer_idx: its number in the model, which does not matter
        """
        config._attn_implementation = "sdpa"
        super().__init__(config, layer_idx)
        self._positions: list[Positions] = []  # made late, and in a list: see ``SwarmLayer``

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, layer_past: Any = None, use_cache: bool = False, **options: Any
    ) -> tuple[Any, ...]:
        """Compute the block as petals wants it.

        :param hidden_states: [batch, tokens, hidden size]
        :param layer_past: see ``OneCallCache``
        :returns: the outputs, and with ``use_cache`` keys and values of all tokens
        """
        length, dtype, device = hidden_states.shape[1], hidden_states.dtype, hidden_states.device
        past = 0 if layer_past is None else layer_past[0].shape[-1]
        mask = causal_mask(past, length, None, dtype, device)[None, None]
        biases = rotation = None
        if self.config.alibi:
            biases = alibi_biases(self.config, past + length, dtype, device)[None, :, None]
            mask = mask + biases
        else:
            rotation = self._rotation(torch.arange(past, past + length, device=device)[None], dtype)
        cache = OneCallCache(self.config, layer_past if past else None)
        outputs, _ = super().forward(
            hidden_states, alibi=biases, attention_mask=mask, layer_past=cache, position_embeddings=rotation
        )
        return (outputs, cache.present) if use_cache else (outputs,)

    def _rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._positions:
            self._positions.append(Positions(self.config))
        return self._positions[0](positions, None, dtype)


class OneCallCache:
    """Stands in for Transformers' cache in one call of petals."""

    def __init__(self, config: Any, past: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Take keys and values as petals keeps them: [batch * key/value heads, size, tokens], [..., tokens, size]."""
        self.kv_heads = config.num_attention_heads // config.num_key_value_groups
        self.past = past
        self.present: tuple[torch.Tensor, torch.Tensor] | None = None  # past and new ones, after the call

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return past and new keys and values, in the shape of the new ones: [batch, heads, tokens, size].

        The newer architecture gives each query head a copy of the key and value that it shares; one is kept.
        """
        copies = key.shape[1] // self.kv_heads
        key, value = key[:, ::copies], value[:, ::copies]
        if self.past is not None:
            keys, values = self.past
            batch, heads, _, size = key.shape
            key = torch.cat([keys.view(batch, heads, size, -1).transpose(2, 3), key], dim=2)
            value = torch.cat([values.view(batch, heads, -1, size), value], dim=2)
        self.present = (key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1))
        return key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
