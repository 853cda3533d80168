"""Compiled matrix products with weights in 16, 8 or 4 bits, on any processor.

PyTorch computes with such weights quickly only where the processor has instructions for them. These loops widen each
weight to float32 on its way into a register and multiply it with all rows of the inputs. What bounds decoding is
reading the weights, and they are read once for all rows. All arithmetic is in float32.

The innermost loops are written in LLVM's language, with the vectors in it, and the rest in Numba's. All that is
compiled is in this file, since Numba compiles again when a function's file changes. ``swarm.products.calls`` calls it.
"""

import functools
import logging
import platform
from collections.abc import Sequence
from typing import Any

import swarm.compat  # noqa: F401

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from swarm.compiling import kept

log = logging.getLogger(__name__)


def has(feature: str) -> bool:
    """Whether the processor that Numba compiles for has some instructions, by LLVM's name for them."""
    if numba.config.CPU_FEATURES is not None:
        return f"+{feature}" in numba.config.CPU_FEATURES.split(",")
    return bool(llvmlite.binding.get_host_cpu_features().get(feature))


VECTOR = 16 if has("avx512f") else 8  # float32 in a register, or two
# Without instructions for float16, LLVM would call a function that is not there.
SOFT_HALF = platform.machine() in ("x86_64", "AMD64") and not has("f16c")
# Inputs are as many as fill whole groups.
GROUP = 32
# What is computed in registers: so many outputs of so many rows.
OUTPUTS, ROWS = (4, 4) if VECTOR == 16 else (2, 4)
# From so many rows on, weights are widened once for all of them rather than for each ``ROWS``.
MANY = 9
# So many rows of inputs stay in a core's own cache while weights pass by.
BLOCK = 64

# Formats of weights, see ``swarm.products.formats``. The compiled loops of each are its own.
BFLOAT16, FLOAT16, INT8, INT8_GROUPS, INT4_GROUPS, FLOAT32 = range(6)
HALF = 2  # bytes of a scale
GROUP_BYTES = {INT8_GROUPS: HALF + GROUP, INT4_GROUPS: 2 * HALF + GROUP // 2}  # with their scales

# The arguments of the loops, integers in an array.
(WEIGHTS, WEIGHTS_STRIDE, SCALES, BIAS, INPUTS, INPUTS_STRIDE, COUNT, RESULTS, RESULTS_STRIDE, ROW_COUNT) = range(10)
OUTPUT_COUNT, NEXT, STEP = range(10, 13)
ARGUMENTS = 13

Arguments = types.CPointer(types.int64)


FLOAT, HALF_FLOAT, BYTE, SHORT, INT, LONG = (
    ir.FloatType(),
    ir.HalfType(),
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
)
FLOATS, HALVES, BYTES, SHORTS, INTS = (ir.VectorType(kind, VECTOR) for kind in (FLOAT, HALF_FLOAT, BYTE, SHORT, INT))


class _Emitter:
    """Writes LLVM's instructions. Values are LLVM's; addresses are integers."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        function = ir.FunctionType(FLOATS, [FLOATS] * 3)
        self._fma = cgutils.get_or_insert_function(builder.module, function, f"llvm.fma.v{VECTOR}f32")
        function = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
        self._sum = cgutils.get_or_insert_function(builder.module, function, f"llvm.vector.reduce.fadd.v{VECTOR}f32")

    def at(self, address: Any, offset: int) -> Any:
        return self.builder.add(address, ir.Constant(LONG, offset))

    def load(self, address: Any, kind: Any) -> Any:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=1)

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=1)

    def half(self, address: Any) -> Any:
        """Load a float16 as float32, in all places of a vector."""
        if SOFT_HALF:
            value = self._from_half(self.load(address, SHORT), INT, FLOAT)
        else:
            value = self.builder.fpext(self.load(address, HALF_FLOAT), FLOAT)
        nothing = ir.Constant(FLOATS, ir.Undefined)
        first = self.builder.insert_element(nothing, value, ir.Constant(INT, 0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(INTS, [0] * VECTOR))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.builder.call(self._fma, [a, b, c])

    def sum(self, vector: Any) -> Any:
        return self.builder.call(self._sum, [ir.Constant(FLOAT, -0.0), vector], fastmath=("reassoc",))

    def group(self, format_: int, row: Any, first: Any) -> list[tuple[int, Any]]:
        """Load a group of a row's weights.

        :param row: its address
        :param first: the first weight's number, a multiple of ``GROUP``
        :returns: vectors of float32, and which weights of the group they begin with
        """
        if format_ == INT4_GROUPS:
            return self._nibbles(self._grouped(row, first, format_))
        if format_ == INT8_GROUPS:
            address = self._grouped(row, first, format_)
            scale, values = self.half(address), self._bytes(self.at(address, HALF))
            return [(i, self.builder.fmul(value, scale)) for i, value in values]
        if format_ == INT8:
            return self._bytes(self.builder.add(row, first))
        if format_ == FLOAT32:
            address = self.builder.add(row, self.builder.mul(first, ir.Constant(LONG, 4)))
            return [(i, self.load(self.at(address, 4 * i), FLOATS)) for i in range(0, GROUP, VECTOR)]
        address = self.builder.add(row, self.builder.mul(first, ir.Constant(LONG, 2)))
        widen = self._widened_bfloat16 if format_ == BFLOAT16 else self._widened_float16
        return [(i, widen(self.at(address, 2 * i))) for i in range(0, GROUP, VECTOR)]

    def _grouped(self, row: Any, first: Any, format_: int) -> Any:
        number = self.builder.udiv(first, ir.Constant(LONG, GROUP))
        return self.builder.add(row, self.builder.mul(number, ir.Constant(LONG, GROUP_BYTES[format_])))

    def _widened_bfloat16(self, address: Any) -> Any:
        bits = self.builder.zext(self.load(address, SHORTS), INTS)
        return self.builder.bitcast(self.builder.shl(bits, ir.Constant(INTS, [16] * VECTOR)), FLOATS)

    def _widened_float16(self, address: Any) -> Any:
        if SOFT_HALF:
            return self._from_half(self.load(address, SHORTS), INTS, FLOATS)
        return self.builder.fpext(self.load(address, HALVES), FLOATS)

    def _from_half(self, half: Any, ints: Any, floats: Any) -> Any:
        """Return a finite float16 as float32: its bits in their new places, and a factor for the other exponent."""
        builder, bits = self.builder, self.builder.zext(half, ints)

        def constant(kind: Any, value: float) -> Any:
            return ir.Constant(kind, [value] * VECTOR if isinstance(kind, ir.VectorType) else value)

        sign = builder.shl(builder.and_(bits, constant(ints, 0x8000)), constant(ints, 16))
        rest = builder.shl(builder.and_(bits, constant(ints, 0x7FFF)), constant(ints, 13))
        scaled = builder.fmul(builder.bitcast(rest, floats), constant(floats, 2.0**112))
        return builder.bitcast(builder.or_(builder.bitcast(scaled, ints), sign), floats)

    def _bytes(self, address: Any) -> list[tuple[int, Any]]:
        loaded = [(i, self.load(self.at(address, i), BYTES)) for i in range(0, GROUP, VECTOR)]
        return [(i, self.builder.sitofp(self.builder.sext(value, INTS), FLOATS)) for i, value in loaded]

    def _nibbles(self, address: Any) -> list[tuple[int, Any]]:
        """Load 4-bit weights: the lower halves of bytes are the first half of the group, the upper ones the second."""
        scale, least, values = self.half(address), self.half(self.at(address, HALF)), []
        for i in range(0, GROUP // 2, VECTOR):
            both = self.builder.zext(self.load(self.at(address, 2 * HALF + i), BYTES), INTS)
            lower = self.builder.and_(both, ir.Constant(INTS, [15] * VECTOR))
            upper = self.builder.lshr(both, ir.Constant(INTS, [4] * VECTOR))
            for first, bits in ((i, lower), (GROUP // 2 + i, upper)):
                values.append((first, self.fma(self.builder.sitofp(bits, FLOATS), scale, least)))
        return sorted(values, key=lambda value: value[0])


@intrinsic(prefer_literal=True)
def _dots(
    typing_context: Any,
    format_: Any,
    rows: Any,
    weights: Any,
    weights_stride: Any,
    inputs: Any,
    inputs_stride: Any,
    count: Any,
    sums: Any,
) -> Any:
    """Compute the products of ``OUTPUTS`` rows of weights and some of inputs; write them to ``sums``, row by row."""
    code, height = format_.literal_value, rows.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        weights, weights_stride, inputs, inputs_stride, count, sums = arguments[2:]
        emit = _Emitter(builder)
        tops = [builder.add(weights, builder.mul(weights_stride, ir.Constant(LONG, i))) for i in range(OUTPUTS)]
        lefts = [builder.add(inputs, builder.mul(inputs_stride, ir.Constant(LONG, i))) for i in range(height)]
        places = [[cgutils.alloca_once(builder, FLOATS) for _ in tops] for _ in lefts]
        for place in (place for row in places for place in row):
            builder.store(ir.Constant(FLOATS, [0.0] * VECTOR), place)
        with cgutils.for_range_slice(builder, ir.Constant(LONG, 0), count, ir.Constant(LONG, GROUP)) as (first, _):
            groups = [emit.group(code, top, first) for top in tops]
            offset = builder.mul(first, ir.Constant(LONG, 4))
            for number, (i, _) in enumerate(groups[0]):
                for left, row in zip(lefts, places, strict=True):
                    values = emit.load(emit.at(builder.add(left, offset), 4 * i), FLOATS)
                    for group, place in zip(groups, row, strict=True):
                        builder.store(emit.fma(group[number][1], values, builder.load(place)), place)
        for i, place in enumerate(place for row in places for place in row):
            emit.store(emit.sum(builder.load(place)), emit.at(sums, 4 * i))
        return context.get_dummy_value()

    return types.void(format_, rows, *[types.int64] * 6), generate


@intrinsic(prefer_literal=True)
def _widen(typing_context: Any, format_: Any, weights: Any, count: Any, result: Any) -> Any:
    """Write a row of weights to ``result`` as float32."""
    code = format_.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        _, weights, count, result = arguments
        emit = _Emitter(builder)
        with cgutils.for_range_slice(builder, ir.Constant(LONG, 0), count, ir.Constant(LONG, GROUP)) as (first, _):
            offset = builder.mul(first, ir.Constant(LONG, 4))
            for i, value in emit.group(code, weights, first):
                emit.store(value, emit.at(builder.add(result, offset), 4 * i))
        return context.get_dummy_value()

    return types.void(format_, *[types.int64] * 3), generate


@intrinsic
def _take(typing_context: Any, counter: Any, step: Any) -> Any:
    """Add ``step`` to the number at the address ``counter``, which other threads may do too; return what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        pointer = builder.inttoptr(arguments[0], LONG.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _floats(typing_context: Any, address: Any) -> Any:
    """Return a pointer to the float32 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def _address(typing_context: Any, pointer: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        return builder.ptrtoint(arguments[0], LONG)

    return types.int64(pointer), generate


# What a thread calls with the address of its arguments.
_compile = functools.partial(kept, functools.partial(cfunc, types.void(Arguments)), error_model="numpy")


def _compiled_product(format_: int) -> Any:
    """Compile the product of a format: each thread takes outputs until none are left."""

    def product(pointer):  # type: ignore[no-untyped-def]  # Numba knows
        a = carray(pointer, ARGUMENTS)
        counter = _address(pointer) + 8 * NEXT
        # Sums, then widened weights. One buffer, for Numba frees an array of which only the address is used any more.
        buffer = np.empty(ROWS * OUTPUTS + OUTPUTS * a[COUNT], np.float32)
        sums = buffer.ctypes.data
        wide = sums + 4 * ROWS * OUTPUTS
        results = carray(_floats(a[RESULTS]), (a[ROW_COUNT], a[RESULTS_STRIDE]))
        scales, bias = carray(_floats(a[SCALES]), a[OUTPUT_COUNT]), carray(_floats(a[BIAS]), a[OUTPUT_COUNT])
        while True:
            begin = _take(counter, a[STEP])
            if begin >= a[OUTPUT_COUNT]:
                break
            end = min(begin + a[STEP], a[OUTPUT_COUNT])
            for block in range(0, a[ROW_COUNT], BLOCK):
                last = min(block + BLOCK, a[ROW_COUNT])
                for tile in range(begin, end, OUTPUTS):
                    output = min(tile, a[OUTPUT_COUNT] - OUTPUTS)
                    top, stride = a[WEIGHTS] + output * a[WEIGHTS_STRIDE], a[WEIGHTS_STRIDE]
                    many = last - block >= MANY
                    if many:
                        for i in range(OUTPUTS):
                            _widen(format_, top + i * stride, a[COUNT], wide + i * 4 * a[COUNT])
                    for row in range(block, last, ROWS):
                        left, height = a[INPUTS] + row * a[INPUTS_STRIDE], min(ROWS, last - row)
                        if many and height == 4:
                            _dots(FLOAT32, 4, wide, 4 * a[COUNT], left, a[INPUTS_STRIDE], a[COUNT], sums)
                        elif height == 4:
                            _dots(format_, 4, top, stride, left, a[INPUTS_STRIDE], a[COUNT], sums)
                        elif height == 3:
                            _dots(format_, 3, top, stride, left, a[INPUTS_STRIDE], a[COUNT], sums)
                        elif height == 2:
                            _dots(format_, 2, top, stride, left, a[INPUTS_STRIDE], a[COUNT], sums)
                        else:
                            _dots(format_, 1, top, stride, left, a[INPUTS_STRIDE], a[COUNT], sums)
                        for i in range(height):
                            for j in range(OUTPUTS):
                                value = buffer[i * OUTPUTS + j]
                                if a[SCALES] != 0:
                                    value *= scales[output + j]
                                if a[BIAS] != 0:
                                    value += bias[output + j]
                                results[row + i, output + j] = value

    return _compile(product)


def _compiled_widening(format_: int) -> Any:
    """Compile what makes float32 of rows of weights."""

    def widening(pointer):  # type: ignore[no-untyped-def]  # Numba knows
        a = carray(pointer, ARGUMENTS)
        counter = _address(pointer) + 8 * NEXT
        results = carray(_floats(a[RESULTS]), (a[OUTPUT_COUNT], a[COUNT]))
        scales = carray(_floats(a[SCALES]), a[OUTPUT_COUNT])
        while True:
            begin = _take(counter, a[STEP])
            if begin >= a[OUTPUT_COUNT]:
                break
            for output in range(begin, min(begin + a[STEP], a[OUTPUT_COUNT])):
                _widen(format_, a[WEIGHTS] + output * a[WEIGHTS_STRIDE], a[COUNT], results[output].ctypes.data)
                if a[SCALES] != 0:
                    for i in range(a[COUNT]):
                        results[output, i] *= scales[output]

    return _compile(widening)


@functools.cache
def compiled(format_: int, kind: str) -> Any:
    """Return the compiled loop of a format; the first call takes a second, or what it takes to load it.

    :param kind: ``"product"`` or ``"widening"``
    """
    return _compiled_product(format_) if kind == "product" else _compiled_widening(format_)
