"""What changes logits before a token is drawn: penalties, biases, and rules that keep the likeliest tokens."""

import math
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

# How many of the likeliest tokens are looked at first. Up to here it takes no longer to find more of them.
FIRST_LOOK = 256
# What is less likely than the likeliest by this power of e changes no sum, and beyond it floating-point numbers become
# denormal, with which processors are many times slower.
SMALLEST_EXPONENT = -80.0


def exponentials(scores: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Return how likely tokens are beside the likeliest one: [tokens], float64, in which sums are right."""
    return (scores - largest).clamp_(min=SMALLEST_EXPONENT).exp_().double()


def by_likelihood(scores: torch.Tensor) -> torch.Tensor:
    """Return the indices of all tokens, likeliest first; equally likely ones remain in order."""
    return scores.sort(descending=True, stable=True).indices


def keep_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the indices of the likeliest tokens that together have a probability of ``top_p``, at least one, likeliest
    first (Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020).

    :param scores: [tokens]
    """
    largest = scores.max()
    total = exponentials(scores, largest).sum()
    count = min(FIRST_LOOK, len(scores))
    while True:
        # `topk` leaves open which of equal ones it returns, and in which order.
        indices = keep_top_k(scores, count)
        indices = indices[by_likelihood(scores[indices])]
        likely = exponentials(scores[indices], largest)
        before = likely.cumsum(dim=-1) - likely  # of all that are likelier
        kept = int((before < top_p * total).sum())
        if kept < len(indices) or len(indices) == len(scores):
            return indices[: max(kept, 1)]
        count = min(8 * max(count, len(indices)), len(scores))


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
