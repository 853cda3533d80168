"""What is not supported is refused by name, at start and in one sentence: nothing is ever silently wrong."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from config import Settings
from models.loading import Models
from swarm.errors import ModelUnavailable
from swarm.families.adopt import adopt
from swarm.families.configuration import read_supported
from swarm.options import ServerOptions
from swarm.server.serve import server_arguments
from tests.support.families import TINY, make_tiny_family
from tests.support.processes import END_TIMEOUT, ROOT, START_TIMEOUT

SUPPORTED = (
    "bloom, falcon, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma2, gemma3_text, gpt_oss, olmo2, "
    "smollm3, granite, phi3"
)
ROTATIONS = "default, linear, llama3, yarn"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 480,
    **TINY,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# What config.json has beside LLAMA's settings, and what a user is told.
REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "unknown family": (
        {"model_type": "deepseek_v3"},
        f"models of type 'deepseek_v3' are not supported; these are: {SUPPORTED}",
    ),
    "no family of Transformers": (
        {"model_type": "my_model", "auto_map": {"AutoConfig": "configuration_my_model.MyConfig"}},
        f"models of type 'my_model', which bring code of their own, are not supported; these are: {SUPPORTED}",
    ),
    "multimodal": (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}},
        "it is a multimodal model, of type 'gemma3', which is not supported; its text part, 'gemma3_text', is if it is "
        "saved as a model of its own",
    ),
    "multimodal, of an unknown family": (
        {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}},
        "it is a multimodal model, of type 'llama4', which is not supported",
    ),
    "quantised": (
        {"quantization_config": {"quant_method": "aqlm", "nbits_per_codebook": 16}},
        "weights quantised by aqlm are not supported for llama: "
        "take the original model, its FP8 version, or a GGUF file of it",
    ),
    "quantised nobody knows how": (
        {"quantization_config": ["fp8"]},
        "weights quantised by settings that are no object are not supported for llama: "
        "take the original model, its FP8 version, or a GGUF file of it",
    ),
    "dynamic rotation": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type 'dynamic' is not supported: it depends on the length of the session",
    ),
    "longrope": (
        {
            "model_type": "phi3",
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        },
        "rope_type 'longrope' is not supported: it depends on the length of the session",
    ),
    "longrope that is called yarn": (
        {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
        "rope_type 'su' is not supported: it depends on the length of the session",
    ),
    "unknown rotation": (
        {"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
        f"rope_type 'mrope' is not supported; these are: {ROTATIONS}",
    ),
    "rotation without its settings": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_type 'llama3' lacks high_freq_factor, low_freq_factor, original_max_position_embeddings",
    ),
    "rotation with unknown settings": (
        {"rope_scaling": {**LLAMA3, "ntk_alpha": 2}},
        "settings of rope_type 'llama3' are not understood: ntk_alpha",
    ),
    "two types of rotation": (
        {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}},
        "rope_type and type contradict each other: 'linear' and 'llama3'",
    ),
    "two rotations": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        "rope_scaling and rope_parameters contradict each other: factor is 2.0 in one and None in the other",
    ),
    "a theta that Transformers would drop": (
        {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        "rope_scaling and rope_parameters contradict each other: rope_theta is None in one and 500000.0 in the other",
    ),
    "two thetas": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "config.json and rope_parameters contradict each other: rope_theta is 10000.0 in one and 500000.0 in the other",
    ),
    "a part of each head": (
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor 0.5 is not supported: llama rotates whole heads",
    ),
    "attention both ways": (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "use_bidirectional_attention is not supported: no token may see a later one",
    ),
    "attention that is not causal": (
        {"is_causal": False},
        "settings of its configuration are not understood: is_causal = false",
    ),
    "unknown layers": (
        {"model_type": "qwen3", "layer_types": ["full_attention"] * 3 + ["chunked_attention"]},
        "layers of type 'chunked_attention' are not supported; these are: full_attention, sliding_attention",
    ),
    "a window that the family has not": (
        {"sliding_window": 8, "clip_qkv": 3.0},
        "settings of its configuration are not understood: clip_qkv = 3.0, sliding_window = 8",
    ),
    "windows of some layers": (
        {"model_type": "qwen3_moe", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        "settings of its configuration are not understood: max_window_layers = 2",
    ),
    "slow but exact": (
        {"model_type": "bloom", "pretraining_tp": 4, "slow_but_exact": True},
        "slow_but_exact with pretraining_tp is not supported",
    ),
    "an encoder": ({"is_encoder_decoder": True}, "is_encoder_decoder is not supported: a swarm computes decoders only"),
    "heads that do not divide": (
        {"num_key_value_heads": 3},
        "num_attention_heads, 4, is no multiple of num_key_value_heads, 3",
    ),
    "more experts than there are": (
        {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 4},
        "it asks for 4 experts of 2 for each token",
    ),
    "two numbers of experts": (
        {"model_type": "gpt_oss", "num_experts_per_tok": 4, "experts_per_token": 2},
        "its settings contradict each other: experts_per_token is 2 and num_experts_per_tok is 4",
    ),
    "an unknown activation": ({"hidden_act": "softsilu"}, "hidden_act 'softsilu' is not known"),
}


def write_config(directory: Path, settings: Mapping[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**LLAMA, **settings}))
    return directory


@pytest.mark.parametrize(("settings", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused_configurations(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    directory = write_config(tmp_path / "model", settings)
    with pytest.raises(ModelUnavailable) as caught:
        read_supported(str(directory))
    assert str(caught.value) == f"{directory}: {sentence}"


# What the hub's models have in their configurations, as far as it is unusual.
ACCEPTED: Mapping[str, dict[str, Any]] = {
    "Llama 3.1": {"rope_scaling": LLAMA3, "rope_theta": 5e5, "eos_token_id": [1, 2], "torch_dtype": "bfloat16"},
    "the same by Transformers 5": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "dtype": "bfloat16"},
    "both": {"rope_scaling": LLAMA3, "rope_theta": 5e5, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "SmolLM2": {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "pretraining_tp": 1},
    "DeepSeek's Qwen": {"model_type": "qwen2", "use_mrope": False, "use_sliding_window": False, "sliding_window": 8},
    "Qwen 3 30B": {"model_type": "qwen3_moe", "head_dim": 32, "max_window_layers": 4, "use_sliding_window": False},
    "YaRN": {
        "model_type": "qwen2",
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"},
    },
    "Gemma 2": {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    "Gemma 3": {"model_type": "gemma3_text", "sliding_window_pattern": 6, "rope_local_base_freq": 10000},
    "gpt-oss": {
        "model_type": "gpt_oss",
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
        "initial_context_length": 64,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "Phi-4": {"model_type": "phi3", "auto_map": {"AutoConfig": "x.Y"}, "partial_rotary_factor": 1.0, "embd_pdrop": 0.0},
    "OLMo 2": {"model_type": "olmo2", "attention_bias": False},
    "Mixtral": {"model_type": "mixtral", "sliding_window": None, "output_router_logits": False},
    "BLOOM": {
        "model_type": "bloom",
        "n_embed": 64,
        "n_inner": None,
        "offset_alibi": 100,
        "pretraining_tp": 4,
        "slow_but_exact": False,
        "skip_bias_add": True,
        "attention_softmax_in_fp32": True,
    },
}
# Of LLAMA's settings, those that BLOOM has not.
NOT_BLOOMS = ("num_key_value_heads", "intermediate_size", "max_position_embeddings")


@pytest.mark.parametrize("settings", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_configurations(tmp_path: Path, settings: dict[str, Any]) -> None:
    if settings.get("model_type") == "bloom":
        settings = {**settings, **dict.fromkeys(NOT_BLOOMS)}
    read_supported(str(write_config(tmp_path / "model", settings)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_family(tmp_path_factory.mktemp("refusals") / "llama", "llama")


def change_config(directory: Path, **settings: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **settings}))


def change_tensors(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


ATTENTION = "model.layers.0.self_attn"
TENSORS: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "no biases": (
        lambda directory: change_config(directory, attention_bias=True),
        f"its weights lack {ATTENTION}.k_proj.bias, {ATTENTION}.o_proj.bias, {ATTENTION}.q_proj.bias and 1 more, "
        "which its configuration asks for",
    ),
    "missing": (
        lambda directory: change_tensors(directory, lambda it: it.pop("model.layers.2.mlp.up_proj.weight")),
        "its weights lack model.layers.2.mlp.up_proj.weight, which its configuration asks for",
    ),
    "no head": (
        lambda directory: change_tensors(directory, lambda it: it.pop("lm_head.weight")),
        "its weights lack lm_head.weight, which its configuration asks for",
    ),
    "unknown in a block": (
        lambda directory: change_tensors(
            directory, lambda it: it.update({f"{ATTENTION}.q_norm.weight": np.ones(16, np.float32)})
        ),
        f"its weights have {ATTENTION}.q_norm.weight, of which its configuration does not know",
    ),
    "more blocks": (
        lambda directory: change_config(directory, num_hidden_layers=3),
        "its weights have model.layers.3.input_layernorm.weight, model.layers.3.mlp.down_proj.weight, "
        "model.layers.3.mlp.gate_proj.weight and 6 more, of which its configuration does not know",
    ),
    "another shape": (
        lambda directory: change_config(directory, head_dim=32),
        f"the shape of {ATTENTION}.k_proj.weight, {ATTENTION}.o_proj.weight, {ATTENTION}.q_proj.weight and 1 more is "
        "not what its configuration asks for",
    ),
    "another vocabulary": (
        lambda directory: change_config(directory, vocab_size=100),
        "the shape of lm_head.weight, model.embed_tokens.weight is not what its configuration asks for",
    ),
    "another tied head": (
        lambda directory: change_config(directory, tie_word_embeddings=True),
        "its lm_head.weight is not its embeddings, with which its configuration ties it",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), TENSORS.values(), ids=TENSORS)
def test_weights_that_do_not_fit(tmp_path: Path, llama: Path, change: Callable[[Path], object], sentence: str) -> None:
    directory = shutil.copytree(llama, tmp_path / "model")
    change(directory)
    with pytest.raises(ModelUnavailable) as caught:
        adopt(str(directory))
    assert str(caught.value) == f"{directory}: {sentence}"


def test_what_old_checkpoints_have_too_much_is_left_out(tmp_path: Path, llama: Path) -> None:
    """Llama 1 and 2 saved what follows from the configuration; and a tied head may be there, as the embeddings."""
    directory = shutil.copytree(llama, tmp_path / "model")
    name = f"{ATTENTION}.rotary_emb.inv_freq"
    change_tensors(directory, lambda it: it.update({name: np.ones(8, np.float32)}))
    change_tensors(directory, lambda it: it.update({"lm_head.weight": it["model.embed_tokens.weight"].copy()}))
    change_config(directory, tie_word_embeddings=True)
    adopt(str(directory))


def test_missing_experts(tmp_path: Path) -> None:
    directory = make_tiny_family(tmp_path / "mixtral", "mixtral")
    change_config(directory, num_local_experts=8)
    with pytest.raises(ModelUnavailable) as caught:
        adopt(str(directory))
    assert str(caught.value) == (
        f"{directory}: the shape of model.layers.0.mlp.experts.down_proj, model.layers.0.mlp.experts.gate_up_proj, "
        "model.layers.0.mlp.gate.weight is not what its configuration asks for"
    )


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("quant", "batching"), [("int8", False), ("nf4", True)])
def test_experts_are_not_quantised_by_bitsandbytes(tmp_path: Path, variant: str, quant: str, batching: bool) -> None:
    directory = make_tiny_family(tmp_path / variant, variant)
    adopt(str(directory))
    assert server_arguments(ServerOptions(str(directory), device="cpu"), str(directory))["block_indices"] == "0:4"
    with pytest.raises(ModelUnavailable) as caught:
        options = ServerOptions(str(directory), device="cpu", quant=quant, batching=batching)
        server_arguments(options, str(directory))
    assert str(caught.value) == (
        f"{directory}: --quant {quant} is not supported for models with experts ({variant}) but on a CPU, by batching "
        "servers: bitsandbytes would quantise all but the experts, which are most of the weights"
    )


@pytest.fixture(scope="module")
def two_refused(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[Path, str]:
    """A configuration and weights that are refused, with what users are told."""
    directory = tmp_path_factory.mktemp("refused")
    rotation, biases = (shutil.copytree(llama, directory / name) for name in ("rotation", "biases"))
    settings, sentence = REFUSED["dynamic rotation"]
    change_config(rotation, rope_parameters=None, **settings)
    change, no_biases = TENSORS["no biases"]
    change(biases)
    return {rotation: sentence, biases: no_biases}


def test_the_app_says_why_a_model_has_failed(two_refused: dict[Path, str]) -> None:
    models = Models(Settings(MODELS=tuple(map(str, two_refused)), DEVICE="cpu", TORCH_DTYPE="float32"))
    models.start()
    waiting = threading.Event()
    try:
        for _ in range(int(START_TIMEOUT / 0.1)):
            if all(status.state == "failed" for status in models.status.values()):
                break
            waiting.wait(0.1)
        for path, sentence in two_refused.items():
            status = models.status[str(path)]
            assert status.state == "failed"
            assert status.message.startswith(f"{path}: {sentence}; again ")
    finally:
        models.close()


def test_the_server_command_says_why_it_ends(two_refused: dict[Path, str]) -> None:
    path, sentence = next(iter(two_refused.items()))
    command = [sys.executable, "-W", "ignore", "-m", "swarm.server", str(path), "--device", "cpu", "--quiet"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=START_TIMEOUT + END_TIMEOUT)
    assert (ended.returncode, ended.stderr.strip()) == (1, f"{path}: {sentence}")
