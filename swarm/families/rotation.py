"""Which rotary position embeddings (RoPE, https://arxiv.org/abs/2104.09864) are supported."""

from collections.abc import Iterator, Mapping
from typing import Any

# The settings of each type, beside its name and theta: those that must be there, and those that may.
NEEDED: Mapping[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor"},
}
ALLOWED: Mapping[str, set[str]] = {
    "yarn": {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    }
}
ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# These rotate by the length of the text: as a session grows, all keys in its cache would have to change.
BY_LENGTH = ("dynamic", "longrope", "su")
BY_LAYER_TYPE = ("full_attention", "sliding_attention")
# The families that rotate a part of each head, if told so. Others would rotate all of it.
ROTATE_A_PART = ("phi3",)


def check_rotation_keys(given: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a rotation's settings as config.json has them."""
    sources = {name: given[name] for name in ("rope_scaling", "rope_parameters") if given.get(name) is not None}
    for name, settings in sources.items():
        if not isinstance(settings, dict):
            yield f"{name} is not an object"
            return
        for part in parts(settings):
            yield from check_type(part)
    theta = given.get("rope_theta")
    if len(sources) == 2:
        scaling, parameters = (normalised(settings, theta) for settings in sources.values())
        for key in sorted(set(scaling) | set(parameters)):
            yield from contradiction(key, "rope_scaling", scaling.get(key), "rope_parameters", parameters.get(key))
    for name, settings in sources.items():
        if theta is not None and settings.get("rope_theta") is not None:
            yield from contradiction("rope_theta", "config.json", theta, name, settings["rope_theta"])


def normalised(settings: Mapping[str, Any], theta: Any) -> dict[str, Any]:
    """Return a rotation's settings as they are written today.

    :param theta: what they would use if they did not say
    """
    settings = {"rope_type": settings.get("type", "default"), "rope_theta": theta, **settings}
    return {key: value for key, value in settings.items() if key != "type" and value is not None}


def contradiction(key: str, place: str, value: Any, other_place: str, other_value: Any) -> Iterator[str]:
    """Yield that two places say different things, if they do: Transformers takes one of them, and says nothing."""
    if value != other_value:
        yield f"{place} and {other_place} contradict each other: {key} is {value} in one and {other_value} in the other"


def check_rotation(config: Any) -> Iterator[str]:
    """Yield what is wrong with the rotation that a family would use.

    :param config: as Transformers has read it
    """
    for part in parts(getattr(config, "rope_parameters", None) or {}):
        yield from check_type(part)
        share = part.get("partial_rotary_factor")
        if share not in (None, 1, 1.0) and config.model_type not in ROTATE_A_PART:
            yield f"partial_rotary_factor {share} is not supported: {config.model_type} rotates whole heads"


def parts(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the settings of all layers, or of each type of layers."""
    nested = [settings[kind] for kind in BY_LAYER_TYPE if isinstance(settings.get(kind), dict)]
    return nested or [settings]


def check_type(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a type of rotation and its settings."""
    kinds = {settings[key] for key in ("rope_type", "type") if settings.get(key) is not None} or {"default"}
    if len(kinds) > 1:
        yield f"rope_type and type contradict each other: {' and '.join(sorted(map(repr, kinds)))}"
    for kind in sorted(kinds, key=str):
        if kind in BY_LENGTH:
            yield f"rope_type {kind!r} is not supported: it depends on the length of the session"
        elif kind not in NEEDED:
            yield f"rope_type {kind!r} is not supported; these are: {', '.join(NEEDED)}"
        else:
            present = {key for key, value in settings.items() if value is not None}
            if missing := sorted(NEEDED[kind] - present):
                yield f"rope_type {kind!r} lacks {', '.join(missing)}"
            if unknown := sorted(present - NEEDED[kind] - ALLOWED.get(kind, set()) - ALWAYS):
                yield f"settings of rope_type {kind!r} are not understood: {', '.join(unknown)}"
