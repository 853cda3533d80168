"""Transformer blocks computed for many sequences at once, each with its own length and its own attention cache.

The tokens of a batch stand one after the other in one matrix, so that every matrix product serves all sequences: one
reading of the weights, which is what decoding waits for, makes a token for each of them. Only attention is computed per
sequence, over keys and values that are written and read where they are; nothing is padded and nothing is copied.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import swarm.compat  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from hivemind import TensorDescriptor
from petals.models.bloom.block import WrappedBloomBlock
from petals.models.llama.block import WrappedLlamaBlock
from torch import nn
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaDynamicNTKScalingRotaryEmbedding

from swarm.packed_linear import PackedLinear, fuse
from swarm.server import kernels

# Beyond so many rows PyTorch's gate, which uses all cores, is faster than a loop that uses one.
KERNEL_ROWS = 32
# Parts of so many tokens are computed by a loop as well: PyTorch takes longer for each part, and less for each token.
SHORT = 32


@dataclass(frozen=True)
class Part:
    """What one sequence adds to a batch: some tokens that follow each other."""

    cache: torch.Tensor  # the sequence's: [blocks, max length, 2, key/value heads, head size]; keys, then values
    start: int  # position of the first token
    length: int  # tokens
    prompts: Sequence[torch.Tensor | None] | None = None  # deep prompts to add before each block: [tokens, hidden size]

    def __post_init__(self) -> None:
        # The kernels write to addresses: nothing but this keeps them inside of the cache. And one position that is no
        # integer would make all of a batch floats.
        if not (type(self.start) is type(self.length) is int):
            raise ValueError(f"{self.length!r} tokens from position {self.start!r} are not told by integers")
        if not (0 <= self.start and 1 <= self.length and self.start + self.length <= self.cache.shape[1]):
            raise ValueError(f"tokens {self.start}-{self.start + self.length} do not fit {self.cache.shape[1]}")


class Batch:
    """The parts of one batch, prepared for all blocks. Their tokens follow each other in the order of the parts."""

    def __init__(
        self,
        parts: Sequence[Part],
        first: int,
        mask: Callable[[Part], torch.Tensor | None],
        attention: kernels.Attention | None,
    ) -> None:
        """Prepare a batch.

        :param first: the block that the caches begin with
        :param mask: see ``RaggedBlocks.mask``
        :param attention: computes short parts, if they come first; None: all parts are computed by PyTorch
        """
        self._first = first
        self.positions = np.concatenate([np.arange(part.start, part.start + part.length) for part in parts])  # [tokens]
        self._attention = attention
        count = 0
        while attention is not None and count < len(parts) and parts[count].length <= SHORT:
            count += 1
        short, others = parts[:count], parts[count:]
        self._short = sum(part.length for part in short)  # tokens
        if short:
            lengths = [part.length for part in short]
            starts = np.array([part.cache.data_ptr() for part in short])
            strides = np.array([part.cache.stride(0) * part.cache.element_size() for part in short])
            caches = starts + np.arange(len(short[0].cache))[:, None] * strides
            self._addresses = np.repeat(caches, lengths, axis=1)  # [blocks, tokens]
        self._sizes = [part.length for part in others]
        self._masks = [mask(part) for part in others]
        # One call makes the views for all blocks: a call for each block and sequence would cost more than attention.
        slots = [part.cache[:, part.start : part.start + part.length].unbind(0) for part in others]
        self._slots = list(zip(*slots, strict=True))
        past = [part.cache[:, : part.start + part.length].unsqueeze(1) for part in others]
        self._keys = [cache[:, :, :, 0].transpose(2, 3).unbind(0) for cache in past]
        self._values = [cache[:, :, :, 1].transpose(2, 3).unbind(0) for cache in past]

    def attend(self, block: int, queries: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Write new keys and values to the caches, and attend to all that are there.

        :param block: its number in the span
        :param queries: [tokens, key/value heads, query heads of each, head size]
        :param new: keys and values, [tokens, 2, key/value heads, head size]
        :returns: [tokens, hidden size]
        """
        index, short = block - self._first, self._short
        outputs = []
        if self._attention is not None and short:
            addresses, positions = self._addresses[index], self.positions[:short]
            outputs.append(self._attention(queries[:short], new[:short], addresses, positions))
        if self._sizes:
            outputs += self._attend_by_torch(index, queries[short:], new[short:])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_by_torch(self, index: int, queries: torch.Tensor, new: torch.Tensor) -> list[torch.Tensor]:
        """Compute part by part. Query heads that share a key/value head are computed as further queries of it, which
        needs no copy of it."""
        torch._foreach_copy_(self._slots[index], new.split(self._sizes))
        outputs = []
        parts = zip(queries.split(self._sizes), self._keys, self._values, self._masks, strict=True)
        for query, keys, values, mask in parts:
            length, heads, group, size = query.shape
            query = query.permute(1, 2, 0, 3).reshape(1, heads, group * length, size)
            output = F.scaled_dot_product_attention(query, keys[index], values[index], attn_mask=mask)
            outputs.append(output.view(heads, group, length, size).permute(2, 0, 1, 3).reshape(length, -1))
        return outputs


def causal_mask(part: Part, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what to add to attention scores so that no token sees a later one: [tokens, tokens up to the last]."""
    allowed = torch.ones(part.length, part.start + part.length, dtype=torch.bool, device=device).tril(part.start)
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, -math.inf)


class RaggedBlocks:
    """The blocks of a server's span. Subclasses know the families' mathematics."""

    block_type: type[nn.Module]

    def __init__(self, blocks: Sequence[Any], config: Any, dtype: torch.dtype, max_length: int) -> None:
        """Prepare the blocks. Petals can go on using them: the weights are shared.

        :param max_length: of a sequence, tokens
        """
        self.blocks = blocks
        self.config = config
        self.dtype = dtype
        self.max_length = max_length
        self.device = next(blocks[0].parameters()).device
        self.kv_heads = config.num_attention_heads // config.num_key_value_groups
        self.group = config.num_key_value_groups
        self.head_size = config.hidden_size // config.num_attention_heads
        self._attention: kernels.Attention | None = None
        if self.device.type == "cpu":
            self._attention = kernels.Attention(self.slopes(), max_length, self.group, self.head_size)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compute something of each kind, so that kernels are compiled and memory is there before anybody waits."""
        length = min(SHORT + 1, self.max_length)
        caches = self.cache_descriptor(len(self.blocks), 2, length).make_zeros().unbind(1)
        hidden = torch.zeros(length, self.config.hidden_size, dtype=self.dtype, device=self.device)
        self.forward(hidden, [Part(caches[0], 0, length)], 0, len(self.blocks))
        for rows in (1, 2):  # kernels are compiled anew for several rows, whose memory is not contiguous
            self.forward(hidden[:rows], [Part(cache, 0, 1) for cache in caches[:rows]], 0, len(self.blocks))

    def cache_descriptor(self, num_blocks: int, batch_size: int, max_length: int) -> TensorDescriptor:
        """Describe the attention cache of a session of ``num_blocks`` blocks; it takes as much memory as petals' own.

        Its shape is [blocks, sequences, max length, 2, key/value heads, head size].
        """
        shape = (num_blocks, batch_size, max_length, 2, self.kv_heads, self.head_size)
        return TensorDescriptor(shape, dtype=self.dtype, device=self.device)

    def forward(self, hidden: torch.Tensor, parts: Sequence[Part], first: int, last: int) -> torch.Tensor:
        """Compute blocks [first, last) of the span, numbered from 0.

        :param hidden: [tokens, hidden size], the parts' tokens one after the other
        :returns: the same shape; the caches hold the keys and values of the new tokens
        """
        batch = Batch(parts, first, self.mask, self._attention)
        context = self.context(batch)
        for block in range(first, last):
            add_prompts(hidden, parts, block - first)
            hidden = self.compute(block, hidden, batch, context)
        return hidden

    def slopes(self) -> torch.Tensor:
        """Return what each head adds to its scores for each position of a key: [heads]."""
        raise NotImplementedError

    def mask(self, part: Part) -> torch.Tensor | None:
        """Return what is added to a part's attention scores, broadcastable to
        [1, key/value heads, queries, tokens up to the last], or None for nothing."""
        raise NotImplementedError

    def context(self, batch: Batch) -> Any:
        """Return what all blocks need to know of a batch."""
        raise NotImplementedError

    def compute(self, number: int, hidden: torch.Tensor, batch: Batch, context: Any) -> torch.Tensor:
        """Compute one block, given its number in the span."""
        raise NotImplementedError


def add_prompts(hidden: torch.Tensor, parts: Sequence[Part], index: int) -> None:
    """Add the deep prompts of block ``index`` to the first tokens of the parts that have some, in place."""
    offset = 0
    for part in parts:
        if part.prompts is not None and (prompt := part.prompts[index]) is not None:
            count = min(part.length, prompt.shape[0])
            hidden[offset : offset + count] += prompt[:count]
        offset += part.length


class BloomBlocks(RaggedBlocks):
    """BLOOM: attention with linear biases (ALiBi, https://arxiv.org/abs/2108.12409) on the keys' positions."""

    block_type = WrappedBloomBlock

    def __init__(self, blocks: Sequence[Any], config: Any, dtype: torch.dtype, max_length: int) -> None:
        super().__init__(blocks, config, dtype, max_length)
        self._projections = [
            (
                fuse(block.self_attention, "query_key_value"),
                fuse(block.self_attention, "dense"),
                fuse(block.mlp, "dense_h_to_4h"),
                fuse(block.mlp, "dense_4h_to_h"),
            )
            for block in blocks
        ]
        ones = torch.ones(1, max_length, device=self.device)
        self._alibi = build_alibi_tensor(ones, config.num_attention_heads, dtype)[None]  # [1, heads, 1, max length]

    def slopes(self) -> torch.Tensor:
        # Those of position 1.
        return build_alibi_tensor(torch.ones(1, 2), self.config.num_attention_heads, torch.float32)[:, 0, 1]

    def mask(self, part: Part) -> torch.Tensor:
        alibi = self._alibi[..., : part.start + part.length]
        return alibi if part.length == 1 else alibi + causal_mask(part, self.dtype, self.device)

    def context(self, batch: Batch) -> None:
        return None

    def compute(self, number: int, hidden: torch.Tensor, batch: Batch, context: None) -> torch.Tensor:
        block: Any = self.blocks[number]
        query_key_value, dense, up, down = self._projections[number]
        post_norm = block.apply_residual_connection_post_layernorm
        normed = block.input_layernorm(hidden)
        # The checkpoints keep query, key and value of one head together.
        fused = query_key_value(normed).view(-1, self.kv_heads, 3, self.head_size)
        attended = batch.attend(number, fused[:, :, :1], fused[:, :, 1:].transpose(1, 2))
        hidden = dense(attended).add_(normed if post_norm else hidden)
        normed = block.post_attention_layernorm(hidden)
        return down(F.gelu(up(normed), approximate="tanh")).add_(normed if post_norm else hidden)


class LlamaBlocks(RaggedBlocks):
    """Llama: rotary positions (RoPE, https://arxiv.org/abs/2104.09864), RMS norms, grouped queries, gated MLP."""

    block_type = WrappedLlamaBlock

    def __init__(self, blocks: Sequence[Any], config: Any, dtype: torch.dtype, max_length: int) -> None:
        super().__init__(blocks, config, dtype, max_length)
        self._projections = [
            (
                fuse(block.self_attn, "q_proj", "k_proj", "v_proj"),
                fuse(block.self_attn, "o_proj"),
                fuse(block.mlp, "gate_proj", "up_proj"),
                fuse(block.mlp, "down_proj"),
            )
            for block in blocks
        ]
        rotary: Any = blocks[0].self_attn.rotary_emb
        cos, sin = rotary(torch.empty(0, dtype=dtype, device=self.device), seq_len=max_length)
        half = self.head_size // 2
        self._cos = cos[0, 0, :max_length]  # [max length, head size]
        # With the signs of the rotation in it, what is left to do is to swap the halves.
        self._sin = torch.cat([-sin[0, 0, :max_length, :half], sin[0, 0, :max_length, half:]], dim=-1)

    def slopes(self) -> torch.Tensor:
        return torch.zeros(self.config.num_attention_heads)

    def mask(self, part: Part) -> torch.Tensor | None:
        if part.length == 1:
            return None
        return causal_mask(part, self.dtype, self.device).repeat(self.group, 1)

    def context(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.from_numpy(batch.positions).to(self.device)
        return self._cos[positions], self._sin[positions]

    def compute(
        self, number: int, hidden: torch.Tensor, batch: Batch, context: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        block: Any = self.blocks[number]
        heads, kv_heads, size = self.kv_heads * self.group, self.kv_heads, self.head_size
        query_key_value, output, gate_up, down = self._projections[number]
        projected = query_key_value(norm(block.input_layernorm, hidden)).view(-1, heads + 2 * kv_heads, size)
        rotate(projected, heads + kv_heads, *context)
        queries = projected[:, :heads].unflatten(1, (kv_heads, self.group))
        attended = batch.attend(number, queries, projected[:, heads:].unflatten(1, (2, kv_heads)))
        hidden = output(attended).add_(hidden)
        return down(gate(gate_up(norm(block.post_attention_layernorm, hidden)))).add_(hidden)


def norm(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Compute an RMS norm (https://arxiv.org/abs/1910.07467)."""
    if hidden.device.type == "cpu":
        return kernels.norm(hidden, layer.weight, layer.variance_epsilon)
    return F.rms_norm(hidden, layer.weight.shape, layer.weight, layer.variance_epsilon)


def rotate(heads: torch.Tensor, count: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate queries and keys, the first ``count`` of [tokens, heads, head size], in place."""
    if heads.device.type == "cpu":
        kernels.rotate(heads, count, cos, sin)
        return
    heads = heads[:, :count]
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    torch.addcmul(heads * cos[:, None], swapped, sin[:, None], out=heads)


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute the gated unit (SwiGLU, https://arxiv.org/abs/2002.05202) of [tokens, gate and up]."""
    if gate_up.device.type == "cpu" and len(gate_up) <= KERNEL_ROWS:
        return kernels.gate(gate_up)
    gates, ups = gate_up.chunk(2, dim=-1)
    return F.silu(gates) * ups


def make_ragged_blocks(modules: Sequence[Any], config: Any, dtype: torch.dtype, max_length: int) -> RaggedBlocks | None:
    """Return the blocks of a server for batches, or None if they can only be computed by petals.

    That is so for other families, quantised weights, adapters, and weights split over devices or into slices.

    :param modules: what petals has loaded, wrapped in ``TensorParallel``
    """
    shards = [module.module_shards for module in modules]
    if any(len(blocks) != 1 for blocks in shards) or getattr(config, "pretraining_tp", 1) != 1:
        return None
    if getattr(config, "hidden_act", "silu") != "silu":
        return None
    blocks = [blocks[0] for blocks in shards]
    for family in (BloomBlocks, LlamaBlocks):
        if all(type(block) is family.block_type and is_plain(block) for block in blocks):
            ragged = family(blocks, config, dtype, max_length)
            let_go_of_files(blocks)
            return ragged
    return None


def let_go_of_files(blocks: Sequence[nn.Module]) -> None:
    """Copy what packing has left of the blocks' weights, if it has taken the large ones.

    Where a checkpoint has the dtype that is computed in, the weights are its file, mapped into memory: as long as one
    norm of a block is in there, so are all the weights that were packed, for a second time.
    """
    for block in blocks:
        if any(isinstance(module, PackedLinear) and module.packed is not None for module in block.modules()):
            for tensor in (*block.parameters(), *block.buffers()):
                tensor.data = tensor.data.clone()


def is_plain(block: nn.Module) -> bool:
    """Whether a block has the layers that it was published with, and nothing that depends on a sequence's length."""
    kinds = {type(module) for module in block.modules()}
    return LlamaDynamicNTKScalingRotaryEmbedding not in kinds and not any(
        issubclass(kind, nn.Linear) and kind is not nn.Linear for kind in kinds
    )
