"""Models that are GGUF files: prepared once, under a lock, in a directory that appears complete."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from swarm.errors import ModelUnavailable
from swarm.places import publish
from swarm.weights.checks import check_directory, read_json
from swarm.weights.gguf import convert
from swarm.weights.progress import Progress

# Seconds to wait while another process prepares the same model. The bundled one takes about ten, a large one minutes.
PREPARATION_LIMIT = 3600.0

# Increment this when the conversion's output changes: directories of older versions are then ignored.
_CONVERSION = 1


def prepared_name(file: str, digest: str, conversion: int = _CONVERSION) -> str:
    """Return the name of a prepared directory, which is the DHT prefix too; it identifies exactly these weights.

    :param file: the GGUF file
    :param digest: of its content, in hexadecimal digits
    :param conversion: increment it when what becomes of the file changes
    """
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', Path(file).stem)}-{digest[:8]}-v{conversion}"


def prepared(model: str, name: str, find: Callable[[], Path], cache_dir: Path, progress: Progress) -> Path:
    """Return the directory of the prepared model; prepare it first if necessary.

    :param name: of the directory, see ``prepared_name``
    :param find: returns the GGUF file, or raises ModelUnavailable
    :raises ModelUnavailable: if it cannot be prepared
    """
    from filelock import FileLock, Timeout

    target = cache_dir / name
    if is_whole(model, target):
        return target
    progress = progress.of(model.rpartition("/")[2])
    lock = FileLock(cache_dir / f"{name}.lock")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            progress.say("waiting for another process that prepares it")
            held = lock.acquire(timeout=PREPARATION_LIMIT)
        with held:
            if not is_whole(model, target):
                _prepare(model, find(), target, progress)
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


def _prepare(model: str, gguf_file: Path, target: Path, progress: Progress) -> None:
    """Convert the GGUF file into ``target``, which appears atomically. The caller holds the lock.

    Raises ModelUnavailable, or OSError if the directory cannot be written.
    """
    from safetensors import SafetensorError

    partial = target.with_name(f"{target.name}.partial")
    # A process that died here has left partial files, perhaps with little disk space beside them.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        convert(gguf_file, partial, progress)
        publish(partial, target)
    except ImportError as error:
        raise ModelUnavailable(f"{model}: the Python package {error.name} is needed to prepare it") from error
    except SafetensorError as error:
        raise ModelUnavailable(f"{model}: cannot write its weights to {partial}: {error}") from error
    except KeyError as error:
        raise ModelUnavailable(f"{model}: cannot convert {gguf_file}: it has no {error}") from error
    except (ValueError, NotImplementedError) as error:
        raise ModelUnavailable(f"{model}: cannot convert {gguf_file}: {error}") from error
    except (IndexError, OverflowError) as error:  # gguf's, of files that are cut short
        raise ModelUnavailable(f"{model}: {gguf_file} is broken: it is not a whole GGUF file") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
