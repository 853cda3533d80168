"""A head that reads 8 bits of each weight first chooses the tokens that the whole one would."""

import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BloomForCausalLM, GenerationConfig

from generation.loop import generate
from generation.parameters import GenerationParams
from generation.sampling import Sampler
from generation.text import Detokenizer
from swarm.client import quantised_weights
from swarm.client.bounded_head import BoundedHead, make_finish, softcapped
from swarm.client.bounds import BoundedLogits
from swarm.client.head import Head
from swarm.local import LocalSwarm
from tests.conftest import greedy, load_model

WORDS, HIDDEN, POSITIONS = 1500, 320, 40
PLAIN = GenerationConfig()
PROMPT = "The quick brown fox"


def random_weights(kind: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    weights = torch.randn(WORDS, HIDDEN, generator=generator)
    if kind == "outliers":  # in rows, columns and single weights
        weights[::100] *= 50
        weights[:, ::37] *= 30
        weights[3, 5] = 1e4
    elif kind == "ties":  # many words are the same one
        weights = weights[torch.arange(WORDS) % 50]
    elif kind == "zeros":
        weights[::2] = 0
    elif kind == "tiny":
        weights *= 1e-36
    elif kind == "huge":
        weights *= 1e34 if dtype != torch.float16 else 1e4
    elif kind == "equal":
        weights[:] = 1.0
    return weights.to(dtype)


def random_inputs(weights: torch.Tensor, count: int = POSITIONS) -> torch.Tensor:
    """From inputs that mean one word to those that mean nothing, and some with very large values."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, HIDDEN, generator=generator)
    meant = weights[torch.randint(WORDS, (count,), generator=generator)].float()
    meant = nn.functional.normalize(meant.double(), dim=1, eps=1e-300).float() * HIDDEN**0.5
    inputs = 0.5 * noise + torch.linspace(0, 1, count)[:, None] * meant
    inputs[::7, 11] = 100.0
    return inputs / 4


def sampler(rules: dict[str, Any], seed: int | None = None) -> Sampler:
    made = Sampler(GenerationParams(seed=seed, **rules), PLAIN)
    made._random.seed(7)  # of those without a seed, too, both shall draw the same
    return made


RULES: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "top_k": 50},
    {"do_sample": True, "top_k": 0, "top_p": 0.9},
    {"do_sample": True, "top_k": 0, "top_p": 0.5, "temperature": 0.3},
    {"do_sample": True, "top_k": 0, "top_p": 0.0},
    {"do_sample": True, "top_k": 0, "min_p": 0.05},
    {"do_sample": True, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    {"do_sample": True, "top_k": 0},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.5},
    {"do_sample": True, "top_k": 5, "repetition_penalty": 0.7, "logit_bias": ((7, 40.0), (8, -100.0))},
]


@pytest.mark.parametrize("kind", ["plain", "outliers", "ties", "zeros", "tiny", "huge", "equal"])
def test_tokens_are_those_of_all_logits(kind: str) -> None:
    weights = random_weights(kind)
    head = BoundedHead(weights)
    inputs = random_inputs(weights)
    everything = head.logits(inputs)
    history = list(range(0, WORDS, 5))
    for rules, seed in [*((rules, None) for rules in RULES), *((rules, 3) for rules in RULES[1:5])]:
        bounded, whole = sampler(rules, seed), sampler(rules, seed)
        for logits, found in zip(everything, head.bounds(inputs), strict=True):
            assert (found.lower <= logits).all() and (logits <= found.upper).all()
            assert bounded.choose(found, history) == whole.choose(logits, history), rules
            assert torch.equal(found.all(), logits)


@pytest.mark.parametrize("rules", RULES[:4], ids=str)
def test_few_rows_are_read(rules: dict[str, Any]) -> None:
    """Where inputs mean something, as those of a language model do."""
    weights = random_weights("plain")
    head, inputs = BoundedHead(weights), random_inputs(weights)[POSITIONS // 2 :]
    for found in head.bounds(inputs * 8):
        sampler(rules).choose(found, [0])
        assert found._all is None
        assert found._known.sum() < WORDS / 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_right(dtype: torch.dtype) -> None:
    weights = random_weights("outliers", dtype)[:, :300]  # a block and a part of one
    inputs = random_inputs(random_weights("plain"))[:, :300]
    exact = (inputs.double() @ weights.double().T).float()
    head = BoundedHead(weights)
    torch.testing.assert_close(head.logits(inputs), exact, rtol=1e-6, atol=1e-6)
    for count in (1, 2, 3, 16):
        for found, logits in zip(head.bounds(inputs[:count]), exact, strict=False):
            ids = torch.tensor([5, 0, 1499])
            assert torch.equal(found.exact(ids), head.logits(inputs)[0, ids]) or count > 1
            assert ((found.lower + found.upper) / 2 - logits).abs().max() < (found.upper - found.lower).max()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("where", ["weights", "inputs"])
def test_what_is_not_finite_is_computed_in_full(value: float, where: str) -> None:
    weights, inputs = random_weights("plain"), random_inputs(random_weights("plain"), 6)
    (weights if where == "weights" else inputs)[4, 17] = value
    head = BoundedHead(weights)
    for logits, found in zip(head.logits(inputs), head.bounds(inputs), strict=True):
        assert not (found.lower > logits).any() and not (found.upper < logits).any()
        assert sampler({}).choose(found, [0]) == sampler({}).choose(logits, [0])


@pytest.mark.parametrize(("scaling", "softcap"), [(8.0, None), (1.0, 3.0), (2.0, 30.0)])
def test_what_families_do_to_logits_keeps_bounds(scaling: float, softcap: float | None) -> None:
    weights = random_weights("plain")
    head = BoundedHead(weights, None, "", *make_finish(scaling, softcap))
    inputs = random_inputs(weights) * 4
    exact = softcapped(BoundedHead(weights).logits(inputs), scaling, softcap)
    assert torch.equal(head.logits(inputs), exact)
    for logits, found in zip(exact, head.bounds(inputs), strict=True):
        assert (found.lower <= logits).all() and (logits <= found.upper).all()
        assert sampler(RULES[2]).choose(found, [0]) == sampler(RULES[2]).choose(logits, [0])


def test_a_quantised_copy_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights("plain")
    expected = BoundedHead(weights).bounds(random_inputs(weights, 1))[0]

    def kept() -> list[Path]:
        return [it for it in (tmp_path / quantised_weights.KEPT).iterdir() if it.is_dir()]

    def found(identity: str = "one", weights: torch.Tensor = weights) -> BoundedLogits:
        return BoundedHead(weights, tmp_path, identity).bounds(random_inputs(weights, 1))[0]

    assert torch.equal(found().lower, expected.lower)
    (first,) = kept()
    made = first.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(quantised_weights, "quantise", None)  # it is not made again
        assert torch.equal(found().upper, expected.upper)
    # Of other weights, even if they are said to be the same, there is another copy.
    found(weights=random_weights("zeros"))
    assert len(kept()) == 2 and first.stat().st_mtime_ns == made
    # What is broken is made again.
    (first / "codes.npy").write_bytes((first / "codes.npy").read_bytes()[:-1000])
    assert torch.equal(found().upper, expected.upper)
    # Those made longest ago make room.
    monkeypatch.setattr(quantised_weights, "CACHE_LIMIT", 3 * weights.numel())
    found("two")
    assert len(kept()) == 2
    # Without room it is kept in memory.
    monkeypatch.setattr(quantised_weights, "SPARE", 2**62)
    assert torch.equal(found("three").upper, expected.upper)
    assert len(kept()) <= 2


def test_sessions_that_wait_share_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = nn.Embedding(WORDS, HIDDEN)
    transformer = SimpleNamespace(
        word_embeddings=embeddings, word_embeddings_layernorm=nn.Identity(), ln_f=nn.LayerNorm(HIDDEN)
    )
    model = SimpleNamespace(
        transformer=transformer, lm_head=SimpleNamespace(weight=embeddings.weight), config=SimpleNamespace()
    )
    head = Head(model, bounded=True)
    hidden, tokens = torch.randn(8, HIDDEN), [-1] * 8
    counts: list[int] = []
    bounds = BoundedHead.bounds

    def counted(self: BoundedHead, inputs: torch.Tensor) -> list[BoundedLogits]:
        counts.append(len(inputs))
        return bounds(self, inputs)

    monkeypatch.setattr(BoundedHead, "bounds", counted)

    def work(i: int) -> None:
        tokens[i] = sampler({}).choose(head.next_bounds(hidden[i]), [0])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    with head._bounds_together.computing:  # all wait until now
        for thread in threads:
            thread.start()
        while len(head._bounds_together.waiting) < len(threads):
            pass
    for thread in threads:
        thread.join()
    assert counts == [8]
    assert tokens == head.logits(hidden).argmax(dim=1).tolist()


def test_a_model_with_a_large_head(
    tiny_bloom: Path, swarm: LocalSwarm, reference: BloomForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are those of plain Transformers."""
    monkeypatch.setattr("swarm.client.model.is_large", lambda config, device: True)
    with contextlib.closing(load_model(tiny_bloom, swarm)) as model:
        assert model.head._bounded is not None
        token_ids = model.tokenizer.encode(PROMPT)
        expected = greedy(reference, token_ids, 12)
        for rows in (1, 3):
            with model.open_session(64, rows) as session:
                params = GenerationParams(max_new_tokens=12)
                detokenizers = [Detokenizer(model.tokenizer) for _ in range(rows)]
                answers: list[list[int]] = [[] for _ in range(rows)]
                for row, chunk in generate(
                    session, token_ids, params, budget=12, detokenizers=detokenizers, defaults=GenerationConfig()
                ):
                    answers[row] += chunk.token_ids
                assert answers == [expected] * rows
        with model.open_session(64) as session:
            assert int(session.step(token_ids).argmax()) == expected[0]
