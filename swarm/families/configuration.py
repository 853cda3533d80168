"""What of a model's configuration is understood. Everything else is refused by name: it might change the result."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from swarm.errors import ModelUnavailable
from swarm.families import FAMILIES, PETALS_FAMILIES
from swarm.families.quantised import check_quantisation
from swarm.families.rotation import check_rotation, check_rotation_keys
from swarm.weights.fingerprint import INERT_KEYS, read_config

Config = Mapping[str, Any]  # of config.json

# Settings that a family reads although Transformers' class of its configuration has no such field.
READ_BESIDE = {
    "bloom": {"n_embed", "num_attention_heads", "num_hidden_layers"},
    "falcon": {"n_embed"},
    "gemma3_text": {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"},
}
READ_BY_ALL = {"model_type", "quantization_config", "rope_scaling", "rope_theta", "partial_rotary_factor"}
# Settings that nobody reads, with the values at which they change nothing.
WITHOUT_EFFECT: Mapping[str, Any] = {
    "add_cross_attention": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_bias": False,
    "attention_out_bias": False,
    "ff_factor": 4,
    "full_attn_mod": 1,
    "hidden_act": "gelu_pytorch_tanh",  # of Gemma, whose setting is hidden_activation
    "interpolate_factor": 1,
    "is_causal": True,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "is_llama_config": True,
    "lm_head_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "use_sliding_window": False,
}
# Settings that say again what another one says.
SAME_AS = {"experts_per_token": "num_experts_per_tok", "num_experts": "num_local_experts"}
LAYER_TYPES = ("full_attention", "sliding_attention")


def read_supported(path: str) -> Any:
    """Return a model's configuration as Transformers reads it.

    :param path: what ``from_pretrained`` takes, see ``swarm.weights.locate``
    :raises ModelUnavailable: if something in it is not supported; the message is one sentence that names it
    """
    given = read_config(path)
    for check in CHECKS:
        for reason in check(given):
            raise ModelUnavailable(f"{path}: {reason}")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = str(error).strip() or type(error).__name__
        raise ModelUnavailable(f"{path}: Transformers refuses its configuration: {' '.join(text.split())}") from error
    for reason in check_read(config):
        raise ModelUnavailable(f"{path}: {reason}")
    return config


def check_family(given: Config) -> Iterator[str]:
    """Yield what is wrong with the kind of model."""
    model_type, supported = given.get("model_type"), (*PETALS_FAMILIES, *FAMILIES)
    if model_type in supported:
        return
    inner = given.get("text_config")
    if isinstance(inner, dict):
        text = inner.get("model_type")
        hint = f"; its text part, {text!r}, is if it is saved as a model of its own" if text in supported else ""
        yield f"it is a multimodal model, of type {model_type!r}, which is not supported{hint}"
    code = ", which bring code of their own," if "auto_map" in given else ""
    yield f"models of type {model_type!r}{code} are not supported; these are: {', '.join(supported)}"


def check_keys(given: Config) -> Iterator[str]:
    """Yield which settings are not understood."""
    model_type = given["model_type"]
    family: Any = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(family)} | READ_BY_ALL | READ_BESIDE.get(model_type, set())
    known |= {*family.attribute_map, *family.attribute_map.values()}
    if model_type not in PETALS_FAMILIES:
        known.add("head_dim")
    for key, same in SAME_AS.items():
        if key in given and same in given and given[key] != given[same]:
            yield f"its settings contradict each other: {key} is {given[key]} and {same} is {given[same]}"
    unknown = [
        f"{key} = {json.dumps(value)[:60]}"
        for key, value in sorted(given.items())
        if key not in known | INERT_KEYS and value not in (None, [], {}) and not _without_effect(given, key)
    ]
    if unknown:
        yield f"settings of its configuration are not understood: {', '.join(unknown)}"
    if given.get("is_encoder_decoder"):
        yield "is_encoder_decoder is not supported: a swarm computes decoders only"


def _without_effect(given: Config, key: str) -> bool:
    """Whether a setting that is not read changes nothing."""
    if key == "max_window_layers":
        return not given.get("use_sliding_window")
    if key == "initial_context_length":
        return given[key] == ((given.get("rope_scaling") or {}).get("original_max_position_embeddings"))
    if key in SAME_AS and SAME_AS[key] in given:
        return True  # they are the same
    return key in WITHOUT_EFFECT and bool(given[key] == WITHOUT_EFFECT[key])


def check_attention(given: Config) -> Iterator[str]:
    """Yield what attention is asked for that is not supported."""
    if given.get("use_bidirectional_attention"):
        yield "use_bidirectional_attention is not supported: no token may see a later one"
    if given.get("slow_but_exact") and given.get("pretraining_tp", 1) > 1:
        yield "slow_but_exact with pretraining_tp is not supported"


def check_read(config: Any) -> Iterator[str]:
    """Yield what is not supported of a configuration with all its defaults, as Transformers has read it."""
    yield from check_rotation(config)
    for layer_type in getattr(config, "layer_types", None) or ():
        if layer_type not in LAYER_TYPES:
            yield f"layers of type {layer_type!r} are not supported; these are: {', '.join(LAYER_TYPES)}"
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or 1
    if heads % kv_heads:
        yield f"num_attention_heads, {heads}, is no multiple of num_key_value_heads, {kv_heads}"
    experts, used = getattr(config, "num_local_experts", None), getattr(config, "num_experts_per_tok", None)
    if experts is not None and used is not None and not 0 < used <= experts:
        yield f"it asks for {used} experts of {experts} for each token"
    for name in ("hidden_act", "hidden_activation"):
        if (activation := getattr(config, name, None)) is not None and activation not in ACT2FN:
            yield f"{name} {activation!r} is not known"


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    check_family,
    check_quantisation,
    check_attention,
    check_rotation_keys,
    check_keys,
)
