"""Compiled loops for decoding on a CPU, where calling a PyTorch operator costs more than its computation.

Between the matrix products of a decoding step are a dozen operators on a few thousand numbers, and attention over each
sequence's own keys and values. PyTorch takes ten to fifty microseconds for each, thirty times per token for each
sequence; these loops, compiled by Numba when a server starts, take one or two. They compute in float32 and round to
bfloat16 where PyTorch does.
"""

import functools
import logging
import math
from typing import Any

import swarm.compat  # noqa: F401

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload

from swarm.compiling import kept, typed
from swarm.families.attention import Scoring

log = logging.getLogger(__name__)

# float32: below this, exp() counts as zero; it would leave the range of normal numbers.
LOWEST_EXPONENT = -87.0


@intrinsic
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits_of_float(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """Convert an address to a pointer to values of the array ``like``'s type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate


def _load(values: Any, index: Any) -> Any:
    """Read a value of an array as float32. Arrays of int16 hold bfloat16, the upper half of a float32."""
    raise NotImplementedError


@overload(_load, inline="always")
def _load_compiled(values, index):  # type: ignore[no-untyped-def]  # Numba compares signatures
    if values.dtype == types.int16:
        return lambda values, index: _float_of_bits(np.uint32(np.uint16(values[index])) << np.uint32(16))
    return lambda values, index: values[index]


def _store(values: Any, index: Any, value: Any) -> None:
    """Write a float32; for an array of bfloat16, round it to the nearest one, ties to even."""
    raise NotImplementedError


@overload(_store, inline="always")
def _store_compiled(values, index, value):  # type: ignore[no-untyped-def]  # Numba compares signatures
    if values.dtype == types.int16:

        def store(values, index, value):  # type: ignore[no-untyped-def]
            bits = _bits_of_float(value)
            bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            values[index] = np.int16(bits >> np.uint32(16))

        return store

    def store_float(values, index, value):  # type: ignore[no-untyped-def]
        values[index] = value

    return store_float


_compile = functools.partial(
    kept, njit, nogil=True, fastmath={"reassoc", "nsz", "arcp", "contract", "afn"}, error_model="numpy"
)


@njit(inline="always", fastmath=True)
def _exp(x: Any) -> Any:
    """exp() as a polynomial, which the compiler turns into vector instructions (Cephes library, S. Moshier: expf)."""
    x = max(min(x, np.float32(88.0)), np.float32(LOWEST_EXPONENT))
    n = math.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * _float_of_bits(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))


@njit(inline="always")
def _ring_slot(position: Any, offset: Any, capacity: Any) -> Any:
    """Return position modulo capacity, for positions of [offset, offset + 2 * capacity): division would take longer.

    :param offset: a multiple of the capacity
    """
    slot = position - offset
    return slot - capacity if slot >= capacity else slot


def _attend(
    queries: Any,
    new: Any,
    addresses: Any,
    positions: Any,
    capacities: Any,
    biases: Any,
    scale: Any,
    window: Any,
    softcap: Any,
    sinks: Any,
    scores: Any,
    outputs: Any,
) -> None:
    # What is None costs nothing: a function of its own is compiled for each set of types.
    rows, kv_heads, group, size = queries.shape
    query = np.empty((group, size), np.float32)
    value = np.empty(size, np.float32)
    total = np.empty((group, size), np.float32)
    for row in range(rows):
        length = positions[row] + 1
        begin = 0
        if window is not None:
            begin = max(0, length - window)
        capacity, offset, last = length, 0, length - 1
        if capacities is not None:
            capacity = capacities[row]
            offset = begin - begin % capacity
            last %= capacity
        cache = carray(_pointer(addresses[row], new), (capacity, 2, kv_heads, size))
        cache[last] = new[row]
        for head in range(kv_heads):
            for g in range(group):
                for d in range(size):
                    query[g, d] = _load(queries[row, head, g], d) * scale
            for j in range(begin, length):
                slot = j
                if capacities is not None:
                    slot = _ring_slot(j, offset, capacity)
                keys = cache[slot, 0, head]
                for d in range(size):
                    value[d] = _load(keys, d)
                for g in range(group):
                    score = np.float32(0)
                    for d in range(size):
                        score += query[g, d] * value[d]
                    if biases is not None:
                        score += biases[head * group + g, j]
                    if softcap is not None:
                        score = softcap * np.tanh(score / softcap)
                    scores[g, j] = score
            for g in range(group):
                highest = scores[g, begin]
                for j in range(begin, length):
                    highest = max(highest, scores[g, j])
                weight = np.float32(0)
                if sinks is not None:
                    sink = sinks[head * group + g]
                    highest = max(highest, sink)
                    weight = _exp(sink - highest)
                for j in range(begin, length):
                    scores[g, j] = _exp(scores[g, j] - highest)
                    weight += scores[g, j]
                for j in range(begin, length):
                    scores[g, j] /= weight
            total[:] = 0
            for j in range(begin, length):
                slot = j
                if capacities is not None:
                    slot = _ring_slot(j, offset, capacity)
                values = cache[slot, 1, head]
                for d in range(size):
                    value[d] = _load(values, d)
                for g in range(group):
                    score = scores[g, j]
                    for d in range(size):
                        total[g, d] += score * value[d]
            for g in range(group):
                for d in range(size):
                    _store(outputs[row, head, g], d, total[g, d])


@functools.cache
def _attention(bfloat16: bool, ring: bool, biases: bool, window: bool, softcap: bool, sinks: bool) -> Any:
    """Return the compiled ``_attend`` for queries in bfloat16 or float32, and what is not None.

    Numba would compile another one for a single row, which is contiguous in memory where several may not be.
    """
    number, whole, real = types.int16 if bfloat16 else types.float32, types.int64, types.float32
    rows = types.Array(number, 4, "A")
    integers, reals = types.Array(whole, 1, "C"), types.Array(real, 1, "C")
    matrix, outputs = types.Array(real, 2, "C"), types.Array(number, 4, "C")
    optional = {integers: ring, matrix: biases}, {whole: window, real: softcap, reals: sinks}
    before, after = ([kind if there else types.none for kind, there in kinds.items()] for kinds in optional)
    return typed(_compile(_attend), (rows, rows, integers, integers, *before, real, *after, matrix, outputs))


@_compile
def _rotate(heads: Any, count: Any, cos: Any, sin: Any) -> None:
    half = heads.shape[2] // 2
    for token in range(heads.shape[0]):
        c, s = cos[token], sin[token]
        for head in range(count):
            x = heads[token, head]
            for d in range(half):
                low, high = _load(x, d), _load(x, d + half)
                _store(x, d, low * _load(c, d) + high * _load(s, d))
                _store(x, d + half, high * _load(c, d + half) + low * _load(s, d + half))


@_compile
def _norm(hidden: Any, weight: Any, epsilon: Any, outputs: Any) -> None:
    size = hidden.shape[1]
    for token in range(hidden.shape[0]):
        x, y = hidden[token], outputs[token]
        squares = np.float32(0)
        for d in range(size):
            value = _load(x, d)
            squares += value * value
        factor = np.float32(1) / np.sqrt(squares / np.float32(size) + epsilon)
        for d in range(size):
            _store(y, d, _load(x, d) * factor * _load(weight, d))


@_compile
def _gate(gate_up: Any, outputs: Any) -> None:
    size = outputs.shape[1]
    for token in range(outputs.shape[0]):
        x, y = gate_up[token], outputs[token]
        for d in range(size):
            gate = _load(x, d)
            _store(y, d, gate / (np.float32(1) + _exp(-gate)) * _load(x, d + size))


def array(tensor: torch.Tensor) -> np.ndarray:
    """Return the memory of a float32 or bfloat16 tensor, the latter as int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Attention:
    """Attention of a few new tokens, reading and writing the caches in place."""

    def __init__(self, biases: torch.Tensor | None, max_length: int, group: int) -> None:
        """Allocate the kernel's buffers.

        :param biases: [heads, max length]; what each head adds to the scores of keys by their position; None: nothing
        :param max_length: longest sequence, tokens
        :param group: query heads of each key/value head
        """
        self._biases = None if biases is None else biases.float().contiguous().numpy()
        self._scores = np.empty((group, max_length), np.float32)

    def __call__(
        self,
        queries: torch.Tensor,
        new: torch.Tensor,
        addresses: np.ndarray,
        positions: np.ndarray,
        scoring: Scoring,
        capacities: np.ndarray | None = None,
    ) -> torch.Tensor:
        """For each new token, write its key and value, and attend to all keys that it sees.

        :param queries: [tokens, key/value heads, query heads of each, head size]
        :param new: keys and values, [tokens, 2, key/value heads, head size]
        :param addresses: of each token's sequence's cache, [capacity, 2, key/value heads, head size] contiguous
        :param positions: of the tokens in their sequences; tokens of a sequence are in order
        :param capacities: of the sequences' caches, for each token: they are rings, and hold the window of each token,
            whose slots are positions modulo capacity; None: they hold all positions
        :returns: [tokens, heads times head size]
        """
        outputs = torch.empty(queries.shape, dtype=queries.dtype)
        softcap = None if scoring.softcap is None else np.float32(scoring.softcap)
        sinks = None if scoring.sinks is None else scoring.sinks.detach().float().numpy()
        attend = _attention(
            queries.dtype == torch.bfloat16,
            capacities is not None,
            self._biases is not None,
            scoring.window is not None,
            softcap is not None,
            sinks is not None,
        )
        attend(
            array(queries),
            array(new),
            addresses,
            positions,
            capacities,
            self._biases,
            np.float32(scoring.scale),
            scoring.window,
            softcap,
            sinks,
            self._scores,
            array(outputs),
        )
        return outputs.view(len(outputs), -1)


def rotate(heads: torch.Tensor, count: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate the first ``count`` of [tokens, heads, head size] in place.

    :param cos: [tokens, head size]
    :param sin: the same; its first half is negated, as the factor of the second half's values
    """
    _rotate(array(heads), count, array(cos), array(sin))


def norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the RMS norm of [tokens, hidden size]."""
    outputs = torch.empty_like(hidden)
    _norm(array(hidden), array(weight), np.float32(epsilon), array(outputs))
    return outputs


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of [tokens, gate and up]: [tokens, up]."""
    outputs = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _gate(array(gate_up), array(outputs))
    return outputs
