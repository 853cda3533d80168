"""The model families: what the swarm can compute, and what is refused by name.

BLOOM and Falcon are petals' own classes, restored for Transformers 5. Every other family is a name in ``FAMILIES``:
Transformers' own decoder layers are its blocks, and its attention is ours, see ``swarm.families.attention``.
"""

from fractions import Fraction
from typing import Any

FAMILIES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "olmo2",
    "smollm3",
    "granite",
    "phi3",
)
# Whose classes petals has.
PETALS_FAMILIES = ("bloom", "falcon")


def head_size(config: Any) -> int:
    """Return the size of an attention head; in many families it is not hidden size / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_share(config: Any) -> Fraction:
    """Return how many values all heads have for each of the hidden size. Petals counts as if it were one."""
    return Fraction(config.num_attention_heads * head_size(config), config.hidden_size)
