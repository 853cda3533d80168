"""The architectures of GGUF files that are understood: the configuration of each, and the names of its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from swarm.weights.gguf.rotation import rotation
from swarm.weights.gguf.settings import Settings

Config = dict[str, Any]

# GGUF's and Transformers' names of the tensors of a block, as most architectures have them.
ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
ATTENTION_BIASES = {f"attn_{kind}.bias": f"self_attn.{kind}_proj.bias" for kind in "qkv"}
OUTPUT_BIAS = {"attn_output.bias": "self_attn.o_proj.bias"}
QUERY_KEY_NORMS = {f"attn_{kind}_norm.weight": f"self_attn.{kind}_norm.weight" for kind in "qk"}
FEED_FORWARD_NORM = {"ffn_norm.weight": "post_attention_layernorm.weight"}
FEED_FORWARD = {f"ffn_{kind}.weight": f"mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}
FEED_FORWARD_BIASES = {f"ffn_{kind}.bias": f"mlp.{kind}_proj.bias" for kind in ("gate", "up", "down")}
EXPERTS = {
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_exps.weight": "mlp.experts.gate_proj",
    "ffn_up_exps.weight": "mlp.experts.up_proj",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
}
POST_NORMS = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
DENSE = {**ATTENTION, **FEED_FORWARD_NORM, **FEED_FORWARD}
GEMMA = {**ATTENTION, **FEED_FORWARD, **POST_NORMS, "ffn_norm.weight": "pre_feedforward_layernorm.weight"}
ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class Architecture:
    """How a GGUF file of an architecture is read."""

    config: Callable[[Settings], Config]  # takes all of its settings; the content of config.json
    block: Callable[[Config], Mapping[str, str]]  # GGUF's and Transformers' names of a block's tensors
    ends: Mapping[str, str] = field(default_factory=lambda: ENDS)  # the same of all others
    blocks: str = "model.layers"  # what Transformers' names of all blocks' tensors begin with
    interleaved: bool = False  # pairs of rows that are rotated together are neighbours in queries and keys
    norm_offset: float = 0.0  # what the file adds to the weights of norms
    fused: str = ""  # layout of a tensor of queries, keys and values together: "bloom" or "falcon"


def common(settings: Settings, model_type: str, model_class: str) -> Config:
    """Return what the configurations of all families of Llama's kind have in common."""
    hidden, heads = settings.take("embedding_length"), settings.take("attention.head_count")
    groups, feed_forward = settings.take("attention.head_count_kv"), settings.take("feed_forward_length")
    if not all(isinstance(number, int) for number in (heads, groups, feed_forward)):
        raise ValueError("its blocks differ in their numbers of attention heads or in their size")
    config: Config = {
        "architectures": [model_class],
        "model_type": model_type,
        "vocab_size": vocabulary(settings),
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": settings.take("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_act": "silu",
        "max_position_embeddings": settings.take("context_length"),
        "rms_norm_eps": settings.take("attention.layer_norm_rms_epsilon"),
    }
    head_dim = settings.get("attention.key_length")
    settings.check("attention.value_length", head_dim or hidden // heads)
    config |= rotation(settings, head_dim or hidden // heads)
    if head_dim is not None:
        config["head_dim"] = head_dim
    config["attention_bias"] = "blk.0.attn_q.bias" in settings.tensors
    return config | tokens(settings)


def vocabulary(settings: Settings) -> int:
    """Return how many tokens the model has."""
    size = len(settings.tokenizer["tokens"])
    rows = int(settings.tensors["token_embd.weight"].shape[-1])
    if size != rows or settings.get("vocab_size", size) != size:
        raise ValueError(f"its tokenizer has not the {rows} tokens of its embeddings")
    return size


def tokens(settings: Settings) -> Config:
    """Return the settings that all models have, whatever they are."""
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    tied = "output.weight" not in settings.tensors
    return {"tie_word_embeddings": tied, **{ours: settings.tokenizer.get(theirs) for ours, theirs in names.items()}}


def llama(settings: Settings) -> Config:
    """Llama and Mistral, and with experts Mixtral: llama.cpp knows all three by one name."""
    experts, used = settings.get("expert_count", 0), settings.get("expert_used_count", 0)
    if not experts:
        config = common(settings, "llama", "LlamaForCausalLM")
        return config | ({"mlp_bias": True} if "blk.0.ffn_gate.bias" in settings.tensors else {})
    config = common(settings, "mixtral", "MixtralForCausalLM")
    return config | {"num_local_experts": experts, "num_experts_per_tok": used, "sliding_window": None}


def llama_block(config: Config) -> Mapping[str, str]:
    biases = {**ATTENTION_BIASES, **OUTPUT_BIAS} if config["attention_bias"] else {}
    if config["model_type"] == "mixtral":
        return {**ATTENTION, **FEED_FORWARD_NORM, **EXPERTS}
    return {**DENSE, **biases, **(FEED_FORWARD_BIASES if config.get("mlp_bias") else {})}


def qwen2(settings: Settings) -> Config:
    return common(settings, "qwen2", "Qwen2ForCausalLM")


def qwen3(settings: Settings) -> Config:
    return common(settings, "qwen3", "Qwen3ForCausalLM")


def qwen3_moe(settings: Settings) -> Config:
    return common(settings, "qwen3_moe", "Qwen3MoeForCausalLM") | {
        "num_experts": settings.take("expert_count"),
        "num_experts_per_tok": settings.take("expert_used_count"),
        "moe_intermediate_size": settings.take("expert_feed_forward_length"),
        "norm_topk_prob": True,  # llama.cpp always does
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def gemma2(settings: Settings) -> Config:
    config = common(settings, "gemma2", "Gemma2ForCausalLM") | {
        "attn_logit_softcapping": settings.take("attn_logit_softcapping"),
        "final_logit_softcapping": settings.take("final_logit_softcapping"),
    }
    return config | gemma_layers(settings, config, every=2, largest=46)


def gemma3(settings: Settings) -> Config:
    config = common(settings, "gemma3_text", "Gemma3ForCausalLM")
    config["final_logit_softcapping"] = settings.get("final_logit_softcapping")
    local = {"rope_type": "default", "rope_theta": settings.get("rope.freq_base_swa", 10000.0)}
    full = {"rope_type": "default", "rope_theta": config.pop("rope_theta"), **config.pop("rope_scaling", {})}
    config["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    return config | gemma_layers(settings, config, every=6, largest=62)


def gemma_layers(settings: Settings, config: Config, *, every: int, largest: int) -> Config:
    """Return which layers see only a window, and how scores are scaled: llama.cpp knows it, and files do not say it.

    :param every: one layer of so many sees all
    :param largest: the number of layers of the model of 27B, whose scale is another one
    """
    count, heads = config["num_hidden_layers"], config["num_attention_heads"]
    pattern = settings.get("attention.sliding_window_pattern", every)
    windows = [bool((i + 1) % pattern) for i in range(count)] if isinstance(pattern, int) else [*pattern]
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": settings.take("attention.sliding_window"),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "query_pre_attn_scalar": config["hidden_size"] // heads if count == largest else config["head_dim"],
    }


def phi3(settings: Settings) -> Config:
    # Without long and short factors, whose tensors are refused, this is the length of the context.
    settings.get("rope.scaling.original_context_length")
    config = common(settings, "phi3", "Phi3ForCausalLM")
    return config | {"sliding_window": settings.get("attention.sliding_window") or None}


def olmo2(settings: Settings) -> Config:
    return common(settings, "olmo2", "Olmo2ForCausalLM")


def smollm3(settings: Settings) -> Config:
    # llama.cpp leaves every fourth layer without rotation too, and files do not say it.
    return common(settings, "smollm3", "SmolLM3ForCausalLM") | {"no_rope_layer_interval": 4}


def granite(settings: Settings) -> Config:
    return common(settings, "granite", "GraniteForCausalLM") | {
        "attention_multiplier": settings.take("attention.scale"),
        "embedding_multiplier": settings.take("embedding_scale"),
        "residual_multiplier": settings.take("residual_scale"),
        "logits_scaling": settings.take("logit_scale"),
    }


def gpt_oss(settings: Settings) -> Config:
    config = common(settings, "gpt_oss", "GptOssForCausalLM") | {
        "num_local_experts": settings.take("expert_count"),
        "num_experts_per_tok": settings.take("expert_used_count"),
        "sliding_window": settings.take("attention.sliding_window"),
    }
    config["intermediate_size"] = settings.take("expert_feed_forward_length")
    if "rope_scaling" in config:
        config["rope_scaling"]["truncate"] = False  # so the model was trained
    return config


def gpt_oss_block(config: Config) -> Mapping[str, str]:
    experts = {name.replace("weight", "bias"): f"{ours}_bias" for name, ours in EXPERTS.items() if "exps" in name}
    return {
        **ATTENTION,
        **ATTENTION_BIASES,
        **OUTPUT_BIAS,
        **EXPERTS,
        **experts,
        "attn_sinks.weight": "self_attn.sinks",
        "post_attention_norm.weight": "post_attention_layernorm.weight",
        "ffn_gate_inp.weight": "mlp.router.weight",
        "ffn_gate_inp.bias": "mlp.router.bias",
    }


def bloom(settings: Settings) -> Config:
    settings.get("context_length")  # ALiBi has no limit
    hidden, heads = settings.take("embedding_length"), settings.take("attention.head_count")
    settings.check("attention.head_count_kv", heads)
    settings.check("feed_forward_length", 4 * hidden)
    return {
        "architectures": ["BloomModel"],
        "model_type": "bloom",
        "vocab_size": vocabulary(settings),
        "hidden_size": hidden,
        "n_layer": settings.take("block_count"),
        "n_head": heads,
        "layer_norm_epsilon": settings.take("attention.layer_norm_epsilon"),
        **tokens(settings),
        "tie_word_embeddings": True,
    }


def falcon(settings: Settings) -> Config:
    settings.check("tensor_data_layout", "jploski")
    hidden, heads = settings.take("embedding_length"), settings.take("attention.head_count")
    groups = settings.take("attention.head_count_kv")
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "vocab_size": vocabulary(settings),
        "hidden_size": hidden,
        "ffn_hidden_size": settings.take("feed_forward_length"),
        "num_hidden_layers": settings.take("block_count"),
        "num_attention_heads": heads,
        "num_kv_heads": groups,
        "multi_query": groups == 1,
        "new_decoder_architecture": groups != 1,
        "num_ln_in_parallel_attn": 2 if "blk.0.attn_norm_2.weight" in settings.tensors else 1,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
        "layer_norm_epsilon": settings.take("attention.layer_norm_epsilon"),
        "max_position_embeddings": settings.take("context_length"),
        **{name: value for name, value in rotation(settings, hidden // heads).items() if value is not None},
        **tokens(settings),
    }


def falcon_block(config: Config) -> Mapping[str, str]:
    two = config["new_decoder_architecture"] and config["num_ln_in_parallel_attn"] == 2
    norms = {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"} if two else {"attn_norm": "input_layernorm"}
    return {
        **{f"{name}.{kind}": f"{ours}.{kind}" for name, ours in norms.items() for kind in ("weight", "bias")},
        "attn_qkv.weight": "self_attention.query_key_value.weight",
        "attn_output.weight": "self_attention.dense.weight",
        "ffn_up.weight": "mlp.dense_h_to_4h.weight",
        "ffn_down.weight": "mlp.dense_4h_to_h.weight",
    }


BLOOM_BLOCK = {
    f"{name}.{kind}": f"{ours}.{kind}"
    for name, ours in {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attention.query_key_value",
        "attn_output": "self_attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    }.items()
    for kind in ("weight", "bias")
}
PHI3_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_qkv.weight": "self_attn.qkv_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    **FEED_FORWARD_NORM,
    "ffn_up.weight": "mlp.gate_up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
BLOOM_ENDS = {
    "token_embd.weight": "word_embeddings.weight",
    **{f"token_embd_norm.{kind}": f"word_embeddings_layernorm.{kind}" for kind in ("weight", "bias")},
    **{f"output_norm.{kind}": f"ln_f.{kind}" for kind in ("weight", "bias")},
}
FALCON_ENDS = {
    "token_embd.weight": "transformer.word_embeddings.weight",
    **{f"output_norm.{kind}": f"transformer.ln_f.{kind}" for kind in ("weight", "bias")},
    "output.weight": "lm_head.weight",
}
OLMO2_BLOCK = {**ATTENTION, **QUERY_KEY_NORMS, **FEED_FORWARD, **POST_NORMS}
del OLMO2_BLOCK["attn_norm.weight"]  # it has norms only afterwards

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(llama, llama_block, interleaved=True),
    "qwen2": Architecture(qwen2, lambda config: {**DENSE, **ATTENTION_BIASES}),
    "qwen3": Architecture(qwen3, lambda config: {**DENSE, **QUERY_KEY_NORMS}),
    "qwen3moe": Architecture(
        qwen3_moe, lambda config: {**ATTENTION, **QUERY_KEY_NORMS, **FEED_FORWARD_NORM, **EXPERTS}
    ),
    "gemma2": Architecture(gemma2, lambda config: GEMMA, norm_offset=1.0),
    "gemma3": Architecture(gemma3, lambda config: {**GEMMA, **QUERY_KEY_NORMS}, norm_offset=1.0),
    "phi3": Architecture(phi3, lambda config: PHI3_BLOCK),
    "olmo2": Architecture(olmo2, lambda config: OLMO2_BLOCK),
    "smollm3": Architecture(smollm3, llama_block, interleaved=True),
    "granite": Architecture(granite, llama_block, interleaved=True),
    "gpt-oss": Architecture(gpt_oss, gpt_oss_block),
    "bloom": Architecture(bloom, lambda config: BLOOM_BLOCK, BLOOM_ENDS, "h", fused="bloom"),
    "falcon": Architecture(falcon, falcon_block, FALCON_ENDS, "transformer.h", fused="falcon"),
}
