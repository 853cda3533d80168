"""Checks that a model's files are present and intact, in a directory or on the hub."""

import json
import os
import queue
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swarm.errors import ModelUnavailable
from swarm.weights.pickles import read_pickle

# Seconds for each connection to the hub and for each answer from it.
HUB_TIMEOUT = 5.0
# Seconds for one whole request to the hub: names to resolve, addresses to try, redirects to follow.
HUB_LIMIT = 15.0

# In petals' order of preference; it loads no others.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def check_directory(model: str, directory: Path) -> None:
    """Raise ModelUnavailable unless the directory has a configuration and intact weights.

    A petals server that cannot read weights retries every 30 seconds, forever.
    """
    if not os.path.isdir(directory):
        raise ModelUnavailable(f"{model}: no such directory")
    _check_config(model, directory / "config.json")
    for file in weight_files(model, directory):
        _check_weights(model, file)


def _check_config(model: str, file: Path) -> None:
    if not isinstance(read_json(model, file).get("model_type"), str):
        raise ModelUnavailable(f"{model}: {file} names no model_type")


def read_json(model: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise ModelUnavailable(f"{model}: {file} is missing") from error
    except OSError as error:
        raise ModelUnavailable(f"{model}: cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelUnavailable(f"{model}: {file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelUnavailable(f"{model}: {file} is not a JSON object")
    return content


def weight_files(model: str, directory: Path) -> list[Path]:
    """Return the files that hold the weights, all of which exist."""
    first = next((directory / name for name in WEIGHT_FILES if os.path.isfile(directory / name)), None)
    if first is None:
        raise ModelUnavailable(f"{model}: {directory} has no weights, neither {' nor '.join(WEIGHT_FILES)}")
    if first.suffix != ".json":
        return [first]
    weight_map = read_json(model, first).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelUnavailable(f"{model}: {first} has no weight_map")
    files = [directory / str(name) for name in sorted(set(weight_map.values()), key=str)]
    for file in files:
        if not os.path.isfile(file):
            raise ModelUnavailable(f"{model}: {file}, which {first.name} lists, is missing")
    return files


def _check_weights(model: str, file: Path) -> None:
    """Detect files that an interrupted copy or download left behind, by their headers and lengths."""
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as opened:
            start = opened.read(1)
        if file.suffix == ".safetensors":
            with safe_open(file, framework="numpy"):
                return
        # torch before 1.6 wrote bare pickles, later versions write zip files.
        if start != b"\x80" and not zipfile.is_zipfile(file):
            raise ModelUnavailable(f"{model}: {file} is broken: it is not a whole PyTorch file")
        read_pickle(file)
    except OSError as error:
        raise ModelUnavailable(f"{model}: cannot read {file}: {error.strerror or error}") from error
    except (RuntimeError, EOFError) as error:  # what torch raises for what is no file of its own
        raise ModelUnavailable(f"{model}: {file} is broken: {str(error).partition(chr(10))[0]}") from error
    except SafetensorError as error:
        raise ModelUnavailable(f"{model}: {file} is broken: {error}") from error


def check_hub(model: str) -> None:
    from huggingface_hub import hf_hub_download

    def download() -> None:
        hf_hub_download(model, "config.json", etag_timeout=HUB_TIMEOUT)

    file = cached_file(model, "config.json")
    if file is None:
        ask_hub(model, "config.json", download)
        file = cached_file(model, "config.json")
    _check_config(model, Path(file or ""))


def cached_file(model: str, name: str) -> str | None:
    """Return the path of a file in the hub's cache; None if it has to be downloaded.

    :raises ModelUnavailable: if the hub knows no such names, or may not be asked
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise ModelUnavailable(f"{model!r} is neither a directory nor a valid name on the hub") from error
    file = try_to_load_from_cache(model, name)
    if isinstance(file, str):
        return file
    if constants.HF_HUB_OFFLINE:
        raise ModelUnavailable(f"cannot get {model} from the hub: not in its cache, and HF_HUB_OFFLINE is set")
    return None


def ask_hub(model: str, file: str, then: Callable[[], object] = lambda: None) -> None:
    """Ask the hub whether it has a file, in one attempt; if so, go on.

    This runs in its own thread: HUB_TIMEOUT bounds each attempt, but neither the lookup of the hub's name nor the
    number of its addresses. When the limit is reached, the thread is left to its own timeouts.

    :param then: what is to be done within the limit too; may raise what huggingface_hub does
    :raises ModelUnavailable: if that fails, or takes longer than HUB_LIMIT
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    results: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            # A download would answer what this raises by trying again, and again, for half a minute.
            get_hf_file_metadata(hf_hub_url(model, file), timeout=HUB_TIMEOUT)
            then()
            results.put(None)
        except Exception as error:
            results.put(error)

    threading.Thread(target=run, name=f"hub-{model}", daemon=True).start()
    try:
        error = results.get(timeout=HUB_LIMIT)
    except queue.Empty:
        raise ModelUnavailable(f"cannot get {model} from the hub: no answer within {HUB_LIMIT:g} s") from None
    if error is not None:
        raise ModelUnavailable(f"cannot get {model} from the hub: {hub_reason(error, file)}") from error


def hub_reason(error: Exception, file: str) -> str:
    """Say in a few words why the hub did not serve a file."""
    import httpx2
    from huggingface_hub import constants, utils

    if isinstance(error, utils.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # it only says "not in the cache either"
    if isinstance(error, utils.GatedRepoError):
        return "its owner has to grant access; then log in to the hub"
    if isinstance(error, utils.RepositoryNotFoundError):
        return "there is no such model, or it is private"
    if isinstance(error, utils.EntryNotFoundError):
        return f"it has no {file}"
    if isinstance(error, httpx2.TimeoutException):
        return f"no answer from {constants.ENDPOINT} within {HUB_TIMEOUT:g} s"
    if isinstance(error, httpx2.TransportError):
        return f"no connection to {constants.ENDPOINT}"
    if isinstance(error, utils.HfHubHTTPError):
        return f"{constants.ENDPOINT} answered {error.response.status_code}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return str(error).partition("\n")[0] or type(error).__name__
