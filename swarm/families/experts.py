"""Experts (https://arxiv.org/abs/1701.06538) whose weights are rounded to fewer bits."""

from types import SimpleNamespace
from typing import Any

import swarm.compat  # noqa: F401

import torch
from torch import nn

from swarm.products.linear import PackedLinear, can_loop, rounding

PROJECTIONS = ("gate_up_proj", "down_proj")


class RoundedExperts(nn.Module):
    """Stands in for Transformers' module of a layer's experts: one product after the other, those of an expert's rows.

    Only the module's gate is still used; its weights are freed.
    """

    def __init__(self, experts: Any, quant: str) -> None:
        """Take a module as ``is_experts`` knows it.

        :param quant: see ``swarm.products.linear.rounding``
        """
        super().__init__()
        self.experts = experts
        self.gate_up, self.down = (rounded_projection(experts, name, quant) for name in PROJECTIONS)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the sum of what each row's experts make of it, [rows, hidden size].

        :param hidden: the same
        :param chosen: experts' numbers, [rows, experts of each]
        :param weights: of what they make, the same shape
        """
        outputs = torch.zeros_like(hidden)
        for number in chosen.unique().tolist():
            rows, places = torch.where(chosen == number)
            gated = self.experts._apply_gate(self.gate_up[number](hidden[rows]))
            weighted = self.down[number](gated) * weights[rows, places, None]
            outputs.index_add_(0, rows, weighted.to(outputs.dtype))
        return outputs


def rounded_projection(experts: Any, name: str, quant: str) -> nn.ModuleList:
    """Return the layer of each expert, and free the experts' own weights."""
    matrices, biases = getattr(experts, name), getattr(experts, f"{name}_bias", None)
    setattr(experts, name, None)
    layers = []
    for number, matrix in enumerate(matrices.data):
        weight = as_layers(experts, matrix)
        bias = SimpleNamespace(bias=None if biases is None else biases[number])
        layers.append(PackedLinear(bias, rounding=rounding(weight, quant)))
    return nn.ModuleList(layers)


def as_layers(experts: Any, matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices as linear layers have them, [..., out, in]."""
    return matrices.transpose(-1, -2) if experts.is_transposed else matrices


def is_experts(module: Any) -> bool:
    """Whether this is a module of all experts of a layer, which are gated, and whose weights loops can compute with."""
    if not hasattr(module, "_apply_gate") or not all(hasattr(module, name) for name in PROJECTIONS):
        return False
    return all(can_loop(as_layers(module, getattr(module, name).data[0])) for name in PROJECTIONS)


def rounded_experts(block: nn.Module, quant: str) -> None:
    """Round the weights of a block's experts, and compute with these from now on.

    :param quant: see ``swarm.products.linear.rounding``
    """
    for parent in list(block.modules()):
        for name, module in list(parent.named_children()):
            if is_experts(module):
                setattr(parent, name, RoundedExperts(module, quant))
