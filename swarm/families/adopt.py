"""Make a model's family known to petals, or refuse the model by name."""

import swarm.compat  # noqa: F401

from transformers import AutoConfig

from swarm.errors import ModelUnavailable
from swarm.families import FAMILIES, PETALS_FAMILIES
from swarm.families.classes import register, restore_bloom
from swarm.families.petals_blocks import restore_blocks
from swarm.families.quantised import check_quantisation


def adopt(path: str) -> None:
    """Make the family of a model known to petals. Call this before petals loads anything of the model.

    :param path: what ``from_pretrained`` takes, see ``swarm.weights.locate``
    :raises ModelUnavailable: if the family, or something in the configuration, is not supported
    """
    config = AutoConfig.from_pretrained(path)
    model_type = config.model_type
    check_quantisation(path, model_type, getattr(config, "quantization_config", None))
    if model_type in PETALS_FAMILIES:
        restore_blocks()
        restore_bloom()
    elif model_type in FAMILIES:
        register(model_type)
    else:
        supported = ", ".join((*PETALS_FAMILIES, *FAMILIES))
        raise ModelUnavailable(f"{path}: models of type {model_type!r} are not supported; these are: {supported}")
