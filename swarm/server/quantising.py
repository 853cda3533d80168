"""Who quantises a server's weights: this project's loops on a CPU, where steps are batched; petals elsewhere."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import swarm.compat  # noqa: F401

from petals.utils.convert_block import QuantType
from torch import nn

from swarm import hardware
from swarm.options import ServerOptions
from swarm.products import formats
from swarm.products.linear import PackedLinear

# What the loops compute with, see ``swarm.products.linear.rounding``.
LOOPED = ("auto", "int8", "int4")
# How servers announce the formats.
ANNOUNCED = {formats.INT8: "int8", formats.INT8_GROUPS: "int8", formats.INT4: "int4"}


def by_loops(options: ServerOptions) -> str | None:
    """Return how weights are rounded when blocks are loaded; None: they are not."""
    if not on_cpu(options) or not options.batching:
        return None
    if options.quant is None:
        dtype = options.dtype or hardware.pick_dtype("cpu")
        return "auto" if options.dtype is None and dtype == "float32" else None
    return options.quant if options.quant in LOOPED else None


def by_petals(options: ServerOptions) -> QuantType:
    """Return how petals quantises the weights."""
    known = {kind.name.lower(): kind for kind in QuantType}
    return QuantType.NONE if by_loops(options) is not None else known.get(options.quant or "none", QuantType.NONE)


def announced(blocks: Iterable[nn.Module]) -> str | None:
    """Return how most weights of blocks were rounded, as a server announces it; None: to 16 bits, or not at all."""
    counts: Counter[str | None] = Counter()
    for layer in (module for block in blocks for module in block.modules()):
        if isinstance(layer, PackedLinear) and layer.weights is not None:
            counts[ANNOUNCED.get(layer.weights.format)] += layer.weights.outputs * layer.weights.inputs
    return counts.most_common(1)[0][0] if counts else None


def refusal(options: ServerOptions, config: Any) -> str | None:
    """Return why weights cannot be quantised as wanted, or None.

    :param config: petals' configuration of the model
    """
    if options.quant in (None, "none", "auto"):
        return None
    if by_loops(options) is None and getattr(config, "num_local_experts", None):
        return (
            f"is not supported for models with experts ({config.model_type}) but on a CPU, by batching servers: "
            "bitsandbytes would quantise all but the experts, which are most of the weights"
        )
    if options.quant == "int4" and by_loops(options) is None:
        return "is only for a CPU, and not for --no-batching; --quant nf4 takes as many bits"
    return None


def on_cpu(options: ServerOptions) -> bool:
    """Whether the server computes on a CPU."""
    return (options.device or hardware.pick_device()).startswith("cpu")
