"""A BLOOM of more than a billion random parameters, for machines that cannot download a real one.

Its blocks are like BLOOM-1b7's, 24 with a hidden size of 2,048; its vocabulary is the bundled model's.
"""

from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, BloomConfig

from config import Settings
from swarm import weights

NAME = "random-bloom-1b3"


def random_bloom(settings: Settings) -> str:
    """Return the model's directory, below the cache directory; it is written there once, in bfloat16."""
    directory = settings.cache_dir.absolute() / NAME
    if not directory.exists():
        unfinished = directory.with_name(f"{NAME}.part")
        write(unfinished, weights.locate(settings.default_model, cache_dir=settings.cache_dir))
        unfinished.rename(directory)
    return str(directory)


def write(directory: Path, tokenizer_of: str) -> None:
    """Write a random model with another model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = BloomConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        n_layer=24,
        n_head=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    tokenizer.save_pretrained(directory)
    # Without the head, which repeats the embeddings: as on the hub.
    AutoModel.from_config(config, torch_dtype=torch.bfloat16).save_pretrained(directory, safe_serialization=True)
