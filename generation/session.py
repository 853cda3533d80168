"""What generation needs of a session, however it is computed."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from swarm.client.bounds import Logits
from swarm.waiter import PATIENT, Waiter


class Session(Protocol):
    """One sequence of tokens, or several rows that begin with the same ones."""

    token_ids: list[int]
    max_length: int

    @property
    def can_verify(self) -> bool: ...

    def append(self, token_ids: Sequence[int]) -> None: ...

    def step(self, token_ids: Sequence[int] = (), *, waiter: Waiter = PATIENT) -> torch.Tensor: ...

    def step_bounded(self, token_ids: Sequence[int] = (), *, waiter: Waiter = PATIENT) -> Logits: ...

    def verify(self, draft: Sequence[int], *, waiter: Waiter = PATIENT) -> Iterator[Logits]: ...

    def step_rows_bounded(self, token_ids: Sequence[int], *, waiter: Waiter = PATIENT) -> Sequence[Logits]: ...

    def step_each(self, token_ids: Sequence[int], *, waiter: Waiter = PATIENT) -> Iterator[torch.Tensor]: ...
