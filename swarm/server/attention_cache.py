"""The attention cache of a session: keys and values of its tokens, for each of its blocks.

A block with a sliding window sees only the newest tokens, so it keeps only those, in a ring: a token's slot is its
position modulo the capacity. The capacity is the window and ``ROOM``. Tokens are written before they attend, so that is
how many may be computed at once, and how far a session can go back without computing tokens again; see ``Reach``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import swarm.compat  # noqa: F401

import torch

# As many tokens as this project's clients send at a time, and longer than most answers that are tried again.
ROOM = 512


@dataclass(frozen=True)
class CacheDescriptor:
    """What a session's cache is like. Petals' memory cache counts it, and has it allocated, as one tensor's."""

    windows: tuple[int | None, ...]  # of each block: how many tokens each token sees, up to itself; None: all
    rows: int  # sequences
    max_length: int  # of a sequence, tokens
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device
    room: int = ROOM

    def capacity(self, window: int | None) -> int:
        """Return of how many tokens a block with this window keeps keys and values."""
        return self.max_length if window is None else min(self.max_length, window - 1 + self.room)

    @property
    def longest(self) -> int:
        """How many tokens of a sequence may be computed at once."""
        whole = all(self.capacity(window) == self.max_length for window in self.windows)
        return self.max_length if whole else self.room

    @property
    def shapes(self) -> dict[int | None, tuple[int, ...]]:
        """The shape of the tensor of all blocks with the same window, by that window:
        [blocks, sequences, capacity, 2, key/value heads, head size]; keys, then values."""
        counts = {window: self.windows.count(window) for window in self.windows}
        rest = (2, self.kv_heads, self.head_size)
        return {window: (count, self.rows, self.capacity(window), *rest) for window, count in counts.items()}

    def numel(self) -> int:
        """Return the number of values."""
        return sum(map(math.prod, self.shapes.values()))

    def make_zeros(self) -> "AttentionCache":
        """Allocate the cache."""
        shapes = self.shapes.items()
        tensors = {window: torch.zeros(shape, dtype=self.dtype, device=self.device) for window, shape in shapes}
        return AttentionCache(self, tensors)


@dataclass(frozen=True, eq=False)
class SequenceCache:
    """One sequence's part of a session's cache."""

    # By window: [blocks, capacity, 2, key/value heads, head size]
    tensors: Mapping[int | None, torch.Tensor]
    places: Sequence[tuple[int | None, int]]  # of each block: its window, and its number among those that have the same
    max_length: int
    longest: int  # tokens that may be computed at once

    def slots(self, window: int | None, start: int, end: int) -> list[tuple[int, int]]:
        """Return where the blocks with this window keep tokens [start, end), see ``ring_slots``."""
        return ring_slots(start, end, self.tensors[window].shape[1])


class AttentionCache:
    """The cache of a session."""

    def __init__(self, descriptor: CacheDescriptor, tensors: Mapping[int | None, torch.Tensor]) -> None:
        """Make a cache of allocated memory.

        :param tensors: see ``CacheDescriptor.shapes``
        """
        self.descriptor = descriptor
        self.longest = descriptor.longest
        self._tensors = tensors
        windows = descriptor.windows
        places = tuple((window, windows[:number].count(window)) for number, window in enumerate(windows))
        rows = {window: tensor.unbind(1) for window, tensor in tensors.items()}
        self.sequences = [
            SequenceCache(
                {window: sequences[row] for window, sequences in rows.items()},
                places,
                descriptor.max_length,
                self.longest,
            )
            for row in range(descriptor.rows)
        ]

    def reorder(self, length: int, hypotheses: Sequence[int]) -> None:
        """Let each sequence go on from the first ``length`` tokens of another."""
        for tensor in self._tensors.values():
            used = tensor[:, :, :length]
            used.copy_(used[:, list(hypotheses)])

    def spread(self, start: int, end: int) -> None:
        """Give all sequences tokens [start, end) of the first."""
        for tensor in self._tensors.values():
            for first, last in ring_slots(start, end, tensor.shape[2]):
                tensor[:, 1:, first:last] = tensor[:, :1, first:last]


def ring_slots(start: int, end: int, capacity: int) -> list[tuple[int, int]]:
    """Return the slots [first, last) of tokens [start, end), in order: in two ranges if the ring begins anew."""
    first, last = start % capacity, (end - 1) % capacity + 1
    return [(first, last)] if first < last else [(first, capacity), (0, last)]


class Reach:
    """From which positions a session can go on: before them, what their tokens would see may be overwritten."""

    def __init__(self, descriptor: CacheDescriptor) -> None:
        self._room = descriptor.room
        windows = [window for window in descriptor.windows if window is not None]
        # Up to here, nothing is. Blocks with a longer window begin later, and then have the same reach.
        self._intact: int | None = min(windows) - 1 + descriptor.room if windows else None
        self.earliest = 0  # beside position 0, whose token sees nothing before it

    def allows(self, start: int) -> bool:
        """Whether the next token may have position ``start``, which is not beyond the session's."""
        return start == 0 or start >= self.earliest

    def advance(self, start: int, end: int) -> None:
        """Note that tokens [start, end) are written."""
        if start == 0:
            self.earliest = 0
        if self._intact is not None and end > self._intact:
            self.earliest = max(self.earliest, end - self._room)
