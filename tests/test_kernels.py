"""The compiled loops and packed products against PyTorch's own operators, in both dtypes."""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swarm.client.head import Head
from swarm.families.attention import Scoring
from swarm.products.choice import can_pack
from swarm.products.linear import PackedLinear, fuse
from swarm.server import kernels
from tests.support.layers import Layers

# bfloat16 has eight bits of precision; results differ by the order of additions.
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
DTYPES = list(TOLERANCE)


HEADS, GROUP, SIZE = 2, 3, 16  # key/value heads, query heads of each, head size
SCORINGS = {
    "biases": Scoring(SIZE**-0.5),
    "plain": Scoring(0.3),
    "everything": Scoring(0.3, window=5, softcap=0.7, sinks=torch.linspace(-1, 2, HEADS * GROUP)),
}


def expected_output(
    query: torch.Tensor, cache: torch.Tensor, end: int, biases: torch.Tensor | None, scoring: Scoring
) -> torch.Tensor:
    """Compute attention of one token by the book.

    :param query: [key/value heads, query heads of each, head size], float32
    :param cache: [tokens, 2, key/value heads, head size]
    :param end: the token's position, plus one
    """
    keys, values = cache[:end].float().permute(1, 2, 0, 3)
    scores = query @ keys.transpose(1, 2) * scoring.scale
    if biases is not None:
        scores += biases.view(HEADS, GROUP, -1)[..., :end]
    if scoring.softcap:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if scoring.window:
        scores[..., : max(0, end - scoring.window)] = -torch.inf
    if scoring.sinks is not None:
        scores = torch.cat([scores, scoring.sinks.view(HEADS, GROUP, 1)], dim=-1)
    return (scores.softmax(-1)[..., :end] @ values).flatten()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SCORINGS)
@pytest.mark.parametrize("lengths", [[1], [1, 5, 1]])
def test_attention(dtype: torch.dtype, lengths: list[int], kind: str) -> None:
    """Tokens of several sequences, some with more than one new token, each over its own cache."""
    torch.manual_seed(0)
    scoring, starts = SCORINGS[kind], [30, 0, 7][: len(lengths)]
    caches = [torch.randn(64, 2, HEADS, SIZE).to(dtype) for _ in lengths]
    before = [cache.clone() for cache in caches]
    tokens = sum(lengths)
    projected = torch.randn(tokens, HEADS * (GROUP + 2), SIZE).to(dtype)
    queries = projected[:, : HEADS * GROUP].unflatten(1, (HEADS, GROUP))
    new = projected[:, HEADS * GROUP :].unflatten(1, (2, HEADS))
    biases = torch.randn(HEADS * GROUP, 64) if kind == "biases" else None
    addresses = np.repeat([cache.data_ptr() for cache in caches], lengths)
    positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    outputs = kernels.Attention(biases, 64, GROUP)(queries, new, addresses, positions, scoring)
    offset = 0
    for cache, old, start, length in zip(caches, before, starts, lengths, strict=True):
        assert torch.equal(cache[start : start + length], new[offset : offset + length])
        assert torch.equal(cache[:start], old[:start]) and torch.equal(cache[start + length :], old[start + length :])
        for i in range(length):
            expected = expected_output(queries[offset + i].float(), cache, start + i + 1, biases, scoring)
            torch.testing.assert_close(outputs[offset + i].float(), expected, **TOLERANCE[dtype])
        offset += length


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_rotation_and_gate(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 40).to(dtype) * 3, torch.rand(40).to(dtype)
    expected = F.rms_norm(hidden, (40,), weight, 1e-5)
    torch.testing.assert_close(kernels.norm(hidden, weight, 1e-5), expected, **TOLERANCE[dtype])

    gates, ups = (torch.randn(3, 40).to(dtype) * 20).chunk(2, dim=-1)
    together = torch.cat([gates, ups], dim=-1)
    torch.testing.assert_close(kernels.gate(together), F.silu(gates) * ups, **TOLERANCE[dtype])

    heads, cos, sin = torch.randn(3, 5, 8).to(dtype), torch.randn(3, 8).to(dtype), torch.randn(3, 8).to(dtype)
    signed = torch.cat([-sin[:, :4], sin[:, 4:]], dim=-1)
    expected = heads.float()
    turned = torch.cat([-expected[..., 4:], expected[..., :4]], dim=-1)
    expected[:, :4] = (expected * cos[:, None].float() + turned * sin[:, None].float())[:, :4]
    kernels.rotate(heads, 4, cos, signed)
    torch.testing.assert_close(heads, expected.to(dtype), **TOLERANCE[dtype])


def test_gate_of_large_numbers() -> None:
    gates = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    outputs = kernels.gate(torch.cat([gates, torch.ones_like(gates)], dim=-1))
    torch.testing.assert_close(outputs, F.silu(gates), rtol=1e-5, atol=1e-5)


def test_fused_layers_go_on_working() -> None:
    """Petals computes with the same modules where it does not batch, gradients included."""
    layers, plain, inputs = Layers(12), Layers(12), torch.randn(2, 3, 12)
    both, alone = fuse(layers, "first", "second"), fuse(layers, "alone")
    torch.testing.assert_close(both(inputs), torch.cat([plain.first(inputs), plain.second(inputs)], dim=-1))
    torch.testing.assert_close(alone(inputs), plain.alone(inputs))
    gradients = []
    for module in (layers, plain):
        x = inputs.clone().requires_grad_()
        (module.first(x).square().sum() + module.second(x).sum() + module.alone(x).square().sum()).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_weights_that_cannot_be_packed_are_shared() -> None:
    weight = torch.randn(4, 4, dtype=torch.float64)
    assert not can_pack(weight)
    layers = Layers(12).double()
    fused = fuse(layers, "first", "second")
    assert not fused.holds_copy
    assert layers.first.weight.data_ptr() == fused.product.dense().data_ptr()
    inputs = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(fused(inputs)[:, :20], layers.first(inputs))


def test_head_computes_together_for_all_who_wait() -> None:
    torch.manual_seed(0)
    embeddings = nn.Embedding(50, 8)
    transformer = SimpleNamespace(
        word_embeddings=embeddings, word_embeddings_layernorm=nn.Identity(), ln_f=nn.LayerNorm(8)
    )
    lm_head: Any = SimpleNamespace(weight=embeddings.weight, bias=None, use_chunked_forward=False)
    head = Head(SimpleNamespace(transformer=transformer, lm_head=lm_head, config=SimpleNamespace()))
    assert isinstance(head._lm_head, PackedLinear)
    hidden, results = torch.randn(8, 8), [torch.empty(0)] * 8

    def work(i: int) -> None:
        results[i] = head.next_logits(hidden[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    with head._all_together.computing:  # all wait until now
        for thread in threads:
            thread.start()
        while len(head._all_together.waiting) < len(threads):
            threads[0].join(timeout=0.01)
    for thread in threads:
        thread.join(timeout=10)
    expected = transformer.ln_f(hidden) @ embeddings.weight.T
    torch.testing.assert_close(torch.stack(results), expected.detach())
