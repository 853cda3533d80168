"""Logits to tokens: which token comes next.

The rules and their order are Transformers', so that results equal ``model.generate`` with the same seed; those of the
OpenAI API stand beside them. Penalties and temperature are Transformers' own processors. ``top_k``, ``top_p`` and
``min_p`` are computed here: the processors sort the whole vocabulary for each token, which takes longer than the token
itself (33 ms for BLOOM's 250,000 words), when a few hundred words have all the probability that counts.
"""

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from generation.parameters import MAX_SEED, GenerationParams

# How many of the likeliest tokens are looked at first. Up to here it takes no longer to find more of them.
FIRST_LOOK = 256
# What is less likely than the likeliest by this power of e changes no sum, and beyond it floating-point numbers become
# denormal, with which processors are many times slower.
SMALLEST_EXPONENT = -80.0
# Of checkpoints that say nothing, as in Transformers' `generate`; its GenerationConfig has None for them.
UNSET: Mapping[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


class OwnPenalties(LogitsProcessor):
    """Presence and frequency penalty as the OpenAI API defines them: on tokens of the answer, not of the prompt."""

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence = presence
        self.frequency = frequency
        self.counts: dict[int, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.counts:
            counts = torch.tensor(list(self.counts.values()), dtype=scores.dtype)
            scores[:, list(self.counts)] -= self.presence + self.frequency * counts
        return scores


class LogitBias(LogitsProcessor):
    """Adds numbers to the logits of some tokens."""

    def __init__(self, bias: Sequence[tuple[int, float]]) -> None:
        self.token_ids = torch.tensor([token_id for token_id, _ in bias])
        self.values = torch.tensor([value for _, value in bias], dtype=torch.float32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.token_ids] += self.values
        return scores


def keep_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the indices of the likeliest tokens that together have a probability of ``top_p``, at least one, likeliest
    first (Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020).

    :param scores: [tokens]
    """
    largest = scores.max()
    total = (scores - largest).clamp_(min=SMALLEST_EXPONENT).exp_().sum()
    count = min(FIRST_LOOK, len(scores))
    while True:
        values, indices = scores.topk(count)
        probabilities = (values - largest).exp() / total
        before = probabilities.cumsum(dim=-1) - probabilities  # of all that are likelier
        kept = int((before < top_p).sum())
        if kept < count or count == len(scores):
            return indices[: max(kept, 1)]
        count = min(8 * count, len(scores))


def keep_top_k(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the indices of the ``top_k`` likeliest tokens, and of those that are as likely as the last of them.

    :param scores: [tokens]
    """
    if top_k >= len(scores):
        return torch.arange(len(scores))
    return (scores >= scores.topk(top_k).values[-1]).nonzero()[:, 0]


def keep_min_p(scores: torch.Tensor, min_p: float) -> torch.Tensor:
    """Return the indices of the tokens that are ``min_p`` times as likely as the likeliest, or more (Nguyen et al.,
    "Turning Up the Heat", ICLR 2025).

    :param scores: [tokens]
    """
    return (scores >= scores.max() + math.log(min_p)).nonzero()[:, 0]


class Candidates:
    """Which tokens may be drawn, and how likely each is."""

    def __init__(self, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
        """Set the rules; a value of None, or one that leaves out nothing, adds no rule."""
        self._rules: list[Callable[[torch.Tensor], torch.Tensor]] = []
        if top_k:
            self._rules.append(functools.partial(keep_top_k, top_k=top_k))
        if top_p not in (None, 1.0):
            self._rules.append(functools.partial(keep_top_p, top_p=top_p))
        if min_p:
            self._rules.append(functools.partial(keep_min_p, min_p=min_p))

    def __call__(self, scores: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the ids of the candidates, None for all tokens, and their probabilities.

        :param scores: [vocabulary]
        """
        ids: torch.Tensor | None = None
        for rule in self._rules:
            kept = rule(scores)
            ids, scores = kept if ids is None else ids[kept], scores[kept]
        return ids, scores.softmax(dim=-1)


def pick(probabilities: torch.Tensor, point: float) -> int:
    """Return the index whose share of the whole a point lies in.

    :param probabilities: [n], in any measure
    :param point: in [0, 1)
    """
    ends = probabilities.cumsum(dim=-1, dtype=torch.float64)
    index = int(torch.searchsorted(ends, point * ends[-1], right=True))
    # Rounding may put the point at the very end, behind the last one that has a share.
    return index if index < len(ends) else int(probabilities.nonzero()[-1])


class Sampler:
    """Chooses tokens from logits as ``model.generate`` would with the same parameters and seed."""

    def __init__(self, params: GenerationParams, defaults: GenerationConfig, row: int = 0) -> None:
        """Make a sampler.

        :param row: which of several answers to the same prompt it is for; with the same seed each differs
        """

        def setting(name: str) -> Any:
            said = (getattr(params, name), getattr(defaults, name, None), UNSET[name])
            return next(value for value in said if value is not None)

        self._processors = LogitsProcessorList()
        penalty = setting("repetition_penalty")
        if penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        self._penalties: OwnPenalties | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._penalties = OwnPenalties(params.presence_penalty, params.frequency_penalty)
            self._processors.append(self._penalties)
        if params.logit_bias:
            self._processors.append(LogitBias(params.logit_bias))
        self._candidates: Candidates | None = None
        self._random = random.Random()
        self._generator: torch.Generator | None = None  # in its place, if there is a seed
        if params.do_sample:
            if (temperature := setting("temperature")) != 1.0:
                self._processors.append(TemperatureLogitsWarper(temperature))
            self._candidates = Candidates(setting("top_k"), setting("top_p"), params.min_p)
            if params.seed is not None:
                self._generator = torch.Generator().manual_seed((params.seed + row) % (MAX_SEED + 1))

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor, token_ids: Sequence[int]) -> int:
        """Return the id of the next token.

        :param logits: [vocabulary], float32
        :param token_ids: the tokens so far, for the repetition penalty
        """
        scores = logits[None]
        if self._processors:
            scores = self._processors(torch.tensor([token_ids]), scores.clone())  # some of them write into their input
        token_id = int(scores.argmax()) if self._candidates is None else self._draw(scores[0], self._candidates)
        if self._penalties is not None:
            self._penalties.counts[token_id] = self._penalties.counts.get(token_id, 0) + 1
        return token_id

    def _draw(self, scores: torch.Tensor, candidates: Candidates) -> int:
        ids, probabilities = candidates(scores)
        if self._generator is None:
            index = pick(probabilities, self._random.random())
            return index if ids is None else int(ids[index])
        if ids is not None:
            # `generate` draws a number for each token of the vocabulary: who wants its results waits for all.
            probabilities = torch.zeros_like(scores).index_copy_(0, ids, probabilities)
        return int(torch.multinomial(probabilities, num_samples=1, generator=self._generator))
