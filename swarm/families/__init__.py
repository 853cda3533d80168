"""The model families: what the swarm can compute, and what is refused by name.

BLOOM and Falcon are petals' own classes, restored for Transformers 5. Every other family is a name in ``FAMILIES``:
Transformers' own decoder layers are its blocks, and its attention is ours, see ``swarm.families.attention``.
"""

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
