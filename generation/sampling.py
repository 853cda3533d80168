"""Logits to tokens: which token comes next.

The rules and their order are Transformers', so that results equal ``model.generate`` with the same seed; those of the
OpenAI API stand beside them. Penalties and temperature are Transformers' own processors. ``top_k``, ``top_p`` and
``min_p`` are our own: the processors sort the whole vocabulary for each token, which takes longer than the token
itself (33 ms for BLOOM's 250,000 words), when a few hundred words have all the probability that counts.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from generation.parameters import MAX_SEED, GenerationParams
from generation.rules import keep_min_p, keep_top_k, keep_top_p
from generation.shortlist import Found, Shortlist
from swarm.client.bounds import BoundedLogits, Logits, all_of

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


class Rule(NamedTuple):
    """One that leaves out tokens: from all scores, and from scores of which only bounds are known."""

    keep: Callable[[torch.Tensor], torch.Tensor]
    shorten: Callable[[Shortlist], Found | None]


class Candidates:
    """Which tokens may be drawn, and how likely each is."""

    def __init__(self, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
        """Set the rules; a value of None, or one that leaves out nothing, adds no rule."""
        self._rules: list[Rule] = []
        if top_k:
            self._rules.append(Rule(partial(keep_top_k, top_k=top_k), lambda it: it.top_k(top_k)))
        if top_p is not None and top_p != 1.0:
            self._rules.append(Rule(partial(keep_top_p, top_p=top_p), lambda it: it.top_p(top_p)))
        if min_p:
            self._rules.append(Rule(partial(keep_min_p, min_p=min_p), lambda it: it.min_p(min_p)))

    def __call__(self, scores: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the ids of the candidates, None for all tokens, and their probabilities.

        :param scores: [vocabulary]
        """
        return _apply(self._rules, None, scores)

    def among(self, shortlist: Shortlist) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the same of scores of which only bounds are known; None: all of them are needed."""
        found = self._rules[0].shorten(shortlist) if self._rules else None
        if found is None:
            return None
        # What the first rule leaves of a shortlist is what it leaves of all; the others see no difference.
        rest = self._rules[1:] if shortlist.is_final else self._rules
        ids, probabilities = _apply(rest, *found)
        assert ids is not None
        return ids, probabilities


def _apply(
    rules: Sequence[Rule], ids: torch.Tensor | None, scores: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    for rule in rules:
        kept = rule.keep(scores)
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
    def choose(self, logits: Logits, token_ids: Sequence[int]) -> int:
        """Return the id of the next token.

        :param logits: [vocabulary], float32, or what is known of them: then those that matter are computed, and the
            token is the same
        :param token_ids: the tokens so far, for the repetition penalty
        """

        def process(logits: torch.Tensor) -> torch.Tensor:
            if not self._processors:
                return logits
            # Some of them write into their input.
            return self._processors(torch.tensor([token_ids]), logits[None].clone())[0]

        token_id = self._choose_bounded(logits, process) if isinstance(logits, BoundedLogits) else None
        if token_id is None:
            scores = process(all_of(logits))
            if self._candidates is None:
                token_id = int(scores.argmax())
            else:
                token_id = self._draw(*self._candidates(scores), len(scores))
        if self._penalties is not None:
            self._penalties.counts[token_id] = self._penalties.counts.get(token_id, 0) + 1
        return token_id

    def _choose_bounded(self, logits: BoundedLogits, process: Callable[[torch.Tensor], torch.Tensor]) -> int | None:
        """Return the id of the next token, or None if all logits have to be computed for it."""
        shortlist = Shortlist(logits, process)
        if self._candidates is None:
            found = shortlist.likeliest()
            return None if found is None else int(found[0][found[1].argmax()])
        candidates = self._candidates.among(shortlist)
        return None if candidates is None else self._draw(*candidates, len(logits.lower))

    def _draw(self, ids: torch.Tensor | None, probabilities: torch.Tensor, size: int) -> int:
        """:param ids: of the candidates; None: all tokens"""
        if self._generator is None:
            index = pick(probabilities, self._random.random())
            return index if ids is None else int(ids[index])
        if ids is not None:
            # `generate` draws a number for each token of the vocabulary: who wants its results waits for all.
            probabilities = torch.zeros(size, dtype=probabilities.dtype).index_copy_(0, ids, probabilities)
        return int(torch.multinomial(probabilities, num_samples=1, generator=self._generator))
