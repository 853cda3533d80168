"""Make a model's family known to petals, or refuse the model by name."""

import swarm.compat  # noqa: F401

from swarm.errors import ModelUnavailable
from swarm.families import PETALS_FAMILIES
from swarm.families.classes import register, restore_clients
from swarm.families.configuration import read_supported
from swarm.families.falcon import check_falcon, restore_falcon
from swarm.families.petals_blocks import restore_blocks
from swarm.families.tensors import check_tensors


def adopt(path: str) -> None:
    """Make the family of a model known to petals. Call this before petals loads anything of the model.

    :param path: what ``from_pretrained`` takes, see ``swarm.weights.locate``
    :raises ModelUnavailable: if the family, something in the configuration, or the weights do not fit
    """
    config = read_supported(path)
    for reason in check_falcon(config) if config.model_type == "falcon" else ():
        raise ModelUnavailable(f"{path}: {reason}")
    if config.model_type in PETALS_FAMILIES:
        restore_blocks()
        restore_falcon()
        restore_clients()
    else:
        register(config.model_type)
    check_tensors(path)
