"""Linear layers whose weights are kept as the processor wants them: in its order, or in fewer bits.

PyTorch hands weights to oneDNN row by row, and oneDNN puts them into its own order in each call, which takes as long as
the product itself. Weights that were put in order once make a step of 16 rows 1.6 times (bfloat16) and 2.5 times
(float32) as fast. The ordering is what ``torch.compile`` does when it freezes a model, through the same operators.

Weights of fewer bits are read faster still, see ``swarm.products.loops``.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Protocol

import swarm.compat  # noqa: F401

import torch
import torch.nn.functional as F
from torch import nn

from swarm.products import choice, formats, loops
from swarm.products.formats import Weights

# From so many rows on it may pay to make float32 of weights first, so many values at once that they stay in a cache.
WIDE_ROWS, WIDE_VALUES = 64, 2**20


class Product(Protocol):
    """The product of inputs with weights, plus a bias if there is one."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return [..., outputs] of [..., inputs], in the dtype of the inputs."""

    def dense(self) -> torch.Tensor:
        """Return the weights, [outputs, inputs]."""


class PlainProduct:
    """PyTorch's own."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.weight, self.bias)

    def dense(self) -> torch.Tensor:
        return self.weight


class OrderedProduct:
    """With weights in oneDNN's order."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, choice.TYPICAL_ROWS)
        self._bias = bias

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return choice.ordered_product(inputs, self._packed, self._bias)

    def dense(self) -> torch.Tensor:
        return self._packed.to_dense()


class LoopedProduct:
    """With weights in one of ``swarm.products.formats``; computed in float32."""

    def __init__(self, weights: Weights, bias: torch.Tensor | None) -> None:
        self.weights = weights
        self._bias = None if bias is None else bias.float()
        self._spare = weights.filled - weights.inputs
        self._product = formats.product(weights, self._bias)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs
        if inputs.dim() != 2 or inputs.dtype != torch.float32 or not inputs.is_contiguous():
            rows = inputs.float().reshape(-1, inputs.shape[-1]).contiguous()
        if self._spare:
            rows = F.pad(rows, (0, self._spare))
        outputs = self._widened(rows) if len(rows) >= WIDE_ROWS and choice.widening_pays() else self._product(rows)
        if rows is inputs:  # as between the products of a decoding step, where each operator counts
            return outputs
        return outputs.to(inputs.dtype).view(*inputs.shape[:-1], self.weights.outputs)

    def _widened(self, rows: torch.Tensor) -> torch.Tensor:
        count = max(1, WIDE_VALUES // self.weights.filled)
        outputs = rows.new_empty(len(rows), self.weights.outputs)
        for first in range(0, self.weights.outputs, count):
            last = min(first + count, self.weights.outputs)
            bias = None if self._bias is None else self._bias[first:last]
            outputs[:, first:last] = F.linear(rows, self.weights.widened(first, last), bias)
        return outputs

    def dense(self) -> torch.Tensor:
        return self.weights.dense()


def make_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """Return the fastest product with a weight of [outputs, inputs] as it is."""
    if weight.dtype == torch.bfloat16 and can_loop(weight) and choice.loops_beat_onednn():
        return LoopedProduct(formats.rounded(weight, formats.BFLOAT16), bias)
    if choice.can_pack(weight):
        return OrderedProduct(weight, bias)
    if weight.dtype == torch.float16 and can_loop(weight):
        return LoopedProduct(formats.rounded(weight, formats.FLOAT16), bias)
    return PlainProduct(weight, bias)


def can_loop(weight: torch.Tensor) -> bool:
    """Whether this project's loops can compute with a weight of [outputs, inputs] in fewer bits."""
    return weight.device.type == "cpu" and weight.is_floating_point() and len(weight) >= loops.OUTPUTS


class _Differentiable(torch.autograd.Function):
    """The product where petals wants gradients, as for ``rpc_backward``."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, product: Product) -> torch.Tensor:
        ctx.product = product
        return product(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ ctx.product.dense().to(gradients[0].dtype), None


class PackedLinear(nn.Module):
    """One or several linear layers that have the same input, as one product.

    It stands in for the layers, which it frees where it can pack; elsewhere the layers share its weight.
    """

    def __init__(self, *linears: Any, rounding: Weights | None = None) -> None:
        """Take layers with a ``weight`` of [outputs, inputs] and a ``bias`` or None, or others of this class.

        :param rounding: of the only layer's weight: what to compute with in its place
        """
        super().__init__()
        biases = [layer.bias.data for layer in linears if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        known = [rounding or rounded_weights(layer) for layer in linears]
        alike = [weights for weights in known if weights is not None]
        self.product: Product
        if len(alike) == len(linears) and len({weights.format for weights in alike}) == 1:
            self.product = LoopedProduct(formats.joined(alike), self.bias)
        else:
            matrices = [dense_weight(layer) for layer in linears]
            self.product = make_product(matrices[0] if len(matrices) == 1 else torch.cat(matrices), self.bias)

    @property
    def weights(self) -> Weights | None:
        """What it computes with if its weights were rounded, or lie as if they were."""
        return self.product.weights if isinstance(self.product, LoopedProduct) else None

    @property
    def holds_copy(self) -> bool:
        """Whether it needs the layers' own weights no longer."""
        return not isinstance(self.product, PlainProduct)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs of all layers, one after the other: [..., all their features]."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            # As rows: of more dimensions oneDNN returns a view, in which nobody may add something in place.
            rows: torch.Tensor = _Differentiable.apply(inputs.flatten(0, -2), self.product)
            return rows.unflatten(0, inputs.shape[:-1])
        return self.product(inputs)


def rounded_weights(layer: Any) -> Weights | None:
    """Return a layer's rounded weights, if it has some."""
    return layer.weights if isinstance(layer, PackedLinear) else None


def dense_weight(layer: Any) -> torch.Tensor:
    """Return a layer's weight, [outputs, inputs]."""
    weight: torch.Tensor = layer.product.dense() if isinstance(layer, PackedLinear) else layer.weight.data
    return weight


class _Share(nn.Module):
    """One of the layers of a fused product, for whoever computes them one by one; it costs as much as all of them."""

    def __init__(self, fused: PackedLinear, rows: slice) -> None:
        super().__init__()
        self.fused = fused
        self.rows = rows

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fused(inputs)[..., self.rows]


def fuse(parent: Any, *names: str) -> PackedLinear:
    """Return the product of a module's linear layers of these names. The module works as before, with the same memory.

    :param parent: computes with its layers; it must not look at their weights
    """
    layers = [getattr(parent, name) for name in names]
    if len(layers) == 1 and isinstance(layers[0], PackedLinear):
        return layers[0]
    sizes = [len(dense_weight(layer)) if rounded_weights(layer) is None else layer.weights.outputs for layer in layers]
    fused = PackedLinear(*layers)
    offset = 0
    for name, layer, size in zip(names, layers, sizes, strict=True):
        rows = slice(offset, offset + size)
        if not fused.holds_copy:
            layer.weight.data = fused.product.dense()[rows]
        else:
            setattr(parent, name, fused if len(names) == 1 else _Share(fused, rows))
        offset = rows.stop
    return fused


def separate(block: nn.Module) -> None:
    """Undo what ``fuse`` did to a module's layers, and those of its parts: each is a layer of its own again.

    Those whose weights are rounded stay so.
    """
    for parent in list(block.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, PackedLinear) and layer.weights is None and layer.holds_copy:
                setattr(parent, name, _plain_linear(layer, slice(None)))
            elif isinstance(layer, _Share):
                setattr(parent, name, _plain_linear(layer.fused, layer.rows))


def _plain_linear(fused: PackedLinear, rows: slice) -> nn.Module:
    bias = None if fused.bias is None else nn.Parameter(fused.bias[rows].clone(), requires_grad=False)
    if fused.weights is not None:
        stand_in = SimpleNamespace(bias=bias)
        return PackedLinear(stand_in, rounding=fused.weights.part(rows))
    weight = fused.product.dense()[rows].clone()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]
    return linear


def rounded_layers(block: nn.Module, quant: str, known: Mapping[str, Weights] | None = None) -> None:
    """Round the weights of a block's linear layers, and compute with these from now on.

    :param quant: a format, see ``rounding``, or ``"auto"``
    :param known: weights that were rounded before, by the names of the block's parameters
    """
    for path, parent in list(block.named_modules()):
        for name, layer in list(parent.named_children()):
            weights = (known or {}).get(f"{path}.{name}.weight".removeprefix("."))
            if isinstance(layer, nn.Linear) and (weights is not None or can_loop(layer.weight)):
                setattr(parent, name, PackedLinear(layer, rounding=weights or rounding(layer.weight.data, quant)))


def rounding(weight: torch.Tensor, quant: str) -> Weights:
    """Return a weight in a format.

    :param quant: ``"int8"``, ``"int4"``, or ``"auto"``: the smallest format in which it loses nothing, as weights of a
        GGUF file may have been quantised, or else 16 bits
    """
    if quant != "auto":
        return formats.rounded(weight, quant)
    if (exact := formats.exactly(weight)) is not None:
        return exact
    # Of float32, float16 keeps three more bits than bfloat16, as long as it holds the largest.
    fits = weight.abs().max() <= torch.finfo(torch.float16).max
    return formats.rounded(weight, formats.FLOAT16 if fits else formats.BFLOAT16)
