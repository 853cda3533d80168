"""A session that plain Transformers computes, in one process."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from swarm.errors import SessionLengthExceeded
from swarm.waiter import PATIENT, Waiter


class ReferenceSession:
    """A session that plain Transformers computes, with an attention cache."""

    def __init__(self, model: PreTrainedModel, max_length: int = 256) -> None:
        self.token_ids: list[int] = []
        self.max_length = max_length
        self.position = 0
        self.branches: list[ReferenceSession] = []
        self.can_verify = True
        self.drafts: list[list[int]] = []  # that it was given
        self._model = model
        self._cache: Any = None

    def append(self, token_ids: Sequence[int]) -> None:
        if len(self.token_ids) + len(token_ids) > self.max_length:
            raise SessionLengthExceeded("too many tokens")
        self.token_ids.extend(token_ids)

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int] = (), *, waiter: Waiter = PATIENT) -> torch.Tensor:
        self.append(token_ids)
        if self.position == len(self.token_ids):
            raise ValueError("there is no unprocessed token to step from")
        waiter.look()
        logits = self._compute(self.token_ids[self.position :])[-1]
        self.position = len(self.token_ids)
        return logits

    def _compute(self, token_ids: Sequence[int]) -> torch.Tensor:
        output = self._model(torch.tensor([token_ids]), cache=self._cache, use_cache=True)
        self._cache = output.cache
        return output.logits[0].float()

    def step_bounded(self, token_ids: Sequence[int] = (), *, waiter: Waiter = PATIENT) -> torch.Tensor:
        return self.step(token_ids, waiter=waiter)

    @torch.inference_mode()
    def verify(self, draft: Sequence[int], *, waiter: Waiter = PATIENT) -> Iterator[torch.Tensor]:
        """Compute a draft with the last tokens, and forget it: only its logits are left."""
        assert self.can_verify and draft and len(self.token_ids) + len(draft) <= self.max_length
        self.drafts.append(list(draft))
        waiter.look()
        logits = self._compute([*self.token_ids[self.position :], *draft])
        self.position = len(self.token_ids)
        self._cache.crop(-len(draft))
        yield from logits[-1 - len(draft) :]

    def step_rows_bounded(self, token_ids: Sequence[int], *, waiter: Waiter = PATIENT) -> Sequence[torch.Tensor]:
        if not self.branches:
            self.branches = [ReferenceSession(self._model, self.max_length) for _ in token_ids]
            for branch in self.branches:
                branch.append(self.token_ids)
        steps = zip(self.branches, token_ids, strict=True)
        return [branch.step([token_id], waiter=waiter) for branch, token_id in steps]

    def step_each(self, token_ids: Sequence[int], *, waiter: Waiter = PATIENT) -> Iterator[torch.Tensor]:
        for token_id in token_ids:
            yield self.step([token_id], waiter=waiter)[None]
