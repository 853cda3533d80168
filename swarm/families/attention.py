"""Attention as Transformers' decoder layers ask for it, over caches that are this project's.

Transformers lets a program register an attention implementation. A decoder layer then computes norms, projections,
rotation, gates and experts as ever, and hands queries, keys and values to ``attend``, which passes them to whatever
the thread has named with ``computing_attention``: the caches of a batch, or those of one call of petals.
"""

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import swarm.compat  # noqa: F401

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

IMPLEMENTATION = "petals-chat"


@dataclass(frozen=True, eq=False)
class Scoring:
    """How the queries of a layer score its keys."""

    scale: float
    window: int | None = None  # keys before and including the query's own that it sees; None: all
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    # [heads], or None: a further score of each head, whose weight goes to no value.
    sinks: torch.Tensor | None = None


class Attention(Protocol):
    """Computes attention for one call of a layer."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Return [batch, tokens, heads, head size].

        :param query: [batch, heads, tokens, head size]
        :param key: [batch, key/value heads, tokens, head size], of the new tokens
        :param value: like ``key``
        """


_thread = threading.local()


@contextlib.contextmanager
def computing_attention(attention: Attention) -> Iterator[None]:
    """Let this thread's layers compute their attention by ``attention`` within the block."""
    _thread.attention = attention
    try:
        yield
    finally:
        _thread.attention = None


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention as Transformers' attention interface wants it.

    :raises NotImplementedError: if the layer asks for something that is not handled here
    """
    unknown = sorted(name for name, option in options.items() if name not in HARMLESS and option not in (None, False))
    if attention_mask is not None or options.get("dropout") or unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'a mask or dropout'} is not supported")
    scale = module.head_dim**-0.5 if scaling is None else scaling
    return _thread.attention(query, key, value, Scoring(scale, sliding_window, softcap, s_aux)), None


# What layers pass on that attention does not depend on, where there is no mask and no dropout.
HARMLESS = frozenset({"dropout", "position_ids", "position_embeddings", "use_cache"})

AttentionInterface.register(IMPLEMENTATION, attend)


class OneCall:
    """Attention of one call of petals: the whole batch has the same positions, and perhaps a past."""

    def __init__(self, past: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Take keys and values as petals keeps them: [batch * heads, size, tokens], [batch * heads, tokens, size]."""
        self.past = past
        self.present: tuple[torch.Tensor, torch.Tensor] | None = None  # past and new ones, after the call

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        batch, heads, length, size = query.shape
        kv_heads = key.shape[1]
        if self.past is not None:
            keys, values = self.past
            key = torch.cat([keys.view(batch, kv_heads, size, -1).transpose(2, 3), key], dim=2)
            value = torch.cat([values.view(batch, kv_heads, -1, size), value], dim=2)
        self.present = (key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1))
        mask = causal_mask(key.shape[2] - length, length, scoring.window, query.dtype, query.device)
        grouped = query.reshape(batch, kv_heads, -1, size)
        output = attention(grouped, key, value, mask.repeat(heads // kv_heads, 1), scoring)
        return output.view(batch, heads, length, size).transpose(1, 2)


def causal_mask(
    start: int, length: int, window: int | None, dtype: torch.dtype, device: torch.device, first: int = 0
) -> torch.Tensor:
    """Return what to add to scores so that no token sees a later one, or one that its window has left behind.

    :param start: position of the first of ``length`` queries
    :param first: position of the first key
    :returns: [length, keys up to the last query's]
    """
    queries = torch.arange(start, start + length, device=device)[:, None]
    keys = torch.arange(first, start + length, device=device)[None]
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scoring: Scoring
) -> torch.Tensor:
    """Compute attention with grouped queries.

    :param query: [batch, key/value heads, query heads of each times tokens, head size]
    :param keys: [batch, key/value heads, all tokens, head size]
    :param values: like ``keys``
    :param mask: added to the scores; None: nothing
    :returns: the shape of ``query``
    """
    if scoring.softcap is None and scoring.sinks is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scoring.scale)
    scores = query @ keys.transpose(2, 3) * scoring.scale
    if scoring.softcap is not None:
        scores = (scores / scoring.softcap).tanh() * scoring.softcap
    if mask is not None:
        scores = scores + mask
    if scoring.sinks is None:
        return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ values
    # One more column takes part in the softmax and is then dropped.
    length = query.shape[2] * keys.shape[1] // len(scoring.sinks)
    sinks = scoring.sinks.view(1, keys.shape[1], -1, 1).repeat_interleave(length, 2).expand(len(query), -1, -1, 1)
    weights = torch.cat([scores, sinks.to(scores.dtype)], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1]
    return weights.to(query.dtype) @ values
