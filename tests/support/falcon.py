"""Tiny random checkpoints of every variant of Falcon."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import FalconConfig, FalconForCausalLM

from tests.support.families import save_stirred
from tests.support.tiny import alone, make_tokenizer

NEWER = {"new_decoder_architecture": True, "num_kv_heads": 2}
FIRST = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}  # RW-1B, RW-7B
DROPOUT = {"hidden_dropout": 0.5, "attention_dropout": 0.5}  # for training, not for us
FALCON_VARIANTS: Mapping[str, dict[str, Any]] = {
    "40b": NEWER,
    "40b-biased": {**NEWER, "bias": True},
    "11b": {
        **NEWER,
        "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
        "ffn_hidden_size": 160,
        "rope_theta": 500042.0,
    },
    "40b-alibi": {**NEWER, "alibi": True},
    "7b": {},
    "7b-biased": {"bias": True, **DROPOUT},
    "7b-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "7b-alibi": {"alibi": True},
    "7b-sequential": {"parallel_attn": False},
    "rw": FIRST,
    "rw-unbiased": {**FIRST, "bias": False},
    "rw-12-heads": {**FIRST, "num_attention_heads": 12, "hidden_size": 96},
    "rw-parallel": {**FIRST, "parallel_attn": True, **DROPOUT},
    "rw-rotary": {**FIRST, "alibi": False},
}


@alone
def make_tiny_falcon(directory: Path, variant: str = "40b", layers: int = 4) -> Path:
    """Write a random checkpoint of one of ``FALCON_VARIANTS``."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "num_attention_heads": 4, **FALCON_VARIANTS[variant]}
    config = FalconConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
        **settings,
    )
    model = FalconForCausalLM(config)
    with torch.no_grad():
        for block in model.transformer.h:  # as of the tiny BLOOM: or some variants repeat one token
            block.self_attention.dense.weight *= 3
            block.mlp.dense_4h_to_h.weight *= 3
    return save_stirred(model, tokenizer, directory)
