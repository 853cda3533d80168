"""Tiny random checkpoints of every family, as current Transformers saves them, and what their blocks compute."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import swarm.compat  # noqa: F401

import torch
import transformers
from petals import AutoDistributedConfig
from transformers import AutoModelForCausalLM

from swarm.families.adopt import adopt
from swarm.families.checkpoint import load_block
from swarm.products.linear import rounding
from swarm.server.blocks import Part, RaggedBlocks
from tests.support.tiny import alone, make_tokenizer

Chosen = TypeVar("Chosen")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
GPT_OSS_YARN = {**YARN, "rope_theta": 150000.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}


def chosen(every: Iterable[Chosen], usual: Sequence[Chosen]) -> list[Chosen]:
    """Return the variants that whole swarms are tried with: the usual ones, or all if ``FAMILIES`` is ``all``."""
    return list(every) if os.environ.get("FAMILIES") == "all" else list(usual)


# Transformers' names of the classes, and what makes each variant one: a window shorter than the prompts, heads that are
# not hidden size / heads, and so on.
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "mistral": ("Mistral", {"sliding_window": 8, "head_dim": 32}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "head_dim": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "gemma2": ("Gemma2", {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 32, "sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24},
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "sliding_window": 8,
            "rope_parameters": GPT_OSS_YARN,
        },
    ),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 3.0,
        },
    ),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5}),
}


def made_once(base: Callable[[], Path], make: Callable[[Path, str], Path]) -> Callable[[str], Path]:
    """Return what makes a checkpoint of a variant when it is first asked for it.

    :param base: makes a directory
    """

    @functools.cache
    def get(variant: str) -> Path:
        return make(base() / variant, variant)

    return get


# What all tiny models have.
TINY: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "max_position_embeddings": 512,
}


@alone
def make_tiny_family(directory: Path, variant: str, **options: Any) -> Path:
    """Write a random checkpoint of one of ``VARIANTS``, of four layers.

    :param options: settings that this one shall have in place of the variant's
    """
    stem, settings = VARIANTS[variant]
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    usual = {
        **TINY,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    }
    config = getattr(transformers, f"{stem}Config")(**{**usual, **settings, **options})
    model = getattr(transformers, f"{stem.removesuffix('Text')}ForCausalLM")(config)
    return save_stirred(model, tokenizer, directory)


def save_stirred(model: Any, tokenizer: Any, directory: Path) -> Path:
    """Write a random checkpoint whose norms, biases and sinks do something: Transformers makes them ones and zeros."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("norm", "ln_", "sinks")) or name.endswith("bias"):
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def load_blocks(path: Path, quant: str | None = None) -> tuple[Any, list[Any]]:
    adopt(str(path))
    config = AutoDistributedConfig.from_pretrained(str(path))
    count = config.num_hidden_layers
    options = {"config": config, "torch_dtype": torch.float32, "quant": quant}
    return config, [load_block(str(path), i, **options) for i in range(count)]


@torch.inference_mode()
def reference_states(path: Path, tokens: int = 60, quant: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs of the first block and outputs of the last, [tokens, hidden size] each.

    :param quant: how the weights of the layers are rounded before; plain Transformers computes with the result
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}

    def note_inputs(module: Any, args: Any, kwargs: Any) -> None:
        seen["inputs"] = (args[0] if args else kwargs["hidden_states"])[0].clone()

    base = model.base_model
    for layer in (base.h if hasattr(base, "h") else base.layers).modules():
        if quant is not None and isinstance(layer, torch.nn.Linear):
            layer.weight.data = rounding(layer.weight.data, quant).dense()
        elif quant is not None and hasattr(layer, "gate_up_proj") and hasattr(layer, "num_experts"):
            for matrices in (layer.gate_up_proj.data, layer.down_proj.data):
                for matrix in matrices:  # [out, in], but for gpt-oss, which has them the other way round
                    matrix.copy_(
                        rounding(matrix.T, quant).dense().T if layer.is_transposed else rounding(matrix, quant).dense()
                    )
    first, norm = (base.h[0], base.ln_f) if hasattr(base, "h") else (base.layers[0], base.norm)
    first.register_forward_pre_hook(note_inputs, with_kwargs=True)
    norm.register_forward_pre_hook(lambda module, args: seen.update(outputs=args[0][0].clone()))
    model(torch.randint(4, 400, (1, tokens), generator=torch.Generator().manual_seed(1)))
    return seen["inputs"], seen["outputs"]


@torch.inference_mode()
def in_batches(blocks: RaggedBlocks, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Compute the inputs as two sequences that share batches, in steps of different sizes."""
    caches = blocks.cache_descriptor(0, len(blocks.blocks), 2, 128).make_zeros().sequences
    batches: list[list[tuple[int, int, int]]] = [  # sequence, start, tokens
        [(0, 0, 5), (1, 0, 40)],
        [(0, 5, 1), (1, 40, 1)],
        [(0, 6, 1), (1, 41, 9)],
        [(0, 7, 40), (1, 50, 1)],
        [(0, 47, 1), (1, 51, 9)],
        [(0, 48, 12)],
    ]
    outputs: list[list[torch.Tensor]] = [[], []]
    for batch in batches:
        parts = [Part(caches[sequence], start, size) for sequence, start, size in batch]
        hidden = torch.cat([inputs[start : start + size] for _, start, size in batch])
        computed = blocks.forward(hidden, parts, 0, len(blocks.blocks))
        for (sequence, _, _), rows in zip(batch, computed.split([size for *_, size in batch]), strict=True):
            outputs[sequence].append(rows)
    return [torch.cat(rows) for rows in outputs]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=float(expected.abs().max()) * 2e-5)


@torch.inference_mode()
def as_petals_calls(blocks: Sequence[Any], inputs: torch.Tensor, steps: Sequence[tuple[int, int]]) -> torch.Tensor:
    past: list[Any] = [None] * len(blocks)
    outputs = []
    for start, end in steps:
        hidden = inputs[None, start:end]
        for i, block in enumerate(blocks):
            hidden, past[i] = block(hidden, layer_past=past[i], use_cache=True)
        outputs.append(hidden[0])
    return torch.cat(outputs)
