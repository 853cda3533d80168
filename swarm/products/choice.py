"""Which product this processor is fastest with: known by its instructions, and tried where they leave it open."""

import functools
import logging
import time
from collections.abc import Callable

import swarm.compat  # noqa: F401

import torch
import torch.nn.functional as F

from swarm.products import formats

log = logging.getLogger(__name__)

# What is tried: a few rows, as for decoding, and many, as for a prompt. Large enough that starting threads counts as
# little as it does with real weights, and done within a quarter of a second.
SIZE, DECODING_ROWS, MANY_ROWS = 1536, (1, 4, 16), 96
REPETITIONS = 3
# The order of oneDNN's weights is chosen for a number of rows; this one is as good as any for 1 to 128.
TYPICAL_ROWS = 16


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN computes products with such a weight, once it is in its order."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and onednn_has_bfloat16())


@functools.cache
def onednn_has_bfloat16() -> bool:
    """Whether oneDNN takes weights in bfloat16: it does not where it would have to emulate them."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(32, 32, dtype=torch.bfloat16), TYPICAL_ROWS)
    except RuntimeError:
        return False
    return True


@functools.cache
@torch.inference_mode()
def loops_beat_onednn() -> bool:
    """Whether this project's loops are faster with a few rows of bfloat16 than oneDNN."""
    if not onednn_has_bfloat16():
        return True
    weight = torch.randn(SIZE, SIZE).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
    product = formats.product(formats.rounded(weight, formats.BFLOAT16), None)
    inputs = [torch.randn(rows, SIZE).bfloat16() for rows in DECODING_ROWS]
    ours = seconds(lambda: [product(rows.float()).bfloat16() for rows in inputs])
    theirs = seconds(lambda: [ordered_product(rows, packed, None) for rows in inputs])
    log.debug("bfloat16: %.2f ms by loops, %.2f by oneDNN", 1000 * ours, 1000 * theirs)
    return ours < theirs


@functools.cache
@torch.inference_mode()
def widening_pays() -> bool:
    """Whether many rows are faster with weights that are made float32 first, for PyTorch's product."""
    weights = formats.rounded(torch.randn(SIZE, SIZE), formats.INT8)
    product, inputs = formats.product(weights, None), torch.randn(MANY_ROWS, SIZE)
    ours, theirs = seconds(lambda: product(inputs)), seconds(lambda: F.linear(inputs, weights.widened()))
    log.debug("%d rows: %.2f ms by loops, %.2f widened", MANY_ROWS, 1000 * ours, 1000 * theirs)
    return theirs < ours


def ordered_product(inputs: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the product with a weight in oneDNN's order."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(inputs, packed, bias, "none", [], "")
    return result


def seconds(compute: Callable[[], object]) -> float:
    """Return how long something takes, at best: what else the machine does only adds to it."""
    compute()
    times = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        compute()
        times.append(time.perf_counter() - started)
    return min(times)
