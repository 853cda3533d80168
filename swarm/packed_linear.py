"""Matrix products with weights that are kept in the order in which the processor wants them.

A decoding step is a handful of rows times every weight of the model. PyTorch hands weights to oneDNN row by row, and
oneDNN puts them into its own order in each call, which takes as long as the product itself. Weights that were put in
order once make a step of 16 rows 1.6 times (bfloat16) and 2.5 times (float32) as fast. The ordering is what
``torch.compile`` does when it freezes a model, through the same operators.
"""

from typing import Any

import swarm.compat  # noqa: F401

import torch
import torch.nn.functional as F
from torch import nn

# The order is chosen for a number of rows; this one is as good as any for 1 to 128.
TYPICAL_ROWS = 16


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN computes products with such a weight."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and (torch.backends.mkldnn.is_available())
    )


class _Product(torch.autograd.Function):
    """The product where petals wants gradients, as for ``rpc_backward``."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.packed = packed
        return _product(inputs, packed, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0] @ ctx.packed.to_dense(), None, None


def _product(inputs: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(inputs, packed, bias, "none", [], "")


class PackedLinear(nn.Module):
    """One or several linear layers that have the same input, as one product.

    It stands in for the layers, which it frees where it can pack; elsewhere the layers share its weight.
    """

    def __init__(self, *linears: Any) -> None:
        """Take layers with a ``weight`` of [outputs, inputs] and a ``bias`` or None."""
        super().__init__()
        weight = linears[0].weight.data if len(linears) == 1 else torch.cat([layer.weight.data for layer in linears])
        biases = [layer.bias.data for layer in linears if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.packed: torch.Tensor | None = None
        self.weight: torch.Tensor | None = None
        if can_pack(weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        else:
            self.weight = weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs of all layers, one after the other: [..., all their features]."""
        if self.packed is None:
            return F.linear(inputs, self.weight, self.bias)  # type: ignore[arg-type]
        if torch.is_grad_enabled() and inputs.requires_grad:
            # As rows: of more dimensions oneDNN returns a view, in which nobody may add something in place.
            rows = _Product.apply(inputs.flatten(0, -2), self.packed, self.bias)
            return rows.unflatten(0, inputs.shape[:-1])
        return _product(inputs, self.packed, self.bias)


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
    linears = [getattr(parent, name) for name in names]
    fused = PackedLinear(*linears)
    offset = 0
    for name, linear in zip(names, linears, strict=True):
        rows = slice(offset, offset + linear.out_features)
        if fused.weight is not None:
            linear.weight.data = fused.weight[rows]
        else:
            setattr(parent, name, fused if len(names) == 1 else _Share(fused, rows))
        offset = rows.stop
    return fused


def separate(block: nn.Module) -> None:
    """Undo what ``fuse`` did to a module's layers, and those of its parts: each is a layer of its own again."""
    for parent in list(block.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, PackedLinear) and layer.packed is not None:
                setattr(parent, name, _plain_linear(layer, slice(None)))
            elif isinstance(layer, _Share):
                setattr(parent, name, _plain_linear(layer.fused, layer.rows))


def _plain_linear(fused: PackedLinear, rows: slice) -> nn.Linear:
    assert fused.packed is not None
    weight = fused.packed.to_dense()[rows].clone()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=fused.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if fused.bias is not None:
        linear.bias = nn.Parameter(fused.bias[rows].clone(), requires_grad=False)
    return linear
