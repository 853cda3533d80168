"""What is known of the logits of a next token before they are computed: each lies between two bounds."""

from collections.abc import Callable

import torch


class BoundedLogits:
    """The logits of one next token, each between two bounds until it is computed. One thread at a time may use them."""

    def __init__(
        self,
        lower: torch.Tensor,
        upper: torch.Tensor,
        compute: Callable[[torch.Tensor], torch.Tensor],
        compute_all: Callable[[], torch.Tensor],
    ) -> None:
        """Take bounds, both [vocabulary], float32 and never NaN, and what computes logits.

        :param compute: takes token ids, [n] int64, and returns their logits, [n] float32
        :param compute_all: returns all of them, with the same bits
        """
        self.lower, self.upper = lower, upper
        self._compute, self._compute_all = compute, compute_all
        self._known = torch.zeros(len(lower), dtype=torch.bool)
        self._all: torch.Tensor | None = None

    def exact(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits of some tokens, [n] float32; their bounds are the logits themselves from now on."""
        if self._all is None and len(new := ids[~self._known[ids]]):
            self.lower[new] = self.upper[new] = self._compute(new)
            self._known[new] = True
        return self.upper[ids]

    def all(self) -> torch.Tensor:
        """Return the logits of all tokens, [vocabulary] float32."""
        if self._all is None:
            self._all = self.lower = self.upper = self._compute_all()
        return self._all


# Of a next token: all of them, or what is known of them.
Logits = torch.Tensor | BoundedLogits


def all_of(logits: Logits) -> torch.Tensor:
    """Return the logits of all tokens, [vocabulary] float32."""
    return logits if isinstance(logits, torch.Tensor) else logits.all()
