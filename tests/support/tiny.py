"""A tiny random BLOOM with a tokenizer of its own, made on the fly: real files in the layout of the hub."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from swarm.client.model import LOADING

# Text in several scripts, so that the tokenizer learns merges and still has to spell some characters in bytes.
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Who said that? Nobody, said the swarm of servers.",
    "Ein Schwarm von Servern hält die Blöcke. Une abeille, deux abeilles, trois abeilles.",
    "блоки модели хранятся на серверах. 分散された大規模言語モデル。",
]


Made = TypeVar("Made", bound=Callable[..., Any])


def alone(make: Made) -> Made:
    """Let nobody else in this process make or load a model meanwhile: an app may be loading one in the background."""

    @functools.wraps(make)
    def made(*args: Any, **options: Any) -> Any:
        with LOADING:
            return make(*args, **options)

    return cast(Made, made)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with BLOOM's special tokens on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


@alone
def make_tiny_bloom(directory: Path, *, n_layer: int = 4, hidden_size: int = 64, seed: int = 1) -> Path:
    """Write a random BLOOM checkpoint; its greedy texts vary instead of repeating one token."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = BloomConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        n_layer=n_layer,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # ten times the usual
    )
    model = BloomForCausalLM(config)
    with torch.no_grad():
        for block in model.transformer.h:
            # With blocks that weigh no more than the embeddings, a model so small repeats its last token for ever.
            block.self_attention.dense.weight *= 3
            block.mlp.dense_4h_to_h.weight *= 3
    # From `.transformer`, as on the hub: the servers look for the keys h.N.*.
    model.transformer.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)
    return directory


def make_tiny_llama(directory: Path) -> Path:
    """Write a random Llama checkpoint with grouped queries, as Llama-2-70B's and SmolLM2's."""
    options = {"num_hidden_layers": 4, "num_key_value_heads": 2, "intermediate_size": 160}
    return save_random(LlamaForCausalLM, LlamaConfig, directory, **options)


@alone
def save_random(model: type[PreTrainedModel], config: type[PretrainedConfig], directory: Path, **options: Any) -> Path:
    """Write a random checkpoint of some family, small in everything that ``options`` leave out."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model(
        config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.2,
            **options,
        )
    ).save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)
    return directory


@alone
def load_reference(directory: Path) -> BloomForCausalLM:
    """Load the checkpoint into plain Transformers, float32."""
    return BloomForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
