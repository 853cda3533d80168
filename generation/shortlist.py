"""Tokens from logits that are only bounded: those that can be chosen are computed, and no others.

Each rule needs the logits above some threshold only, which bounds tell: there are k logits of at least the kth largest
lower bound, so that what is among the k largest has an upper bound of at least that. For ``top_p``, also the sum of all
probabilities counts. It lies between the sums over the bounds, and so does the number of tokens that are kept between
the numbers that these two give. If the token drawn from the larger number is among the smaller one, it is the token.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from generation.rules import FIRST_LOOK, by_likelihood, exponentials
from swarm.client.bounds import BoundedLogits

Process = Callable[[torch.Tensor], torch.Tensor]
Found = tuple[torch.Tensor, torch.Tensor]  # ids of tokens, and their scores
# Differences of scores and their exp() err by less in float32, wherever they stand; sums are in float64.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Prefix:
    """Tokens that may be kept, likeliest first."""

    ids: torch.Tensor
    scores: torch.Tensor
    fewest: int  # so many of them are kept at least


class Shortlist:
    """The scores of one next token: logits after penalties, bias and temperature, of which none changes the order of
    two values of a token. So bounds of logits become bounds of scores, rounding included."""

    def __init__(self, logits: BoundedLogits, process: Process) -> None:
        """:param process: takes logits and returns scores, [vocabulary] both"""
        self._logits, self._process = logits, process
        self.lower, self.upper = process(logits.lower), process(logits.upper)
        self._is_finite = True  # all that was computed

    def above(self, threshold: float) -> Found | None:
        """Return all tokens whose scores may reach a threshold, by id, and their scores; None: not all are finite."""
        ids = (self.upper >= threshold).nonzero()[:, 0]
        self._compute(ids)
        return (ids, self.upper[ids]) if self._is_finite else None

    def _compute(self, ids: torch.Tensor) -> None:
        self._is_finite = self._is_finite and bool(torch.isfinite(self._logits.exact(ids)).all())
        self.lower, self.upper = self._process(self._logits.lower), self._process(self._logits.upper)

    def _reached(self, count: int) -> float:
        """Return what at least so many tokens reach: computing the likeliest ones raises it by about their bounds."""
        self._compute(self.lower.topk(min(2 * count, len(self.lower))).indices)
        return float(self.lower.topk(count).values[-1])

    def likeliest(self) -> Found | None:
        """Return some tokens, among them all that are likeliest."""
        return self.above(self._reached(1))

    def top_k(self, top_k: int) -> Found | None:
        """Return some tokens, among them all that ``keep_top_k`` keeps."""
        return None if top_k >= len(self.lower) else self.above(self._reached(top_k))

    def min_p(self, min_p: float) -> Found | None:
        """Return some tokens, among them all that ``keep_min_p`` keeps."""
        # As in `keep_min_p`, whose sum is rounded to float32.
        return self.above(float(torch.tensor(self._reached(1)) + math.log(min_p)))

    def top_p(self, top_p: float) -> Iterator[Prefix]:
        """Yield ever closer what is known of the tokens that ``keep_top_p`` keeps, as more of them are computed."""
        largest = (self.lower.max(), self.upper.max())
        if not torch.isfinite(torch.stack(largest)).all():
            return
        rest = [exponentials(bounds, bound) for bounds, bound in zip((self.lower, self.upper), largest, strict=True)]
        count = FIRST_LOOK
        while count < len(self.lower) // 2:
            threshold = min(float(self.upper.topk(count).values[-1]), self._reached(1))
            found = self.above(threshold)
            if found is None:
                return
            order = by_likelihood(found[1])
            ids, scores = found[0][order], found[1][order]
            # What all others have together, beside the likeliest token rather than the largest bound.
            scales = [(bound - scores[0]).double().exp() for bound in largest]
            others = [(it.sum() - it[ids].sum()).clamp(min=0) * scale for it, scale in zip(rest, scales, strict=True)]
            fewest, most = how_many(scores, top_p, others[0], others[1])
            if most < len(scores) and scores[most - 1] >= threshold:  # which no other one reaches
                yield Prefix(ids[:most], scores[:most], fewest)
            count = 4 * max(count, len(ids))


def how_many(
    scores: torch.Tensor, top_p: float, others_lower: torch.Tensor, others_upper: torch.Tensor
) -> tuple[int, int]:
    """Return how many tokens ``keep_top_p`` keeps at least and at most, if none of those unknown are among them.

    :param scores: of the known tokens, likeliest first
    :param others_lower: what all others have together at least, where the likeliest token has 1; ``others_upper``: at
        most
    """
    likely = exponentials(scores, scores[0])
    before = likely.cumsum(dim=0) - likely
    totals = (likely.sum() + others_lower) * (1 - ROUNDING), (likely.sum() + others_upper) * (1 + ROUNDING)
    fewest, most = (max(int((before < top_p * total).sum()), 1) for total in totals)
    return fewest, most
