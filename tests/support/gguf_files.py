"""Writes tiny checkpoints as GGUF files, with gguf's own tables of names: what llama.cpp's converter would write."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "bloom": gguf.MODEL_ARCH.BLOOM,
    "falcon": gguf.MODEL_ARCH.FALCON,
}
# Whose queries and keys llama.cpp reorders.
PERMUTED = ("llama", "mistral", "mixtral", "smollm3", "granite")
CONTROL, NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL


def write_gguf(
    checkpoint: Path, file: Path, kind: str = "F32", sentencepiece: Path | None = None, **extra: Any
) -> Path:
    """Write a checkpoint as a GGUF file.

    :param kind: of the matrices: F32, F16, Q8_0, ...
    :param sentencepiece: a model of SentencePiece that takes the tokenizer's place
    :param extra: further settings, with "__" for "." in their names; "arch" stands for the architecture
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    add_settings(writer, config)
    if sentencepiece is None:
        add_tokenizer(writer, checkpoint)
    else:
        add_sentencepiece(writer, sentencepiece, config.vocab_size)
    for name, value in extra.items():
        key = name.replace("__", ".").replace("arch.", f"{writer.arch}.")
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in tensors(model):
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, f"gguf has no name for {name}"
        add_tensor(writer, known, tensor, kind)
    if config.model_type == "llama" and config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(model))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: str) -> None:
    data = np.ascontiguousarray(tensor.detach().numpy())
    dtype = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[dtype][0]
    if data.ndim < 2 or data.shape[-1] % block or kind == "F32":
        writer.add_tensor(name, data)
    else:
        writer.add_tensor(name, gguf.quantize(data, dtype), raw_dtype=dtype)


def add_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    if config.model_type in ("bloom", "falcon"):
        add_older_settings(writer, config)
        return
    head_dim = getattr(config, "head_dim", None)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(0)
    if head_dim is not None and config.model_type != "granite":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    add_rotation(writer, config, head_dim or config.hidden_size // config.num_attention_heads)
    if config.model_type in PERMUTED:
        writer.add_vocab_size(config.vocab_size)
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type in ("qwen3_moe", "gpt_oss"):
        size = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        writer.add_expert_feed_forward_length(size)
    if config.model_type in ("gemma2", "gemma3_text", "gpt_oss", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def add_rotation(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    rotation = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rotation["rope_theta"])
    if config.model_type in (*PERMUTED, "phi3"):
        writer.add_rope_dimension_count(int(head_dim * rotation.get("partial_rotary_factor", 1.0)))
    if rotation["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rotation["rope_type"]))
        writer.add_rope_scaling_factor(rotation["factor"])
    if rotation["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rotation["original_max_position_embeddings"])


def add_older_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    groups = config.num_attention_heads
    if config.model_type == "falcon":
        writer.add_tensor_data_layout("jploski")
        groups = config.num_kv_heads if config.new_decoder_architecture else 1
    writer.add_context_length(2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(4 * config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path) -> None:
    """Write a tokenizer of byte-level BPE that splits texts as GPT-2 does."""
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([CONTROL if token in special else NORMAL for token, _ in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(special["<s>"])
    writer.add_eos_token_id(special["</s>"])
    writer.add_pad_token_id(special["<pad>"])
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")


def add_sentencepiece(writer: gguf.GGUFWriter, file: Path, size: int) -> None:
    """:param size: of the vocabulary, which is filled up to it"""
    model = SentencePieceProcessor(str(file))
    numbers = range(model.vocab_size())
    missing = range(size - len(numbers))
    kinds = [
        gguf.TokenType.UNKNOWN
        if model.IsUnknown(number)
        else CONTROL
        if model.IsControl(number)
        else gguf.TokenType.BYTE
        if model.IsByte(number)
        else NORMAL
        for number in numbers
    ]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*(model.IdToPiece(number) for number in numbers), *(f"[PAD{i}]" for i in missing)])
    writer.add_token_scores([*(model.GetScore(number) for number in numbers), *(-10000.0 for _ in missing)])
    writer.add_token_types([*kinds, *(gguf.TokenType.UNUSED for _ in missing)])
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())


def tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names as gguf's tables know them, and tensors as llama.cpp wants them."""
    config = model.config
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if config.model_type in PERMUTED and ".q_proj." in name:
            tensor = permuted(tensor, config.num_attention_heads)
        if config.model_type in PERMUTED and ".k_proj." in name:
            tensor = permuted(tensor, config.num_key_value_heads)
        if config.model_type == "bloom":
            name = name.removeprefix("transformer.")
        if "query_key_value" in name:
            tensor = ungrouped(tensor, config)
        if ".experts." in name:
            yield from expert_tensors(name, tensor, transposed=config.model_type == "gpt_oss")
        elif name.endswith("sinks"):
            yield f"{name}.weight", tensor
        else:
            yield name, tensor


def permuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, -1)
    return halves.transpose(1, 2).reshape(tensor.shape)


def ungrouped(tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """Put all queries first, then all keys, then all values."""
    heads = groups = config.num_attention_heads
    if config.model_type == "falcon":
        groups = config.num_kv_heads if config.new_decoder_architecture else 1
    size = config.hidden_size // heads
    rows = tensor.reshape(groups, heads // groups + 2, size, *tensor.shape[1:])
    return torch.cat([rows[:, :-2].flatten(0, 2), rows[:, -2].flatten(0, 1), rows[:, -1].flatten(0, 1)])


def expert_tensors(name: str, tensor: torch.Tensor, *, transposed: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield gates and upward projections of all experts, each in one tensor, [experts, out, in]."""
    stem, suffix = (name.removesuffix("_bias"), ".bias") if name.endswith("_bias") else (name, ".weight")
    if transposed and suffix == ".weight":
        tensor = tensor.transpose(1, 2)
    if not stem.endswith("gate_up_proj"):
        yield f"{stem}{suffix}", tensor
        return
    gate, up = (tensor[:, ::2], tensor[:, 1::2]) if transposed else tensor.chunk(2, dim=1)
    yield f"{stem.replace('gate_up', 'gate')}{suffix}", gate
    yield f"{stem.replace('gate_up', 'up')}{suffix}", up


def llama3_divisors(model: Any) -> Any:
    """Return by what Llama 3 divides the frequencies of its rotation."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    assert math.isclose(float(plain[0]), 1.0)
    return (plain / model.model.rotary_emb.inv_freq).numpy()
