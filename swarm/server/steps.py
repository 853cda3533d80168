"""Sessions, their steps, and the pieces of steps that a batch is made of."""

import enum
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


class StepKind(enum.Enum):
    """What a step is to those that make batches."""

    PREFILL = "prefill"
    """Many tokens, of a prompt as a rule, which may be computed in chunks. Such steps share a budget of tokens, and do
    not wait for other sessions. A step that is computed for some of its sequences at a time is one as well."""

    DECODE = "decode"
    """One token of each sequence: one that was just generated, or the last of a prompt that was cut into chunks."""

    VERIFY = "verify"
    """A few tokens of each sequence that a draft model has guessed, whose outputs are all wanted (speculative decoding,
    Leviathan et al., ICML 2023). As with DECODE, somebody waits for the next token: it takes no prefill budget, is not
    cut into chunks unless it is very large, and waits for others that are about to come back. No client sends such
    steps yet."""


@dataclass(eq=False)
class Step:
    """Tokens of a session that wait to be computed, and how far that is."""

    session: Session
    start: int  # position of the first token
    hidden: torch.Tensor  # inputs, and outputs where the step is done: [sequences or 1, tokens, hidden size]
    prompts: Sequence[torch.Tensor | None] | None = None
    hypotheses: Sequence[int] | None = None  # None as well once the cache is in their order
    verifies: bool = False  # whether the tokens are guesses; see StepKind.VERIFY
    done: int = 0  # tokens that are computed, for all sequences
    width: int = 0  # tokens in work, if they are computed for some sequences; then no others are begun
    row: int = 0  # sequences for which those are computed
    turn: int = 0  # tokens computed since it was first passed over

    @property
    def rows(self) -> int:
        """Its sequences."""
        return self.hidden.shape[0]

    @property
    def left(self) -> int:
        """Tokens of each sequence that are not computed for all of them."""
        return self.hidden.shape[1] - self.done

    @property
    def size(self) -> int:
        """Tokens of all its sequences that are not computed for all of them."""
        return self.rows * self.left

    @property
    def kind(self) -> StepKind:
        """What it is at present. Nothing else tells prompts from decoding."""
        if self.row > 0:
            return StepKind.PREFILL
        if self.verifies:
            return StepKind.VERIFY
        return StepKind.PREFILL if self.left > 1 else StepKind.DECODE


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
