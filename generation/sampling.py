"""Logits to tokens: which token comes next.

The rules and their order are Transformers', so that results equal ``model.generate`` with the same seed; those of the
OpenAI API stand beside them. Penalties and temperature are Transformers' own processors. ``top_k``, ``top_p`` and
``min_p`` are our own: the processors sort the whole vocabulary for each token, which takes longer than the token
itself (33 ms for BLOOM's 250,000 words), when a few hundred words have all the probability that counts.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from generation.parameters import MAX_SEED, GenerationParams
from generation.rules import LogitBias, OwnPenalties, keep_min_p, keep_top_k, keep_top_p
from generation.shortlist import Process, Shortlist
from swarm.client.bounds import BoundedLogits, Logits, all_of

CHANCE_BITS = 53  # of a random number, as many as a float has
# Of checkpoints that say nothing, as in Transformers' `generate`; its GenerationConfig has None for them.
UNSET: Mapping[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


class Candidates:
    """Which tokens may be drawn, and how likely each is."""

    def __init__(self, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
        """Set the rules; a value of None, or one that leaves out nothing, adds no rule."""
        self.top_k, self.top_p, self.min_p = top_k or None, None if top_p == 1.0 else top_p, min_p or None
        # Then they are in the order of their likelihood, and otherwise by id.
        self.likeliest_first = self.top_k is None and self.top_p is not None
        self._rules: list[Callable[[torch.Tensor], torch.Tensor]] = []
        if self.top_k is not None:
            self._rules.append(partial(keep_top_k, top_k=self.top_k))
        if self.top_p is not None:
            self._rules.append(partial(keep_top_p, top_p=self.top_p))
        if self.min_p is not None:
            self._rules.append(partial(keep_min_p, min_p=self.min_p))

    def __call__(self, scores: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the ids of the candidates, None for all tokens, and their probabilities.

        :param scores: [vocabulary]
        """
        ids, scores = self.among(None, scores)
        return ids, scores.softmax(dim=-1)

    def among(self, ids: torch.Tensor | None, scores: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the ids of the candidates, None for all tokens, and their scores.

        :param ids: of the tokens whose scores are given; None: all
        """
        for rule in self._rules:
            kept = rule(scores)
            ids, scores = kept if ids is None else ids[kept], scores[kept]
        return ids, scores


def pick(probabilities: torch.Tensor, point: float) -> int:
    """Return the index whose share of the whole a point lies in.

    :param probabilities: [n], in any measure
    :param point: in [0, 1)
    """
    ends = probabilities.cumsum(dim=-1, dtype=torch.float64)
    index = int(torch.searchsorted(ends, point * ends[-1], right=True))
    # Rounding may put the point at the very end, behind the last one that has a share.
    return index if index < len(ends) else int(probabilities.nonzero()[-1])


def first_arrival(scores: torch.Tensor, chance: int) -> int:
    """Return the index of a token, each as often as it is likely: all begin a race, and who arrives first has won.

    The time of each is exponentially distributed, and the first ones have the same whether there are more or not.

    :param scores: [n], likeliest first
    :param chance: seeds the times
    """
    times = np.random.Generator(np.random.PCG64(chance)).standard_exponential(len(scores))
    return int((np.log(times) - scores.double().numpy()).argmin())


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

        chance = self._random.getrandbits(CHANCE_BITS)
        token_id = self._choose_bounded(logits, process, chance) if isinstance(logits, BoundedLogits) else None
        if token_id is None:
            scores = process(all_of(logits))
            if self._candidates is None:
                token_id = int(scores.argmax())
            else:
                token_id = self._draw(*self._candidates.among(None, scores), len(scores), chance)
        if self._penalties is not None:
            self._penalties.counts[token_id] = self._penalties.counts.get(token_id, 0) + 1
        return token_id

    def _choose_bounded(self, logits: BoundedLogits, process: Process, chance: int) -> int | None:
        """Return the id of the next token, or None if all logits have to be computed for it."""
        shortlist, candidates = Shortlist(logits, process), self._candidates
        if candidates is None:
            found = shortlist.likeliest()
            return None if found is None else int(found[0][found[1].argmax()])
        if candidates.likeliest_first:
            return self._choose_top_p(shortlist, candidates, len(logits.lower), chance)
        found = None
        if candidates.top_k is not None:
            found = shortlist.top_k(candidates.top_k)
        elif candidates.min_p is not None:
            found = shortlist.min_p(candidates.min_p)
        # What the first rule leaves of these tokens is what it leaves of all.
        return None if found is None else self._draw(*candidates.among(*found), len(logits.lower), chance)

    def _choose_top_p(self, shortlist: Shortlist, candidates: Candidates, size: int, chance: int) -> int | None:
        assert candidates.top_p is not None
        for prefix in shortlist.top_p(candidates.top_p):
            most, fewest = len(prefix.ids), prefix.fewest
            if candidates.min_p is not None:
                most = len(keep_min_p(prefix.scores, candidates.min_p))
                fewest = min(fewest, most)
            if self._generator is not None and most > fewest:
                continue  # the numbers that `generate` compares depend on how many there are
            if self._generator is not None or first_arrival(prefix.scores[:most], chance) < fewest:
                return self._draw(prefix.ids[:most], prefix.scores[:most], size, chance)
        return None

    def _draw(self, ids: torch.Tensor | None, scores: torch.Tensor, size: int, chance: int) -> int:
        """Draw one of the candidates.

        :param ids: None: all tokens
        :param size: of the vocabulary
        """
        assert self._candidates is not None
        if self._generator is None and self._candidates.likeliest_first:
            assert ids is not None
            return int(ids[first_arrival(scores, chance)])
        probabilities = scores.softmax(dim=-1)
        if self._generator is None:
            index = pick(probabilities, chance / 2**CHANCE_BITS)
            return index if ids is None else int(ids[index])
        if ids is not None:
            # `generate` draws a number for each token of the vocabulary: who wants its results waits for all.
            probabilities = torch.zeros(size, dtype=probabilities.dtype).index_copy_(0, ids, probabilities)
        return int(torch.multinomial(probabilities, num_samples=1, generator=self._generator))
