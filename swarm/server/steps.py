"""Sessions, their steps, and the pieces of steps that make a batch."""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import swarm.compat  # noqa: F401

import torch

from swarm.server.attention_cache import AttentionCache, Reach
from swarm.server.channel import BatcherChannel

MOST_VERIFIED = 32  # tokens of a draft, and the one before it


@dataclass(eq=False)
class Session:
    """A session of a client, as the batcher knows it."""

    channel: BatcherChannel  # to its handler
    number: int  # on that channel
    cache: AttentionCache
    first: int  # blocks [first, last) of the span compute it
    last: int
    replied: float = 0.0  # time.monotonic() when its last step was answered
    turnaround: float = math.inf  # seconds from an answer to the next step, the last time

    def __post_init__(self) -> None:
        self.reach = Reach(self.cache.descriptor)

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.cache.descriptor.rows


class StepKind(enum.Enum):
    """How a batch treats a step."""

    PREFILL = "prefill"
    """Many tokens, usually of a prompt, which may be computed in chunks. Such steps share a budget of tokens and do not
    wait for other sessions. A step that is computed for some of its sequences at a time is one, too."""

    DECODE = "decode"
    """One token of each sequence: just generated, or the last one of a prompt cut into chunks."""

    VERIFY = "verify"
    """A few tokens of each sequence, drafted by the client, whose outputs are all wanted (speculative decoding,
    Leviathan et al., ICML 2023). As with DECODE, a user waits for the next token: the step takes no prefill budget, is
    not cut into chunks unless it is very large, and waits for others that are about to come back. It is known by its
    length, see ``is_draft``."""


@dataclass(eq=False)
class Step:
    """Tokens of a session to compute, and the progress so far."""

    session: Session
    start: int  # position of the first token
    hidden: torch.Tensor  # inputs, replaced by outputs as computed: [sequences or 1, tokens, hidden size]
    prompts: Sequence[torch.Tensor | None] | None = None
    hypotheses: Sequence[int] | None = None  # None also once the cache is reordered
    verifies: bool = False  # whether the tokens are drafted; see StepKind.VERIFY
    done: int = 0  # tokens computed for all sequences
    width: int = 0  # tokens computed for only some sequences so far; they are finished before others begin
    row: int = 0  # sequences for which these are computed
    turn: int = 0  # tokens computed since it last yielded

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.hidden.shape[0]

    @property
    def left(self) -> int:
        """Tokens of each sequence that are still to compute."""
        return self.hidden.shape[1] - self.done

    @property
    def size(self) -> int:
        """Tokens of all sequences together that are still to compute."""
        return self.rows * self.left

    @property
    def kind(self) -> StepKind:
        """Its current kind. Nothing else distinguishes prompts from decoding."""
        if self.row > 0:
            return StepKind.PREFILL
        if self.verifies:
            return StepKind.VERIFY
        return StepKind.PREFILL if self.left > 1 else StepKind.DECODE


def is_draft(start: int, tokens: int) -> bool:
    """Whether a step is taken for a draft: of a prompt that continues a session with so few tokens, what a batch makes
    of drafts is as good.

    :param start: position of its first token
    """
    return start > 0 and 1 < tokens <= MOST_VERIFIED


@dataclass(frozen=True)
class Piece:
    """The part of a step that a batch computes: some tokens of some of its sequences."""

    step: Step
    tokens: int
    row: int  # the first of its sequences
    rows: int

    @property
    def size(self) -> int:
        """Tokens of all its sequences together."""
        return self.rows * self.tokens
