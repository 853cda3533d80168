"""Drafts for tests: right ones, wrong ones, and when they are made."""

import random
from collections.abc import Sequence

from generation.drafting import Drafting
from generation.pace import Pace


class Eager(Pace):
    """Drafts whenever it can, as much as a test wants."""

    def __init__(self, sizes: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        self._sizes = sizes
        self._random = random.Random(seed)
        self.notes: list[tuple[int, int]] = []  # size and tokens of each step

    def choose(self, likelihood: float, longest: int, drafting: float = 0.0) -> int:
        return min(self._random.choice(self._sizes), longest)

    def note(self, size: int, seconds: float, tokens: int, drafting: float = 0.0) -> None:
        self.notes.append((size, tokens))


class Prophet:
    """Knows how a text goes on, and lies about some of its tokens."""

    seconds = 0.0

    def __init__(self, text: Sequence[int], lies: float, seed: int = 0) -> None:
        """:param text: prompt and answer; ``lies``: the share of tokens that are wrong"""
        self._text, self._lies = text, lies
        self._random = random.Random(seed)
        self._length = 0

    def follow(self, token_ids: Sequence[int]) -> int | None:
        self._length = len(token_ids)
        return 6

    def draft(self, count: int) -> Sequence[int]:
        ahead = self._text[self._length : self._length + count]
        ahead = [*ahead, *[7] * (count - len(ahead))]  # past the end anything goes
        return [token_id ^ (self._random.random() < self._lies) for token_id in ahead]

    def close(self) -> None:
        pass


def prophecies(text: Sequence[int], lies: float, sizes: Sequence[int] = (1, 3, 7), seed: int = 0) -> Drafting:
    """Return what drafts a known text, right and wrong."""
    drafting = Drafting(lambda: Prophet(text, lies, seed))
    drafting.pace = Eager(sizes, seed)
    return drafting


def eager(sizes: Sequence[int] = (1, 3, 7)) -> Drafting:
    """Return what drafts from the text itself, whenever it can."""
    drafting = Drafting()
    drafting.pace = Eager(sizes)
    return drafting
