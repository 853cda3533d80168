"""Tensors: before anything reads one, its header is checked against the bytes that are there."""

import math
from collections.abc import Callable
from typing import Any

import torch
from hivemind.compression import base, deserialize_torch_tensor
from hivemind.compression.serialization import _BASE_COMPRESSION_TYPES
from hivemind.proto import runtime_pb2

from swarm.wire.text import Malformed, clean, quoted

# Petals' servers send NONE by default; its 8-bit compressions read memory wherever the sender says.
COMPRESSIONS = ("NONE", "FLOAT16", "MEANSTD_16BIT")
COMPRESSION_NAMES = {number: name for name, number in runtime_pb2.CompressionType.items()}
FLOATING = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a value
DTYPES = {**FLOATING, "int64": 8}
MAX_DIMENSIONS = 4  # deep prompts: [blocks, sequences, tokens, hidden size]
MAX_VALUES = 2**32  # more than any message holds, and far from overflowing a product


def check_tensor(tensor: runtime_pb2.Tensor) -> None:
    """Check a serialised tensor's header against the bytes that are there, before it is read.

    :raises Malformed: naming what does not fit
    """
    sizes, dtype, kind = tuple(tensor.size), tensor.dtype, tensor.compression
    if dtype not in DTYPES:
        raise Malformed(f"tensors of dtype {quoted(dtype)} are not accepted")
    if len(sizes) > MAX_DIMENSIONS:
        raise Malformed(f"{quoted(sizes)} is no size of a tensor")
    if math.prod(max(1, size) for size in sizes) > MAX_VALUES:
        raise Malformed(f"a tensor of size {quoted(sizes)} is too large")
    values = math.prod(sizes)
    if kind == runtime_pb2.NONE:
        expected = [DTYPES[dtype] * values]
        if dtype == "bfloat16":
            expected.append(4 * values)  # some versions of hivemind send it as float32
    elif kind not in (runtime_pb2.FLOAT16, runtime_pb2.MEANSTD_16BIT):
        raise Malformed(f"the compression {COMPRESSION_NAMES.get(kind, kind)} is not accepted")
    elif dtype not in ("float32", "float16"):
        raise Malformed(f"{dtype} cannot have been compressed to 16 bits")
    elif kind == runtime_pb2.FLOAT16:
        expected = [2 * values]
    else:  # plus two float32 for each vector
        expected = [2 * values + 8 * (values // sizes[-1])] if values and sizes else []
    if len(tensor.buffer) not in expected:
        raise Malformed(f"{len(tensor.buffer)} bytes are no tensor of size {quoted(sizes)} and dtype {dtype}")
    if tensor.requires_grad and dtype not in FLOATING:
        raise Malformed(f"tensors of dtype {dtype} have no gradient")


def check_compressions() -> None:
    """Let hivemind read only tensors that pass ``check_tensor``, and refuse the other compressions by name.

    Also, let it send bfloat16 as it is. By default hivemind makes float32 of it, for old releases.
    """
    base.USE_LEGACY_BFLOAT16 = False
    for name, compression in _BASE_COMPRESSION_TYPES.items():
        if name in COMPRESSIONS:
            compression.extract = _checked(compression.extract)
        else:
            compression.extract = compression.compress = _refusing(name)


def _checked(extract: Callable[[runtime_pb2.Tensor], torch.Tensor]) -> Callable[[runtime_pb2.Tensor], torch.Tensor]:
    def checked(tensor: runtime_pb2.Tensor) -> torch.Tensor:
        check_tensor(tensor)
        return extract(tensor)

    return checked


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> None:
        raise Malformed(f"the compression {name} is not accepted")

    return refuse


def read_tensor(tensor: runtime_pb2.Tensor) -> torch.Tensor:
    """Read a tensor that a peer has sent.

    :raises Malformed: if it cannot be read
    """
    try:
        return deserialize_torch_tensor(tensor).detach()
    except Malformed:
        raise
    except Exception as error:  # numpy and torch raise many kinds
        raise Malformed(f"a tensor cannot be read: {clean(str(error))}") from None


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite. Takes a few microseconds for a token."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # one pass, which keeps NaN; takes a fifth of the time of `isfinite`
    return math.isfinite(low) and math.isfinite(high)
