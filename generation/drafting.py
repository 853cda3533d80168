"""Drafting: several tokens for one pass through the swarm (speculative decoding, Leviathan et al., ICML 2023).

A draft is what may follow. It is computed together with the last token, so that the logits after each of its tokens are
known; where the text goes on as drafted, those are the logits of the next token, as if each had been computed alone.
Tokens are chosen from them as ever, by the same sampler: a draft changes when logits come, and nothing else.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

from generation.pace import Pace
from generation.session import Session
from generation.suffixes import SuffixIndex
from swarm.client.bounds import Logits
from swarm.waiter import Waiter

if TYPE_CHECKING:
    from swarm.client.draft_model import DraftModel

# How often a draft's token is taken, before anything is known: by the number of bits of how many tokens agree with the
# text before it. And of how many tokens that is worth.
PRIOR = (0.0, 0.0, 0.4, 0.6, 0.8, 0.9, 0.95, 0.7)
BY_MODEL = 7  # the last of these is a draft model's
PRIOR_TOKENS = 6.0
FORGOTTEN = 0.02  # the share of what is known that the next token replaces


@dataclass(frozen=True)
class Draft:
    """What may follow the tokens of a session, and how sure that is."""

    token_ids: Sequence[int]
    kind: int  # drafts of a kind are taken alike often


NOTHING = Draft((), 0)


class Drafter(Protocol):
    """Makes drafts for one answer."""

    @property
    def seconds(self) -> float:
        """How long it takes to make each token of a draft."""

    def follow(self, token_ids: Sequence[int]) -> int | None:
        """Note the tokens so far; return of which kind a draft would be, None if there is none."""

    def draft(self, count: int) -> Sequence[int]:
        """Return that many tokens that may follow, or none."""

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


class SmallModel:
    """Drafts what a small model says next."""

    def __init__(self, model: "DraftModel") -> None:
        self._model, self._session = model, model.open()
        self._token_ids: Sequence[int] = ()

    @property
    def seconds(self) -> float:
        return self._model.seconds

    def follow(self, token_ids: Sequence[int]) -> int | None:
        self._token_ids = token_ids
        return BY_MODEL

    def draft(self, count: int) -> Sequence[int]:
        return self._session.continued(self._token_ids, count)

    def close(self) -> None:
        self._session.close()


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
    """What all answers of a model know about drafts together. Thread-safe."""

    def __init__(self, *make_drafters: Callable[[], Drafter]) -> None:
        """:param make_drafters: called once for each answer; the first one's drafts are preferred to as good ones"""
        self.make_drafters: Sequence[Callable[[], Drafter]] = make_drafters or (OwnText,)
        self.pace = Pace()
        self.acceptance = Acceptance()
        self.steps = self.drafted = self.taken = 0  # steps with drafts, tokens of these, and how many were taken
        self._lock = threading.Lock()

    def using(self, model: "DraftModel | None") -> "Drafting":
        """Let a small model draft for answers that begin from now on, beside their own text."""
        self.make_drafters = (OwnText,) if model is None else (OwnText, partial(SmallModel, model))
        return self

    def note(self, draft: Draft, taken: int, *, refused: bool) -> None:
        """Note how many tokens of a draft were taken, and whether the next one was refused."""
        with self._lock:
            self.acceptance.note(draft.kind, taken, taken + refused)
            self.steps += 1
            self.drafted += len(draft.token_ids)
            self.taken += taken

    def compare(self, guess: Draft, *, right: bool) -> None:
        """Note whether a draft that was not verified began with the next token."""
        with self._lock:
            self.acceptance.note(guess.kind, right, 1)

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
        self._drafters = [make() for make in drafting.make_drafters]
        self._draft = self._guess = NOTHING  # what is verified; what is only compared with what comes
        self._rows: Iterator[Logits] = iter(())  # after the tokens of the draft
        self._taken = 0  # tokens of the draft
        self._seconds = self._drafting_seconds = 0.0  # that the last step took, and its draft
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
        if self._guess.token_ids:
            right = self._session.token_ids[-1] == self._guess.token_ids[0]
            self._drafting.compare(self._guess, right=right)
            self._guess = NOTHING
        return self._step(left, waiter)

    def _step(self, left: int, waiter: Waiter) -> Logits:
        if not self._begun:  # the prompt
            self._begun = True
            return self._session.step_bounded(waiter=waiter)
        clock = self._pace.clock
        began = clock()
        self._draft, self._taken = self._proposed(left), 0
        started = clock()
        if not self._draft.token_ids:
            logits = self._session.step_bounded(waiter=waiter)
            self._pace.note(0, clock() - started, 1)
            return logits
        self._rows = self._session.verify(self._draft.token_ids, waiter=waiter)
        logits = next(self._rows)
        self._seconds, self._drafting_seconds = clock() - started, started - began
        return logits

    def _proposed(self, left: int) -> Draft:
        if left < 1 or not self._session.can_verify:
            return NOTHING
        found = [(drafter, drafter.follow(self._session.token_ids)) for drafter in self._drafters]
        likely = self._drafting.acceptance.likelihood
        for drafter, kind in sorted(found, key=lambda it: -1.0 if it[1] is None else likely(it[1]), reverse=True):
            if kind is None:
                continue
            size = self._pace.choose(likely(kind), left, drafter.seconds)
            if size and (token_ids := drafter.draft(size)):
                return Draft(token_ids, kind)
            if not drafter.seconds:  # it costs nothing to see whether the draft would have been right
                self._guess = Draft(drafter.draft(1), kind)
        return NOTHING

    def _account(self, *, refused: bool) -> None:
        """Note what has become of the last draft."""
        size, taken = len(self._draft.token_ids), self._taken
        if not size:
            return
        if taken or refused:  # else the text has ended before there was anything to learn
            self._pace.note(size, self._seconds, taken + 1, self._drafting_seconds)
        self._drafting.note(self._draft, taken, refused=refused)
        self._draft = NOTHING

    def close(self) -> None:
        """End with the answer. What is left of a draft was not refused: the text has ended."""
        self._account(refused=False)
        for drafter in self._drafters:
            drafter.close()
