"""How a GGUF file says that queries and keys are rotated, and how Transformers does."""

import math
from typing import TYPE_CHECKING, Any

from swarm.weights.gguf.settings import Settings

if TYPE_CHECKING:
    import numpy as np

# Of Llama 3's rotation, its files say neither.
LOW, HIGH = 1.0, 4.0


def rotation(settings: Settings, head_dim: int) -> dict[str, Any]:
    """Return the settings of the rotary position embeddings.

    :raises ValueError: if Transformers has no such rotation
    """
    theta = settings.get("rope.freq_base", 10000.0)
    config: dict[str, Any] = {"rope_theta": theta}
    rotated = settings.get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        if settings.architecture != "phi3":
            raise ValueError("it rotates only a part of each attention head")
        config["partial_rotary_factor"] = rotated / head_dim
    if "rope_freqs.weight" in settings.tensors:
        divisors = settings.tensors["rope_freqs.weight"].data
        config["rope_scaling"] = llama3(divisors, theta, head_dim)
    if scaling := declared_scaling(settings):
        if "rope_scaling" in config:
            raise ValueError("it has two scalings of its rotation")
        config["rope_scaling"] = scaling
    return config


def declared_scaling(settings: Settings) -> dict[str, Any]:
    """Return the scaling of the rotation that the settings name; empty if there is none."""
    kind = settings.get("rope.scaling.type", "none")
    factor = settings.get("rope.scaling.factor", 1.0)
    linear = settings.get("rope.scale_linear", 1.0)  # of older files
    settings.get("rope.scaling.finetuned")  # changes nothing
    settings.check("rope.scaling.attn_factor", 1.0)
    if kind == "none" and linear != 1.0:
        kind, factor = "linear", linear
    if kind == "none":
        if factor != 1.0:
            raise ValueError(f"its rotation is scaled by {factor}, and it does not say how")
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else {}
    if kind != "yarn":
        raise ValueError(f"its rotation is scaled by {kind!r}, which is not supported")
    scaling = {"rope_type": "yarn", "factor": factor}
    scaling["original_max_position_embeddings"] = settings.take("rope.scaling.original_context_length")
    for name in ("beta_fast", "beta_slow"):
        if (value := settings.get(f"rope.scaling.yarn_{name}")) is not None:
            scaling[name] = value
    return scaling


def llama3(divisors: "np.ndarray[Any, Any]", theta: float, head_dim: int) -> dict[str, Any]:
    """Return the settings of Llama 3's rotation. A file has only what they do to each frequency.

    :param divisors: of the frequencies, [head_dim / 2]: 1 for high ones, ``factor`` for low ones, and between them
        a blend that depends on the length of the context that the model was first trained with
    :raises ValueError: if there are no such settings
    """
    import numpy as np

    divisors = np.asarray(divisors, np.float64)
    if len(divisors) != head_dim // 2:
        raise ValueError("it has scalings of other frequencies than those of its rotation")
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    factor = round(float(divisors.max()), 3)
    blended = [i for i in range(len(divisors)) if 1.001 < divisors[i] < factor * 0.999]
    length = 8192
    if blended and factor > 1:
        shares = (1 / divisors[blended] - 1 / factor) / (1 - 1 / factor)
        length = round(float(np.median(wavelengths[blended] * (shares * (HIGH - LOW) + LOW))))
    shares = ((length / wavelengths - LOW) / (HIGH - LOW)).clip(0, 1)
    if not np.allclose(1 / divisors, (1 - shares) / factor + shares, rtol=1e-4, atol=0):
        raise ValueError("it scales the frequencies of its rotation otherwise than Llama 3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": length,
    }
