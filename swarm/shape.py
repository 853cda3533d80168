"""What a model's configuration says of the shape of its attention."""

from fractions import Fraction
from typing import Any


def head_size(config: Any) -> int:
    """Return the size of an attention head; in many families it is not hidden size / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_share(config: Any) -> Fraction:
    """Return how many values all heads have for each of the hidden size. Petals counts as if it were one."""
    return Fraction(config.num_attention_heads * head_size(config), config.hidden_size)
