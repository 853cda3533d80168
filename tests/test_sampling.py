"""Which tokens may be drawn, and how likely each is: as by Transformers' processors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, TopKLogitsWarper, TopPLogitsWarper

from generation.parameters import MAX_SEED, GenerationParams
from generation.rules import FIRST_LOOK
from generation.sampling import Candidates, Sampler, first_arrival, pick

# Without a deadline, for a machine may be busy, and the same examples in every run.
examples = settings(deadline=None, derandomize=True, max_examples=100)
LARGE = 5000  # words: more than are looked at first, and then
DEFAULTS = GenerationConfig(do_sample=True, top_k=0)


def probabilities(rules: dict[str, Any], scores: torch.Tensor) -> torch.Tensor:
    """Of all words, by this project."""
    ids, found = Candidates(rules.get("top_k"), rules.get("top_p"), rules.get("min_p"))(scores)
    return found if ids is None else torch.zeros_like(scores).index_put_((ids,), found)


def by_transformers(rules: dict[str, Any], scores: torch.Tensor) -> torch.Tensor:
    scores = scores[None].clone()
    for name, kind in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper)):
        if name in rules:
            scores = kind(rules[name])(torch.empty(1, 0), scores)
    found = scores[0].softmax(dim=-1)
    # This one came to Transformers later.
    found[found < rules.get("min_p", 0.0) * found.max()] = 0.0
    return found / found.sum()


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])  # from nearly equal words to one that has it all
@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 3000},
        {"top_k": 10**30},
        {"top_p": 0.0},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.0},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 40, "top_p": 0.7},
        {"top_p": 0.8, "min_p": 0.2},
        {"top_k": 3000, "top_p": 0.95, "min_p": 0.05},
    ],
    ids=str,
)
def test_candidates_equal_transformers(rules: dict[str, Any], spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, FIRST_LOOK, LARGE):
        # In float64, where the order in which probabilities are added up decides on no word.
        scores = spread * torch.randn(size, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(probabilities(rules, scores), by_transformers(rules, scores))


@pytest.mark.parametrize("rules", [{"top_k": 3}, {"min_p": 0.5}, {"top_k": 2, "min_p": 0.9}], ids=str)
def test_equally_likely_words_stay_together(rules: dict[str, Any]) -> None:
    """As logits of bfloat16 often are."""
    scores = torch.tensor([1.0, 4.0, 5.0, 4.0, 4.0, 4.0, 5.0, -1.0])
    torch.testing.assert_close(probabilities(rules, scores), by_transformers(rules, scores))


@given(st.lists(st.integers(min_value=0, max_value=9), min_size=1, max_size=12).filter(any))
@examples
def test_words_are_drawn_as_often_as_they_are_likely(weights: list[int]) -> None:
    total = sum(weights)
    points = [(i + 0.5) / total for i in range(total)]
    drawn = [pick(torch.tensor(weights, dtype=torch.float32), point) for point in points]
    assert [drawn.count(index) for index in range(len(weights))] == weights


def test_races_are_won_as_often_as_words_are_likely() -> None:
    shares = torch.tensor([0.5, 0.25, 0.15, 0.1])
    winners = [first_arrival(shares.log(), chance) for chance in range(20_000)]
    found = torch.tensor([winners.count(index) for index in range(4)]) / len(winners)
    torch.testing.assert_close(found, shares, atol=0.02, rtol=0.0)  # six standard deviations
    # Who is not there changes nothing among the others.
    fewer = [first_arrival(shares[:2].log(), chance) for chance in range(2000)]
    assert all(one == other for one, other in zip(winners[:2000], fewer, strict=True) if one < 2)


def test_what_has_no_share_is_never_drawn() -> None:
    weights = torch.tensor([0.0, 0.1, 0.0, 0.7, 0.0])
    assert pick(weights, 0.0) == 1
    assert pick(weights, 1.0) == 3  # more than any random number; what rounding may make of the largest one
    assert pick(weights, 1 - 2**-53) == 3


def test_seeds() -> None:
    logits = torch.zeros(1000)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(GenerationParams(do_sample=True, seed=seed), DEFAULTS)
        return [sampler.choose(logits, [0]) for _ in range(20)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert draw(5) == draw(5)
    assert len({tuple(draw(seed)) for seed in (0, 1, MAX_SEED, None, None)}) == 5
    assert torch.equal(torch.get_rng_state(), before)  # sessions do not draw from each other


@pytest.mark.parametrize("seed", [None, 1])
def test_only_candidates_are_drawn(seed: int | None) -> None:
    logits = torch.arange(300, dtype=torch.float32) / 100
    sampler = Sampler(GenerationParams(do_sample=True, top_k=5, seed=seed), DEFAULTS)
    assert {sampler.choose(logits, [0]) for _ in range(200)} == set(range(295, 300))
