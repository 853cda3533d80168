"""Weights in 16, 8 and 4 bits: how they are rounded to, and how they lie in memory."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import swarm.compat  # noqa: F401

import torch

from swarm.products import calls, loops
from swarm.products.loops import GROUP

# Names of formats, and what the loops call them.
BFLOAT16, FLOAT16, INT8, INT8_GROUPS, INT4 = "bfloat16", "float16", "int8", "int8 in groups", "int4"
CODES = {
    BFLOAT16: loops.BFLOAT16,
    FLOAT16: loops.FLOAT16,
    INT8: loops.INT8,
    INT8_GROUPS: loops.INT8_GROUPS,
    INT4: loops.INT4_GROUPS,
}
ROUNDED = {BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}
LARGEST_INT8, LARGEST_INT4 = 127, 15
PIECE = 2**18  # values that are rounded at once

Packer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """A matrix of weights, [outputs, inputs], in one of the formats.

    - ``bfloat16``, ``float16``: as they are.
    - ``int8``: each output has its scale; values are whole numbers from -127 to 127 times that.
    - ``int8 in groups``: the same for each 32 inputs of an output, with a scale in float16; GGUF's Q8_0.
    - ``int4``: each 32 inputs of an output have a scale and a least value, both float16; values are whole numbers from
      0 to 15 times the one, plus the other; GGUF's Q4_1.
    """

    format: str
    rows: torch.Tensor  # uint8, [outputs, bytes]; inputs are filled up to a multiple of GROUP
    inputs: int
    scales: torch.Tensor | None = None  # [outputs], float32; of int8

    @property
    def outputs(self) -> int:
        return len(self.rows)

    @property
    def filled(self) -> int:
        """The number of inputs, filled up."""
        return -(-self.inputs // GROUP) * GROUP

    def part(self, outputs: slice) -> "Weights":
        """Return some of the outputs."""
        scales = None if self.scales is None else self.scales[outputs].clone()
        return dataclasses.replace(self, rows=self.rows[outputs].clone(), scales=scales)

    def widened(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return the values of outputs [first, last) in float32, [outputs, inputs filled up]."""
        rows = self.rows[first:last]
        scales = None if self.scales is None else self.scales[first:last]
        return calls.widened(CODES[self.format], rows, scales, self.filled)

    def dense(self) -> torch.Tensor:
        """Return all values in float32, [outputs, inputs]."""
        return self.widened()[:, : self.inputs]


def rounded(weight: torch.Tensor, format_: str, pack: Packer | None = None) -> Weights:
    """Round a matrix to a format.

    :param weight: [outputs, inputs], floating
    :param pack: what makes [outputs, groups, bytes] of [outputs, groups, GROUP], if not the format's own
    """
    return joined([_rounded(part, format_, pack) for part in pieces(weight)])


def pieces(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the rows of a matrix in pieces that stay in a cache, which makes rounding several times as fast."""
    return weight.split(max(1, PIECE // weight.shape[1]))


def _rounded(weight: torch.Tensor, format_: str, pack: Packer | None) -> Weights:
    count = weight.shape[1]
    spare = -count % GROUP
    if format_ in ROUNDED:
        values = torch.nn.functional.pad(weight.to(ROUNDED[format_]), (0, spare))
        return Weights(format_, values.contiguous().view(torch.uint8), count)
    weight = weight.float()
    if format_ == INT8:
        scales = weight.abs().amax(1) / LARGEST_INT8
        values = divided(weight, scales[:, None]).clamp_(-LARGEST_INT8, LARGEST_INT8).to(torch.int8)
        return Weights(format_, torch.nn.functional.pad(values, (0, spare)).view(torch.uint8), count, scales)
    # Repeat the last value, which leaves the largest and the least of its group what they are.
    groups = torch.cat([weight, weight[:, -1:].expand(-1, spare)], 1).unflatten(1, (-1, GROUP))
    packed = (pack or PACKERS[format_])(groups)
    return Weights(format_, packed.flatten(1), count)


def divided(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the nearest whole numbers of scales; where these are 0, 0."""
    return torch.where(scales == 0, 0, values / scales).round_()


def int8_groups(groups: torch.Tensor) -> torch.Tensor:
    """Return [outputs, groups, bytes] of [outputs, groups, GROUP]."""
    scales = (groups.abs().amax(-1, keepdim=True) / LARGEST_INT8).half()
    values = divided(groups, scales.float()).clamp_(-LARGEST_INT8, LARGEST_INT8).to(torch.int8)
    return torch.cat([scales.view(torch.uint8), values.view(torch.uint8)], -1)


def int4_groups(groups: torch.Tensor) -> torch.Tensor:
    """Return [outputs, groups, bytes] of [outputs, groups, GROUP]."""
    least = groups.amin(-1, keepdim=True)
    scales = (groups.amax(-1, keepdim=True) - least) / LARGEST_INT4
    return _nibbles(groups, scales.half(), least.half())


def symmetric_int4_groups(groups: torch.Tensor) -> torch.Tensor:
    """Return the same with 0 in the middle, as GGUF's Q4_0: the value farthest from 0 is -8 times the scale."""
    farthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (farthest / -8).half()
    return _nibbles(groups, scales, -8 * scales)


def _nibbles(groups: torch.Tensor, scales: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    values = divided(groups - least.float(), scales.float()).clamp_(0, LARGEST_INT4).to(torch.uint8)
    lower, upper = values.chunk(2, -1)
    return torch.cat([scales.view(torch.uint8), least.view(torch.uint8), lower | upper << 4], -1)


def exactly(weight: torch.Tensor) -> Weights | None:
    """Return a matrix in the smallest format in which it loses nothing, or None if it would in all.

    So the bits of a GGUF file are found again in what was made of them, for Q4_1, Q4_0 and Q8_0.
    """
    for format_, pack in EXACT:
        parts = []
        for piece in pieces(weight):
            part = _rounded(piece, format_, pack)
            if not torch.equal(part.dense(), piece.float()):
                break
            parts.append(part)
        else:
            return joined(parts)
    return None


PACKERS: Mapping[str, Packer] = {INT8_GROUPS: int8_groups, INT4: int4_groups}
# In which formats, and how rounded, weights may lose nothing; the smallest first.
EXACT = ((INT4, int4_groups), (INT4, symmetric_int4_groups), (INT8_GROUPS, None), (BFLOAT16, None), (FLOAT16, None))


def joined(matrices: Sequence[Weights]) -> Weights:
    """Return matrices of the same format and inputs as one, their outputs one after the other."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    scales = [matrix.scales for matrix in matrices if matrix.scales is not None]
    rows = torch.cat([matrix.rows for matrix in matrices])
    return Weights(first.format, rows, first.inputs, torch.cat(scales) if scales else None)


def product(weights: Weights, bias: torch.Tensor | None) -> calls.Product:
    """Return the product with weights of at least ``loops.OUTPUTS`` outputs.

    :param bias: [outputs], float32
    """
    return calls.Product(CODES[weights.format], weights.rows, weights.scales, weights.filled, bias)
