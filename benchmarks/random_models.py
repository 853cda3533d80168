"""Models of random weights, for machines that cannot download real ones: as large and as fast; their text is noise."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, PretrainedConfig, Qwen3Config

from config import Settings
from swarm import weights

Make = Callable[..., PretrainedConfig]


def bloom(vocabulary: int, **tokens: int) -> PretrainedConfig:
    """Blocks like BLOOM-1b7's, with the tokenizer's vocabulary: 1.3 billion parameters."""
    return BloomConfig(vocab_size=vocabulary, hidden_size=2048, n_layer=24, n_head=16, **tokens)


def qwen3(vocabulary: int, **tokens: int) -> PretrainedConfig:
    """Qwen3-0.6B's shape, its vocabulary included."""
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        **tokens,
    )


RANDOM: Mapping[str, Make] = {"bloom": bloom, "qwen3": qwen3}


def random_model(kind: str, settings: Settings) -> str:
    """Return a model's directory, below the cache directory; it is written there once, in bfloat16.

    :param kind: one of ``RANDOM``
    """
    directory = settings.cache_dir.absolute() / f"random-{kind}"
    if not directory.exists():
        unfinished = directory.with_name(f"{directory.name}.part")
        write(unfinished, RANDOM[kind], weights.locate(settings.default_model, cache_dir=settings.cache_dir))
        unfinished.rename(directory)
    return str(directory)


def write(directory: Path, make: Make, tokenizer_of: str) -> None:
    """Write a random model with another model's tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_of)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    config = make(len(tokenizer), **{name: getattr(tokenizer, name) for name in names})
    torch.manual_seed(0)
    tokenizer.save_pretrained(directory)
    # The head of both repeats the embeddings, and is left out: as on the hub.
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
