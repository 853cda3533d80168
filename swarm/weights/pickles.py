"""Weights in PyTorch's own format, which is a pickle: it is read as data, and may not name what it would run."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

from swarm.errors import ModelUnavailable


def read_pickle(file: Path) -> dict[str, Any]:
    """Return the tensors of a PyTorch file by their names, mapped from the file where its format allows that.

    :raises ModelUnavailable: if it holds anything but tensors: whoever unpickles that may run any code
    """
    import torch

    try:
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ModelUnavailable(refusal(str(file), error)) from error
    if not isinstance(weights, dict):
        raise ModelUnavailable(f"{file} is broken: it holds no weights by their names")
    return weights


def refusal(name: str, error: pickle.UnpicklingError) -> str:
    """Say why a file, or a model of such files, is not loaded.

    :param error: what ``torch.load`` or Transformers raised
    """
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f" ({found[1]})" if found else ""
    return f"{name} holds more than weights{what}, which could run any code: convert the model to safetensors"
