"""Calls the compiled loops, in PyTorch's own threads: others would wait for cores on which PyTorch's wait for work."""

import ctypes
import functools
import logging
from typing import Any

import swarm.compat  # noqa: F401

import numpy as np
import torch

from swarm.products import loops
from swarm.products.loops import (
    ARGUMENTS,
    BIAS,
    COUNT,
    INPUTS,
    INPUTS_STRIDE,
    OUTPUT_COUNT,
    OUTPUTS,
    RESULTS,
    RESULTS_STRIDE,
    ROW_COUNT,
    SCALES,
    STEP,
    WEIGHTS,
    WEIGHTS_STRIDE,
)

log = logging.getLogger(__name__)

# Into how many parts a product is divided, which threads take one after the other.
SHARES = 16
WIDENED_AT_ONCE = 16  # rows of weights that a thread takes


@functools.cache
def _openmp() -> Any:
    """Return what starts OpenMP's threads, or None where PyTorch's OpenMP cannot be found."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError):
        log.warning("PyTorch's OpenMP is not found: products with weights of few bits use one thread")
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def run(loop: Any, arguments: np.ndarray) -> None:
    """Run a compiled loop in as many threads as PyTorch's operators use.

    :param arguments: its own; they are changed
    """
    threads = torch.get_num_threads()
    parallel = _openmp()
    if threads == 1 or parallel is None:
        loop.ctypes(arguments.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)))
    else:
        parallel(loop.address, arguments.ctypes.data, threads, 0)


def widened(format_: int, rows: torch.Tensor, scales: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return weights in float32: [outputs, count].

    :param rows: uint8, [outputs, bytes]; each contiguous
    :param scales: float32, [outputs]; what to multiply each output's weights by
    :param count: how many weights an output has, a multiple of ``GROUP``
    """
    results = torch.empty(len(rows), count)
    arguments = np.zeros(ARGUMENTS, np.int64)
    arguments[WEIGHTS], arguments[WEIGHTS_STRIDE] = rows.data_ptr(), rows.stride(0)
    arguments[SCALES] = 0 if scales is None else scales.data_ptr()
    arguments[RESULTS], arguments[COUNT], arguments[OUTPUT_COUNT] = results.data_ptr(), count, len(rows)
    arguments[STEP] = WIDENED_AT_ONCE
    run(loops.compiled(format_, "widening"), arguments)
    return results


class Product:
    """The product of inputs with weights in a format. Several threads may compute it at once."""

    def __init__(
        self,
        format_: int,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        count: int,
        bias: torch.Tensor | None,
    ) -> None:
        """Prepare the product.

        :param rows: uint8, [outputs, bytes]; at least ``OUTPUTS`` of them
        :param scales: float32, [outputs]; what to multiply each output by
        :param count: how many weights an output has, a multiple of ``GROUP``
        :param bias: float32, [outputs]; what to add to each output
        :raises ValueError: if there are too few outputs
        """
        if len(rows) < OUTPUTS:
            raise ValueError(f"{len(rows)} outputs are too few: {OUTPUTS} are computed at once")
        self._outputs, self._count = len(rows), count
        self._kept = rows, scales, bias  # the loop knows their addresses only
        self._loop = loops.compiled(format_, "product")
        arguments = np.zeros(ARGUMENTS, np.int64)
        arguments[WEIGHTS], arguments[WEIGHTS_STRIDE] = rows.data_ptr(), rows.stride(0)
        arguments[SCALES] = 0 if scales is None else scales.data_ptr()
        arguments[BIAS] = 0 if bias is None else bias.data_ptr()
        arguments[COUNT], arguments[OUTPUT_COUNT], arguments[RESULTS_STRIDE] = count, len(rows), len(rows)
        arguments[INPUTS_STRIDE] = 4 * count
        # Small enough that threads end at the same time, though one may have to share its core.
        arguments[STEP] = max(OUTPUTS, len(rows) // SHARES // OUTPUTS * OUTPUTS)
        self._arguments = arguments

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return [rows, outputs], float32, of contiguous float32 inputs of [rows, count].

        :raises ValueError: if the inputs are something else
        """
        if inputs.shape[1] != self._count or inputs.dtype != torch.float32 or not inputs.is_contiguous():
            raise ValueError(f"{inputs.dtype} of {list(inputs.shape)} are not rows of {self._count} values")
        arguments, results = self._arguments.copy(), torch.empty(len(inputs), self._outputs)
        arguments[INPUTS], arguments[RESULTS], arguments[ROW_COUNT] = inputs.data_ptr(), results.data_ptr(), len(inputs)
        run(self._loop, arguments)
        return results
