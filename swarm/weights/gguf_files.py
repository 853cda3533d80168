"""Models that are named by a GGUF file: a path that ends in .gguf, or OWNER/NAME:FILE.gguf on the hub."""

import hashlib
import os
from pathlib import Path

from swarm.errors import ModelUnavailable
from swarm.weights import checks
from swarm.weights.preparing import prepared_name
from swarm.weights.progress import Progress

SAMPLES, SAMPLE_SIZE = 1024, 4096  # how many pieces of a file identify it, and their size in bytes
CONVERSION = 2  # the first one rounded all of a large file's weights to bfloat16
HEADER_SIZE = 2**20  # bytes at its beginning that do too


def is_gguf(model: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return model.lower().endswith(".gguf") and not os.path.isdir(model)


def gguf_file(model: str, progress: Progress | None = None) -> Path:
    """Return the path of a model's GGUF file, downloaded if it is on the hub.

    :param progress: None: the file is not downloaded
    :raises ModelUnavailable: if there is no such file
    """
    repository, colon, name = model.partition(":")
    if not colon or os.path.isfile(os.path.expanduser(model)):
        file = Path(os.path.abspath(os.path.expanduser(model)))
        if not file.is_file():
            raise ModelUnavailable(f"{model}: no such file; of a file on the hub, the name is OWNER/NAME:FILE.gguf")
        return file
    cached = checks.cached_file(repository, name)
    if cached is None and progress is not None:
        cached = _download(repository, name, progress)
    if cached is None:
        raise ModelUnavailable(f"{model} is not downloaded yet")
    return Path(cached)


def _download(repository: str, name: str, progress: Progress) -> str:
    """Download a file from the hub, which may take long; but whether it is there is known within seconds."""
    from huggingface_hub import hf_hub_download

    checks.ask_hub(repository, name)
    progress.say(f"downloading {name}")
    try:
        return hf_hub_download(repository, name, etag_timeout=checks.HUB_TIMEOUT)
    except Exception as error:  # huggingface_hub lets those of its HTTP client through
        raise ModelUnavailable(f"cannot get {repository} from the hub: {checks.hub_reason(error, name)}") from error


def identity(file: Path) -> str:
    """Return the name of the prepared directory of a GGUF file, which is the DHT prefix too.

    It is the same on all machines and depends on the content, of which it reads only samples: models that differ do so
    everywhere.

    :raises ModelUnavailable: if the file cannot be read
    """
    try:
        size = file.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with file.open("rb") as opened:
            digest.update(opened.read(HEADER_SIZE))
            for number in range(SAMPLES):
                opened.seek(size * number // SAMPLES)
                digest.update(opened.read(SAMPLE_SIZE))
    except OSError as error:
        raise ModelUnavailable(f"cannot read {file}: {error.strerror or error}") from error
    return prepared_name(file.name, digest.hexdigest(), CONVERSION)
