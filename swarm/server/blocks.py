"""Compute transformer blocks for many sequences at once, each with its own length and attention cache.

The tokens of a batch are concatenated in one matrix, so that every matrix product serves all sequences: one read of the
weights, which bounds the speed of decoding, makes a token for each sequence. Only attention is computed per sequence,
over keys and values written and read in place; nothing is padded or copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import swarm.compat  # noqa: F401

import numpy as np
import torch
from torch import nn

from swarm.families.attention import Scoring, attention, causal_mask
from swarm.server import kernels
from swarm.server.attention_cache import ROOM, CacheDescriptor, SequenceCache
from swarm.shape import head_size

# Parts of up to this many tokens use a loop, too: PyTorch takes longer for each part, and less for each token.
SHORT = 32


@dataclass(frozen=True)
class Part:
    """What one sequence adds to a batch: consecutive tokens."""

    cache: SequenceCache
    start: int  # position of the first token
    length: int  # tokens
    prompts: Sequence[torch.Tensor | None] | None = None  # deep prompts to add before each block: [tokens, hidden size]

    def __post_init__(self) -> None:
        # The kernels write to raw addresses: only this check keeps them inside the cache. And one position that is
        # not an integer would turn all positions of the batch into floats.
        if not (type(self.start) is type(self.length) is int):
            raise ValueError(f"length {self.length!r} and position {self.start!r} must be integers")
        if not (0 <= self.start and 1 <= self.length and self.end <= self.cache.max_length):
            raise ValueError(f"tokens {self.start}-{self.end} do not fit {self.cache.max_length}")
        if self.length > self.cache.longest:  # the first of them would no longer be there when they attend
            raise ValueError(f"{self.length} tokens are more than the {self.cache.longest} that may be written at once")

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.length

    def first_seen(self, window: int | None) -> int:
        """Return the first position that its tokens see."""
        return 0 if window is None else max(0, self.start + 1 - window)


class Batch:
    """The parts of one batch, prepared for all blocks. Tokens are in the order of the parts."""

    def __init__(
        self,
        parts: Sequence[Part],
        first: int,
        mask: Callable[[Part, int | None], torch.Tensor | None],
        attention: kernels.Attention | None,
    ) -> None:
        """Prepare a batch.

        :param first: first block of the caches
        :param mask: see ``RaggedBlocks.mask``
        :param attention: computes short parts that come first; None: PyTorch computes all parts
        """
        self._first = first
        self.positions = np.concatenate([np.arange(part.start, part.end) for part in parts])  # [tokens]
        self._places = parts[0].cache.places
        self._attention = attention
        count = 0
        while attention is not None and count < len(parts) and parts[count].length <= SHORT:
            count += 1
        short, self._others = parts[:count], parts[count:]
        self._short = sum(part.length for part in short)  # tokens
        self._sizes = [part.length for part in self._others]
        self._mask = mask
        windows = parts[0].cache.tensors  # of the blocks
        self._addresses = {window: _Addresses.of(short, window) for window in windows if short}
        self._slots = {window: _Slots.of(self._others, window) for window in windows if self._others}
        self._views: dict[int | None, list[_View]] = {}  # by the layers' window

    def attend(self, block: int, queries: torch.Tensor, new: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Write new keys and values to the caches, and attend to all that the tokens see.

        :param block: its number in the span
        :param queries: [tokens, key/value heads, query heads of each, head size]
        :param new: keys and values, [tokens, 2, key/value heads, head size]
        :returns: [tokens, heads times head size]
        """
        short = self._short
        window, index = self._places[block - self._first]
        if scoring.window != window:  # the cache may not hold what the block sees
            raise ValueError(f"block {block} has a window of {scoring.window}, and its cache one of {window}")
        outputs = []
        if self._attention is not None and short:
            caches, positions = self._addresses[window], self.positions[:short]
            where = caches.addresses[index], positions, scoring, caches.capacities
            outputs.append(self._attention(queries[:short], new[:short], *where))
        if self._sizes:
            outputs += self._attend_by_torch(index, queries[short:], new[short:], scoring)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_by_torch(
        self, index: int, queries: torch.Tensor, new: torch.Tensor, scoring: Scoring
    ) -> list[torch.Tensor]:
        """Compute part by part. Query heads that share a key/value head become further queries of it, so that it need
        not be copied."""
        slots = self._slots[scoring.window]
        torch._foreach_copy_(slots.views[index], new.split(slots.sizes))
        if scoring.window not in self._views:
            self._views[scoring.window] = [self._view(part, scoring.window) for part in self._others]
        outputs = []
        for query, view in zip(queries.split(self._sizes), self._views[scoring.window], strict=True):
            length, heads, group, size = query.shape
            query = query.permute(1, 2, 0, 3).reshape(1, heads, group * length, size)
            output = attention(query, joined(view.keys[index]), joined(view.values[index]), view.mask, scoring)
            outputs.append(output.view(heads, group, length, size).permute(2, 0, 1, 3).reshape(length, -1))
        return outputs

    def _view(self, part: Part, window: int | None) -> "_View":
        slots = part.cache.slots(window, part.first_seen(window), part.end)
        past = [part.cache.tensors[window][:, first:last].unsqueeze(1) for first, last in slots]
        keys = zip(*(tokens[:, :, :, 0].transpose(2, 3).unbind(0) for tokens in past), strict=True)
        values = zip(*(tokens[:, :, :, 1].transpose(2, 3).unbind(0) for tokens in past), strict=True)
        return _View(list(keys), list(values), self._mask(part, window))


@dataclass(frozen=True)
class _Addresses:
    """Where the tokens of a batch have their sequences' caches, in blocks with the same window."""

    addresses: np.ndarray  # [blocks, tokens]
    capacities: np.ndarray | None  # [tokens]; None: there is no window, and each position has its slot

    @classmethod
    def of(cls, parts: Sequence[Part], window: int | None) -> "_Addresses":
        lengths, caches = [part.length for part in parts], [part.cache.tensors[window] for part in parts]
        starts = np.array([cache.data_ptr() for cache in caches])
        strides = np.array([cache.stride(0) * cache.element_size() for cache in caches])
        addresses = np.repeat(starts + np.arange(len(caches[0]))[:, None] * strides, lengths, axis=1)
        capacities = None if window is None else np.repeat([cache.shape[1] for cache in caches], lengths)
        return cls(addresses, capacities)


@dataclass(frozen=True)
class _Slots:
    """Where the tokens of a batch are written, in blocks with the same window."""

    views: Sequence[tuple[torch.Tensor, ...]]  # of each block: [tokens, 2, key/value heads, head size] each
    sizes: Sequence[int]  # tokens of each view

    @classmethod
    def of(cls, parts: Sequence[Part], window: int | None) -> "_Slots":
        slots = [(part, slots) for part in parts for slots in part.cache.slots(window, part.start, part.end)]
        # Make the views for all blocks in one call: one per block and sequence would cost more than attention.
        views = [part.cache.tensors[window][:, first:last].unbind(0) for part, (first, last) in slots]
        return cls(list(zip(*views, strict=True)), [last - first for _, (first, last) in slots])


@dataclass(frozen=True)
class _View:
    """What the tokens of a part see of their sequence, for all blocks that see it alike."""

    # Of each block: [1, key/value heads, tokens, head size], in one piece or, where a ring begins anew, in two.
    keys: Sequence[Sequence[torch.Tensor]]
    values: Sequence[Sequence[torch.Tensor]]
    mask: torch.Tensor | None  # see ``RaggedBlocks.mask``


def joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return [..., tokens, size] of pieces, without copying a single one."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=-2)


class RaggedBlocks:
    """The blocks of a server's span. Subclasses implement the model families, see ``swarm.server.families``."""

    block_type: type[nn.Module]  # petals' class of the family's blocks
    room = ROOM  # of the caches of blocks with a window, tokens

    @classmethod
    def accepts(cls, blocks: Sequence[nn.Module], config: Any) -> bool:
        """Whether this class can compute these blocks, which are of the family's type."""
        raise NotImplementedError

    def __init__(self, blocks: Sequence[Any], config: Any, dtype: torch.dtype, max_length: int) -> None:
        """Prepare the blocks. Petals can still use them: the weights are shared.

        :param max_length: of a sequence, tokens
        """
        self.blocks = blocks
        self.config = config
        self.dtype = dtype
        self.max_length = max_length
        self.device = next(blocks[0].parameters()).device
        self.kv_heads = config.num_attention_heads // config.num_key_value_groups
        self.group = config.num_key_value_groups
        self.head_size = head_size(config)
        # How many tokens each token sees in each block, up to itself; None: all.
        self.windows: tuple[int | None, ...] = (None,) * len(blocks)
        self._attention: kernels.Attention | None = None
        if self.device.type == "cpu":
            self._attention = kernels.Attention(self.biases(), max_length, self.group)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compute each kind of batch once, to compile kernels and allocate memory before requests come."""
        length = min(SHORT + 1, self.max_length)
        caches = self.cache_descriptor(0, len(self.blocks), 2, length).make_zeros().sequences
        hidden = torch.zeros(length, self.config.hidden_size, dtype=self.dtype, device=self.device)
        self.forward(hidden, [Part(caches[0], 0, length)], 0, len(self.blocks))
        for rows in (1, 2):  # several rows are not contiguous in memory: kernels are compiled again for them
            self.forward(hidden[:rows], [Part(cache, 0, 1) for cache in caches[:rows]], 0, len(self.blocks))

    def cache_descriptor(self, first: int, last: int, batch_size: int, max_length: int) -> CacheDescriptor:
        """Describe the attention cache of a session of blocks [first, last); it takes no more memory than petals' own.

        :param batch_size: sequences
        :param max_length: of each sequence, tokens
        """
        windows, sizes = self.windows[first:last], (self.kv_heads, self.head_size)
        return CacheDescriptor(windows, batch_size, max_length, *sizes, self.dtype, self.device, self.room)

    def forward(self, hidden: torch.Tensor, parts: Sequence[Part], first: int, last: int) -> torch.Tensor:
        """Compute blocks [first, last) of the span, numbered from 0.

        :param hidden: [tokens, hidden size], the parts' tokens, concatenated
        :returns: the same shape; the caches hold the keys and values of the new tokens
        """
        batch = Batch(parts, first, self.mask, self._attention)
        context = self.context(batch)
        for block in range(first, last):
            add_prompts(hidden, parts, block - first)
            hidden = self.compute(block, hidden, batch, context)
        return hidden

    def biases(self) -> torch.Tensor | None:
        """Return what each head adds to its scores for each position of a key: [heads, max length]; None: nothing."""
        return None

    def mask(self, part: Part, window: int | None) -> torch.Tensor | None:
        """Return what is added to a part's attention scores, or None for nothing.

        :param window: how many tokens each token sees, up to itself; None: all
        :returns: broadcastable to [1, key/value heads, query heads of each times tokens, tokens up to the last], from
            the first that any of them sees
        """
        if part.length == 1:
            return None
        first = part.first_seen(window)
        mask = causal_mask(part.start, part.length, window, self.dtype, self.device, first)
        return mask.repeat(self.group, 1)

    def context(self, batch: Batch) -> Any:
        """Return data of a batch that all blocks share."""
        raise NotImplementedError

    def compute(self, number: int, hidden: torch.Tensor, batch: Batch, context: Any) -> torch.Tensor:
        """Compute one block, given its number in the span."""
        raise NotImplementedError


def add_prompts(hidden: torch.Tensor, parts: Sequence[Part], index: int) -> None:
    """Add the deep prompts of block ``index`` to the first tokens of each part that has some, in place."""
    offset = 0
    for part in parts:
        if part.prompts is not None and (prompt := part.prompts[index]) is not None:
            count = min(part.length, prompt.shape[0])
            hidden[offset : offset + count] += prompt[:count]
        offset += part.length
