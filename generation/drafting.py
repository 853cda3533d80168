"""Drafting: several tokens for one pass through the swarm (speculative decoding, Leviathan et al., ICML 2023).

A draft is what may follow. It is computed together with the last token, so that the logits after each of its tokens are
known; where the text goes on as drafted, those are the logits of the next token, as if each had been computed alone.
Tokens are chosen from them as ever, by the same sampler: a draft changes when logits come, and nothing else.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from generation.pace import Pace
from generation.session import Session
from generation.suffixes import SuffixIndex
from swarm.client.bounds import Logits
from swarm.waiter import Waiter

# How often a draft's token is taken, before anything is known: by the number of bits of how many tokens agree with the
# text before it. And of how many tokens that is worth.
PRIOR = (0.0, 0.0, 0.4, 0.6, 0.8, 0.9, 0.95)
PRIOR_TOKENS = 6.0
FORGOTTEN = 0.02  # the share of what is known that the next token replaces


@dataclass(frozen=True)
class Draft:
    """What may follow the tokens of a session, and how sure that is."""

    token_ids: Sequence[int]
    kind: int  # drafts of a kind are taken alike often


class Drafter(Protocol):
    """Makes drafts for one answer."""

    seconds: float  # that it takes to make each token of a draft

    def follow(self, token_ids: Sequence[int]) -> int | None:
        """Note the tokens so far; return of which kind a draft would be, None if there is none."""

    def draft(self, count: int) -> Sequence[int]:
        """Return that many tokens that may follow, or fewer."""

    def close(self) -> None:
        """End with the answer."""


class OwnText:
    """Drafts what has followed the last tokens where they stood before: good for edits, quotes and lists."""

    seconds = 0.0

    def __init__(self) -> None:
        self._index = SuffixIndex()
        self._place = 0

    def follow(self, token_ids: Sequence[int]) -> int | None:
        self._index.extend(token_ids[len(self._index) :])
        match = self._index.match()
        if match is None:
            return None
        self._place = match.place
        return match.length.bit_length()

    def draft(self, count: int) -> Sequence[int]:
        return self._index.following(self._place, count)

    def close(self) -> None:
        pass


@dataclass
class Acceptance:
    """How often the tokens of drafts are taken, by the drafts' kinds. What an answer learns, later ones begin with."""

    taken: list[float] = field(default_factory=lambda: [PRIOR_TOKENS * likelihood for likelihood in PRIOR])
    tried: list[float] = field(default_factory=lambda: [PRIOR_TOKENS] * len(PRIOR))

    def likelihood(self, kind: int) -> float:
        """Return how likely a token is taken if those before it are."""
        return self.taken[kind] / self.tried[kind]

    def note(self, kind: int, taken: int, tried: int) -> None:
        """Note how many tokens of a draft were taken, of how many until the first that was not."""
        kept = (1 - FORGOTTEN) ** tried
        self.taken[kind] = kept * self.taken[kind] + taken
        self.tried[kind] = kept * self.tried[kind] + tried


class Drafting:
    """What all answers of a model know about drafts together."""

    def __init__(self, make_drafter: Callable[[], Drafter] = OwnText) -> None:
        """:param make_drafter: called once for each answer"""
        self.make_drafter = make_drafter
        self.pace = Pace()
        self.acceptance = Acceptance()
        self.steps = self.drafted = self.taken = 0  # steps with drafts, tokens of these, and how many were taken

    @contextlib.contextmanager
    def answering(self, session: Session) -> Iterator["Lookahead"]:
        """Give the block the logits of an answer."""
        with self.pace.answering():
            ahead = Lookahead(session, self)
            try:
                yield ahead
            finally:
                ahead.close()


class Lookahead:
    """The logits of one answer's next tokens, computed several at a time where that pays."""

    def __init__(self, session: Session, drafting: Drafting) -> None:
        """:param session: of one row"""
        self._session = session
        self._drafting, self._pace = drafting, drafting.pace
        self._drafter = drafting.make_drafter()
        self._draft = Draft((), 0)
        self._rows: Iterator[Logits] = iter(())  # after the tokens of the draft
        self._taken = 0  # tokens of the draft
        self._seconds = 0.0  # that the last step took
        self._begun = False

    def next_logits(self, left: int, waiter: Waiter) -> Logits:
        """Return the logits of the next token: [vocabulary], float32, or what is known of them.

        :param left: how many tokens the answer may have after it
        """
        draft, refused = self._draft.token_ids, False
        if self._taken < len(draft):
            refused = self._session.token_ids[-1] != draft[self._taken]
            if not refused and (logits := next(self._rows, None)) is not None:
                self._taken += 1
                return logits
        self._account(refused=refused)
        return self._step(left, waiter)

    def _step(self, left: int, waiter: Waiter) -> Logits:
        if not self._begun:  # the prompt
            self._begun = True
            return self._session.step_bounded(waiter=waiter)
        started = self._pace.clock()
        self._draft, self._taken = self._proposed(left), 0
        if not self._draft.token_ids:
            logits = self._session.step_bounded(waiter=waiter)
            self._pace.note(0, self._pace.clock() - started, 1)
            return logits
        self._rows = self._session.verify(self._draft.token_ids, waiter=waiter)
        logits = next(self._rows)
        self._seconds = self._pace.clock() - started
        return logits

    def _proposed(self, left: int) -> Draft:
        nothing = Draft((), 0)
        if left < 1 or not self._session.can_verify:
            return nothing
        kind = self._drafter.follow(self._session.token_ids)
        if kind is None:
            return nothing
        size = self._pace.choose(self._drafting.acceptance.likelihood(kind), left, self._drafter.seconds)
        return Draft(self._drafter.draft(size), kind) if size else nothing

    def _account(self, *, refused: bool) -> None:
        """Note what has become of the last draft."""
        size, taken = len(self._draft.token_ids), self._taken
        if not size:
            return
        self._pace.note(size, self._seconds, taken + 1)
        self._drafting.acceptance.note(self._draft.kind, taken, taken + refused)
        self._drafting.steps += 1
        self._drafting.drafted += size
        self._drafting.taken += taken
        self._draft = Draft((), 0)

    def close(self) -> None:
        """End with the answer. What is left of a draft was not refused: the text has ended."""
        if self._taken:
            self._account(refused=False)
        self._drafter.close()
