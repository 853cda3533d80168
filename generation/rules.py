"""Which tokens may be drawn: rules that keep the likeliest ones."""

import math

import torch

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
