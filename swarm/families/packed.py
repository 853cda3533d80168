"""Matrices that a checkpoint has in a GGUF file's own bits, see ``swarm.weights.gguf.tensors``."""

import swarm.compat  # noqa: F401

import torch

from swarm.products.formats import INT4, INT8_GROUPS, Weights
from swarm.products.loops import GROUP
from swarm.weights.gguf.tensors import KEPT

State = dict[str, torch.Tensor]

HALF = 2  # bytes of a scale


def unpacked(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the name and shape of the weight that a tensor of a checkpoint stands for; its own, as a rule."""
    stem, _, kind = name.rpartition(".")
    return (stem, (shape[0], shape[1] // KEPT[kind] * GROUP)) if kind in KEPT else (name, shape)


def take_packed(state: State) -> tuple[State, dict[str, Weights]]:
    """Divide tensors of a checkpoint into weights as they are and packed ones, both by the weights' names."""
    plain, packed = {}, {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        if kind in KEPT:
            packed[stem] = read(kind, tensor.clone())  # out of the file, which is mapped into memory as a whole
        else:
            plain[name] = tensor
    return plain, packed


def read(kind: str, rows: torch.Tensor) -> Weights:
    """Return a matrix in a format of ``swarm.products``; it has the values that GGUF means.

    :param kind: GGUF's name of the format
    :param rows: uint8, [outputs, bytes]
    """
    inputs = rows.shape[1] // KEPT[kind] * GROUP
    if kind == "Q8_0":
        return Weights(INT8_GROUPS, rows, inputs)
    if kind == "Q4_0":  # the whole numbers are those from -8 to 7
        groups = rows.unflatten(1, (-1, KEPT[kind]))
        scales, values = groups[..., :HALF], groups[..., HALF:]
        least = (-8 * scales.contiguous().view(torch.float16)).view(torch.uint8)
        rows = torch.cat([scales, least, values], -1).flatten(1)
    return Weights(INT4, rows, inputs)
