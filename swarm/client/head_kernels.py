"""Compiled loops over the rows of a head's weights: to quantise them, to score them all, to compute some exactly.

PyTorch's product of int8 weights takes bfloat16 inputs and rounds what it returns to bfloat16, and is slow for 16 rows.
Here inputs are whole numbers of 15 bits, so that the sums of products are whole numbers too and have no error at all.
"""

import logging
import platform
from functools import partial
from typing import Any

import swarm.compat  # noqa: F401

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from swarm.compiling import kept

log = logging.getLogger(__name__)

BLOCK = 256  # columns that share a scale: a row's largest weight does not spoil its others
LANES = 16  # columns that are multiplied at a time; BLOCK and the length of a row are multiples of it
GROUP = 16  # rows that are scored together; the number of rows is a multiple of it
MAX_CODE = 127
# A block's sum of products must not leave an int32: 256 * 127 * 32767 is half of its range.
MAX_INPUT = 32767

SUMS = LANES // 2  # of neighbours, each added up on its own to the end of a row
I8, I16, I32, I64, F32 = *(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType()
WHOLE, REAL = ir.VectorType(I32, SUMS), ir.VectorType(F32, SUMS)


def _has_avx2() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and bool(llvmlite.binding.get_host_cpu_features().get("avx2"))


def _multiply_add(builder: Any, one: Any, other: Any) -> Any:
    """Multiply whole numbers of 16 bits and add neighbours: 16 of them become 8 of 32 bits."""
    if _has_avx2():
        kind = ir.FunctionType(WHOLE, [one.type, other.type])
        instruction = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
        return builder.call(instruction, [one, other])
    wide = ir.VectorType(I32, LANES)
    product = builder.mul(builder.sext(one, wide), builder.sext(other, wide))
    none = ir.Constant(wide, ir.Undefined)
    parts = [
        builder.shuffle_vector(product, none, ir.Constant(WHOLE, list(range(start, LANES, 2)))) for start in (0, 1)
    ]
    return builder.add(*parts)


def _pointer(builder: Any, kind: Any, size: int, base: Any, *offsets: Any) -> Any:
    """Return a pointer to a value so many values of a size behind an address; an offset may be (stride, how often)."""
    for offset in offsets:
        if isinstance(offset, tuple):
            offset = builder.mul(offset[0], ir.Constant(I64, offset[1]))
        base = builder.add(base, builder.mul(offset, ir.Constant(I64, size)))
    return builder.inttoptr(base, kind.as_pointer())


def _load_at(builder: Any, kind: Any, size: int, base: Any, *offsets: Any) -> Any:
    loaded = builder.load(_pointer(builder, kind, size, base, *offsets))
    loaded.align = size
    return loaded


def _sum_products(builder: Any, rows: int, inputs: int, codes: Any, values: Any, columns: Any) -> list[Any]:
    """Write a loop over columns; return, row by row, vectors of whole numbers whose sum is a row's times an input's.

    :param codes: address, and bytes per row; ``values``: address, and numbers per row
    """
    position = cgutils.alloca_once(builder, I64)
    builder.store(ir.Constant(I64, 0), position)
    sums = [cgutils.alloca_once(builder, WHOLE) for _ in range(rows * inputs)]
    for slot in sums:
        builder.store(ir.Constant(WHOLE, [0] * SUMS), slot)
    loop, done = builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.load(position)
    narrow = [_load_at(builder, ir.VectorType(I8, LANES), 1, codes[0], (codes[1], row), at) for row in range(rows)]
    weights = [builder.sext(codes_, ir.VectorType(I16, LANES)) for codes_ in narrow]
    for number in range(inputs):
        value = _load_at(builder, ir.VectorType(I16, LANES), 2, values[0], (values[1], number), at)
        for row in range(rows):
            slot = sums[row * inputs + number]
            builder.store(builder.add(builder.load(slot), _multiply_add(builder, weights[row], value)), slot)
    at = builder.add(at, ir.Constant(I64, LANES))
    builder.store(at, position)
    builder.cbranch(builder.icmp_signed("<", at, columns), loop, done)
    builder.position_at_end(done)
    return [builder.load(slot) for slot in sums]


def _spread(builder: Any, value: Any) -> Any:
    """Return a vector of the same number."""
    nothing = ir.Constant(REAL, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(WHOLE, [0] * SUMS))


def _tile(rows: int, inputs: int) -> Any:
    """Return a function that multiplies a block of some rows of weights by some inputs, and adds to their totals.

    Its arguments: address and bytes per row of the codes, int8; address and numbers per row of the inputs, int16; how
    many columns, at least LANES and a multiple of it; address and numbers per row of the codes' scales, and of the
    inputs' steps, float32; address of the totals, [rows, inputs, SUMS] float32, and numbers between two rows of them.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, values, columns, scales, steps, totals = (
            arguments[:2], arguments[2:4], arguments[4], arguments[5:7], arguments[7:9], arguments[9:]
        )  # fmt: skip
        sums = _sum_products(builder, rows, inputs, codes, values, columns)
        for row in range(rows):
            scale = _load_at(builder, F32, 4, scales[0], (scales[1], row))
            for number in range(inputs):
                step = builder.fmul(scale, _load_at(builder, F32, 4, steps[0], (steps[1], number)))
                more = builder.fmul(_spread(builder, step), builder.sitofp(sums[row * inputs + number], REAL))
                place = (totals[0], (totals[1], row), ir.Constant(I64, number * SUMS))
                total = builder.fadd(_load_at(builder, REAL, 4, *place), more)
                builder.store(total, _pointer(builder, REAL, 4, *place)).align = 4
        return context.get_dummy_value()

    def tile(  # type: ignore[no-untyped-def]  # Numba counts the arguments
        typing_context, codes, row_bytes, values, row_values, columns, scales, row_scales, steps, row_steps, totals, row
    ):
        return types.void(*[types.int64] * 11), generate

    return intrinsic(tile)


# Rows and inputs at a time; more need more registers than AVX2 has.
ROWS, INPUTS = 4, 2
_tile_of_one, _tile_of_some = _tile(ROWS, 1), _tile(ROWS, INPUTS)


_compile = partial(kept, njit, nogil=True, error_model="numpy")


@_compile
def score_rows(codes, scales, values, steps, first, last, scores):  # type: ignore[no-untyped-def]
    """Multiply all inputs by the quantised rows [first, last), both multiples of GROUP.

    :param codes: [padded rows, padded columns], int8
    :param scales: [padded rows, blocks], float32
    :param values: [m, padded columns], int16
    :param steps: [m, blocks], float32
    :param scores: [m, padded rows], float32, is written
    """
    count, columns = values.shape
    blocks = scales.shape[1]
    totals = np.empty((GROUP, count, SUMS), np.float32)
    for group in range(first, last, GROUP):
        totals[:] = 0
        for block in range(blocks):
            start = block * BLOCK
            width = min(BLOCK, columns - start)
            for row in range(group, group + GROUP, ROWS):
                weights = codes.ctypes.data + row * columns + start
                scale = scales.ctypes.data + 4 * (row * blocks + block)
                for number in range(0, count, INPUTS):
                    value = values.ctypes.data + 2 * (number * columns + start)
                    step = steps.ctypes.data + 4 * (number * blocks + block)
                    total = totals.ctypes.data + 4 * SUMS * ((row - group) * count + number)
                    tile = (weights, columns, value, columns, width, scale, blocks, step, blocks, total, SUMS * count)
                    if number + INPUTS <= count:
                        _tile_of_some(*tile)
                    else:
                        _tile_of_one(*tile)
        for row in range(GROUP):
            for number in range(count):
                scores[number, group + row] = totals[row, number].sum()


@intrinsic
def _float_of_half(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def _load(values: Any, column: Any) -> Any:
    """Read a weight as float32. Arrays of int16 hold bfloat16, those of uint16 float16."""
    raise NotImplementedError


@overload(_load, inline="always")
def _load_compiled(values, column):  # type: ignore[no-untyped-def]  # Numba compares signatures
    if values.dtype == types.int16:
        return lambda values, column: _float_of_bits(np.uint32(np.uint16(values[column])) << np.uint32(16))
    if values.dtype == types.uint16:
        return lambda values, column: _float_of_half(values[column])
    return lambda values, column: values[column]


DOT_ROWS, DOT_COLUMNS = 4, 512  # weights that stay in the nearest cache while all inputs meet them


@partial(_compile, fastmath={"reassoc", "contract"})
def dot_rows(weights, ids, values, dots):  # type: ignore[no-untyped-def]
    """Compute products of some rows, in float64 and rounded once.

    A row's product with an input has the same bits whichever rows and inputs are beside it: one loop computes it, in
    one order.

    :param weights: [rows, columns], see ``_load``
    :param ids: [n], which rows
    :param values: [m, columns], float64
    :param dots: [m, n], float32, is written
    """
    count, columns = values.shape
    part = np.empty((DOT_ROWS, DOT_COLUMNS), np.float64)
    total = np.empty((DOT_ROWS, count), np.float64)
    for first in range(0, len(ids), DOT_ROWS):
        rows = min(DOT_ROWS, len(ids) - first)
        total[:] = 0
        for start in range(0, columns, DOT_COLUMNS):
            width = min(DOT_COLUMNS, columns - start)
            for i in range(rows):
                given, to = weights[ids[first + i], start : start + width], part[i]
                for column in range(width):
                    to[column] = _load(given, column)
            for number in range(count):
                value = values[number, start : start + width]
                for i in range(rows):
                    weight = part[i]
                    dot = np.float64(0)
                    for column in range(width):
                        dot += weight[column] * value[column]
                    total[i, number] += dot
        for i in range(rows):
            for number in range(count):
                dots[number, first + i] = np.float32(total[i, number])


@_compile
def quantise_rows(weights, first, last, codes, scales, errors, norms):  # type: ignore[no-untyped-def]
    """Quantise the rows [first, last), and measure what is lost.

    :param weights: [rows, columns], see ``_load``
    :param codes: [last - first, padded columns], int8, is written where there are weights
    :param scales: [last - first, blocks], float32, is written
    :param errors: [last - first], float64, is written: the L2 norm of the weights less those that the codes stand for;
        infinite if a weight is not finite
    :param norms: [last - first], float64, is written: that of the larger ones of the two
    """
    columns = weights.shape[1]
    for row in range(first, last):
        lost, kept, own, finite = 0.0, 0.0, 0.0, True
        for block in range(scales.shape[1]):
            given = weights[row, block * BLOCK : min(columns, (block + 1) * BLOCK)]
            to = codes[row - first, block * BLOCK : (block + 1) * BLOCK]
            largest = np.float32(0)
            for column in range(len(given)):
                weight = abs(_load(given, column))
                finite = finite and np.isfinite(weight)
                largest = max(largest, weight)
            scale = np.float32(largest / np.float32(MAX_CODE))
            if not finite or scale < np.float32(1e-30):  # the reciprocal must be finite
                scale = np.float32(0)
            scales[row - first, block] = scale
            inverse = np.float32(0) if scale == 0 else np.float32(1) / scale
            for column in range(len(given)):
                weight = _load(given, column)
                code = min(max(np.rint(weight * inverse), -MAX_CODE), MAX_CODE) if scale != 0 else np.float32(0)
                to[column] = np.int8(code)
                stood = np.float64(scale) * np.float64(code)
                lost += (weight - stood) ** 2
                kept += stood**2
                own += np.float64(weight) ** 2
        errors[row - first] = np.sqrt(lost) if finite else np.inf
        norms[row - first] = np.sqrt(max(kept, own)) if finite else np.inf
