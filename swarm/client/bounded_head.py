"""A head that reads one byte of each weight, and both bytes only of the rows that may matter.

Let w be a row of weights and x an input, real numbers as they are stored. The row is kept as w = q + r, where q is
codes of 8 bits times scales and r what was lost; the input becomes x = p + f, where p is whole numbers of 16 bits times
steps. By the inequality of Cauchy and Schwarz,

    |w.x - q.p| = |r.x + q.f| <= |r| |x| + |q| |f|,

with L2 norms, of which those of rows were measured when they were quantised, and those of inputs are measured in
float64. The products q.p are computed as whole numbers, without error, of each block of columns. Only scaling and
adding up the blocks rounds, and each of these steps errs by at most 2^-24 of the sum of the magnitudes, which is at
most |q| |p|. So does computing w.x, in float64 and rounded once (``dot_rows``). With b blocks there are at most b + 14
such steps, for which twice as much is allowed. That bounds the error of each row, whatever weights and inputs are.

What is computed from a row of 16 bits has the same bits as in the product with all rows. So whoever needs only the
logits above some threshold (``generation.shortlist``) computes those rows whose upper bound is above it, and has what
the whole product would have given.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import swarm.compat  # noqa: F401

import numpy as np
import torch

from swarm.client.bounds import BoundedLogits
from swarm.client.head_kernels import BLOCK, MAX_INPUT, dot_rows, score_rows
from swarm.client.quantised_weights import Array, quantised, raw
from swarm.client.together import Together
from swarm.hardware import cpu_count

SCORED_ROWS = 2048  # in one piece of work of a thread; a multiple of GROUP
DOT_ROWS = 256  # of 16 bits, in one piece
ROUNDING = 2.0**-23  # twice the largest relative error of rounding to float32
# What is too small for normal floating-point numbers may count as zero. All such losses of a row are less than this.
TINY = 2.0**-80
SMALLEST_STEP = 1e-30


class BoundedHead:
    """The product of a language model's head, as bounds and as exact numbers. Thread-safe."""

    def __init__(
        self,
        weight: torch.Tensor,
        cache_dir: Path | None = None,
        identity: str = "",
        finish: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
        slack: float = 0.0,
    ) -> None:
        """Quantise the weights, or find them quantised.

        :param weight: [vocabulary, hidden size], bfloat16, float16 or float32, best in a mapped file; stays in use
        :param cache_dir: where the quantised copy is kept; None: in memory
        :param identity: of the weights, see ``quantised``
        :param finish: what becomes of products before they are logits: never falling, if ``slack`` is added
        :param slack: by how much the results of ``finish`` may be out of order
        """
        self._pool = ThreadPoolExecutor(cpu_count(), "head")
        self._weights = raw(weight)
        self._kept = quantised(weight, cache_dir, identity, self._pool)
        self._errors, self._norms = (torch.from_numpy(np.array(it)) for it in (self._kept.errors, self._kept.norms))
        self._finish, self._slack = finish, slack
        self.bounds(torch.zeros(1, weight.shape[1]))[0].exact(torch.zeros(1, dtype=torch.int64))  # compiles the loops
        self._all_together: Together[torch.Tensor] = Together(lambda inputs: self.logits(inputs).unbind(0))

    def bounds(self, inputs: torch.Tensor) -> list[BoundedLogits]:
        """Return bounds for the logits of each input, all in one reading of the quantised weights.

        :param inputs: [n, hidden size], float32
        """
        values = inputs.double().numpy()
        whole, steps, lost = to_whole_numbers(values)
        whole = _padded(whole, len(values), self._kept.codes.shape[1])
        scores = np.empty((len(values), len(self._kept.codes)), np.float32)

        def work(first: int) -> None:
            last = min(len(self._kept.codes), first + SCORED_ROWS)
            score_rows(self._kept.codes, self._kept.scales, whole, steps, first, last, scores)

        self._share(work, len(self._kept.codes), SCORED_ROWS)
        lengths = np.sqrt((values**2).sum(axis=1))
        return [
            self._bounded(value, torch.from_numpy(score), float(length), float(loss))
            for value, score, length, loss in zip(values, scores, lengths, lost, strict=True)
        ]

    def _bounded(self, value: Array, scores: torch.Tensor, length: float, lost: float) -> BoundedLogits:
        """:param length: of the input; ``lost``: of what its whole numbers do not say"""
        steps = self._kept.scales.shape[1] + 16
        far = self._errors * length + self._norms * (lost + steps * ROUNDING * (length + lost))
        far = far * (1 + 8 * ROUNDING) + TINY
        # Where anything has left the range of float32, nothing is known.
        known = torch.isfinite(scores) & torch.isfinite(far)
        lower = torch.where(known, scores - far, -torch.inf)
        upper = torch.where(known, scores + far, torch.inf)
        size = len(self._weights)
        return BoundedLogits(
            self._finish(lower[:size]) - self._slack,
            self._finish(upper[:size]) + self._slack,
            lambda ids: self._exact(value[None], ids)[0],
            lambda: self._all_together(torch.from_numpy(value)),
        )

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return all logits of each input: [n, vocabulary], float32.

        :param inputs: [n, hidden size], floating
        """
        return self._exact(inputs.double().numpy(), torch.arange(len(self._weights)))

    def _exact(self, values: Array, ids: torch.Tensor) -> torch.Tensor:
        rows = ids.numpy()
        dots = np.empty((len(values), len(rows)), np.float32)

        def work(first: int) -> None:
            some = slice(first, first + DOT_ROWS)
            part = np.empty((len(values), len(rows[some])), np.float32)
            dot_rows(self._weights, rows[some], values, part)
            dots[:, some] = part

        self._share(work, len(rows), DOT_ROWS)
        return self._finish(torch.from_numpy(dots))

    def _share(self, work: Callable[[int], None], count: int, piece: int) -> None:
        """Do pieces of work on as many threads as PyTorch's operators use."""
        firsts = iter(range(0, count, piece))
        if (threads := min(torch.get_num_threads(), -(-count // piece))) < 2:
            _drain(work, firsts)
            return
        waited = [self._pool.submit(_drain, work, firsts) for _ in range(threads - 1)]
        _drain(work, firsts)
        for future in waited:
            future.result()


def _drain(work: Callable[[int], None], firsts: Iterator[int]) -> None:
    for first in firsts:  # threads may share such an iterator
        work(first)


def to_whole_numbers(values: Array) -> tuple[Array, Array, Array]:
    """Return inputs as whole numbers of 16 bits times steps, one for each block of columns.

    :param values: [n, columns], float64
    :returns: [n, columns] int16; [n, blocks] float32; [n], float64: the L2 norms of what is lost
    """
    count, columns = values.shape
    blocks = -(-columns // BLOCK)
    blocked = _padded(values, count, blocks * BLOCK).reshape(count, blocks, BLOCK)
    with np.errstate(over="ignore", invalid="ignore"):  # then the bounds are infinite
        steps = (np.abs(blocked).max(axis=2) / MAX_INPUT).astype(np.float32)
        steps[~(np.isfinite(steps) & (steps > SMALLEST_STEP))] = 0
        wide = steps.astype(np.float64)[:, :, None]
        whole = np.divide(blocked, wide, out=np.zeros_like(blocked), where=wide > 0)
        whole = np.clip(np.rint(whole), -MAX_INPUT, MAX_INPUT)
        lost = np.sqrt(((blocked - whole * wide) ** 2).sum(axis=(1, 2)))
    return whole.astype(np.int16).reshape(count, -1)[:, :columns], steps, lost


def _padded(values: Array, rows: int, columns: int) -> Array:
    padded = np.zeros((rows, columns), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded


def softcapped(logits: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    """Return what some families make of the product, in float64 and rounded once."""
    if scaling == 1.0 and softcap is None:
        return logits
    wide = logits.double() / scaling
    if softcap is not None:
        wide = torch.tanh(wide / softcap) * softcap
    return wide.float()


def make_finish(scaling: float, softcap: float | None) -> tuple[Callable[[torch.Tensor], torch.Tensor], float]:
    """Return what becomes of products before they are logits, and how much that may be out of order."""
    return functools.partial(softcapped, scaling=scaling, softcap=softcap), (softcap or 0.0) * ROUNDING
