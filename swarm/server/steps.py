"""Sessions, their steps, and the pieces of steps that a batch is made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import swarm.compat  # noqa: F401

import torch

from swarm.server.channel import BatcherChannel


@dataclass(eq=False)
class Session:
    """A session of a client, as the batcher knows it."""

    channel: BatcherChannel  # to its handler
    number: int  # on that channel
    cache: torch.Tensor  # see RaggedBlocks.cache_descriptor
    first: int  # it is computed by blocks [first, last) of the span
    last: int
    replied: float = 0.0  # when its last step was answered, time.monotonic()
    turnaround: float = math.inf  # seconds from that answer to the next step, as it was the last time

    @property
    def rows(self) -> int:
        """Its sequences."""
        return self.cache.shape[1]


@dataclass(eq=False)
class Step:
    """Tokens of a session that wait to be computed, and how far that is."""

    session: Session
    start: int  # position of the first token
    hidden: torch.Tensor  # inputs, and outputs where the step is done: [sequences or 1, tokens, hidden size]
    prompts: Sequence[torch.Tensor | None] | None = None
    hypotheses: Sequence[int] | None = None  # None as well once the cache is in their order
    done: int = 0  # tokens that are computed, for all sequences
    width: int = 0  # tokens in work, if they are computed for some sequences; then no others are begun
    row: int = 0  # sequences for which those are computed
    turn: int = 0  # tokens computed since it was let go first

    @property
    def rows(self) -> int:
        """Its sequences."""
        return self.hidden.shape[0]

    @property
    def left(self) -> int:
        """Tokens of each sequence that are not computed for all of them."""
        return self.hidden.shape[1] - self.done

    @property
    def long(self) -> bool:
        """Whether it is more than one token, or one that has not been computed for all sequences at once."""
        return self.left > 1 or self.row > 0


@dataclass(frozen=True)
class Piece:
    """What a batch computes of a step: some tokens of some of its sequences."""

    step: Step
    tokens: int
    row: int  # the first of its sequences
    rows: int

    @property
    def size(self) -> int:
        """Tokens of all its sequences."""
        return self.rows * self.tokens
