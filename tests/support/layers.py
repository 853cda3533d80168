"""A module whose linear layers can be fused."""

import torch
from torch import nn


class Layers(nn.Module):
    """Two layers with the same input, and one without a bias."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(inputs, 20), nn.Linear(inputs, 8)
        self.alone = nn.Linear(inputs, 6, bias=False)
        self.requires_grad_(False)
