"""Reads weights from files: mapped into memory rather than read, and never by running what a file contains."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import swarm.compat  # noqa: F401

import safetensors
import torch
from petals.server import from_pretrained as petals_loading

from swarm.errors import ModelUnavailable
from swarm.weights.pickles import read_pickle

State = dict[str, torch.Tensor]


def read_weights(path: str, prefix: str | None = None) -> State:
    """Return the weights of a file whose names begin with ``prefix``. They stay on disk until they are used.

    :raises ModelUnavailable: if it is a pickle that could run code
    """
    if path.endswith(".safetensors"):
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys() if prefix is None or name.startswith(prefix)}
    return read_pickle(Path(path))


def read_or_refuse(path: str, *, block_prefix: str | None = None) -> State | ModelUnavailable:
    """Stands in for petals' reader of a file, and returns the refusal: what petals cannot read it downloads again."""
    try:
        return read_weights(path, block_prefix)
    except ModelUnavailable as error:
        return error


def without_retries(load: Callable[..., Any]) -> Callable[..., State]:
    """Wrap petals' loader of a file, which tries forever: a refusal is final, and so is what a directory has."""

    def load_file(model: str, filename: str, *, block_prefix: str | None = None, **options: Any) -> State:
        if os.path.isdir(model):
            return read_weights(os.path.join(model, filename), block_prefix)
        loaded = load(model, filename, block_prefix=block_prefix, **options)
        if isinstance(loaded, ModelUnavailable):
            raise loaded
        state: State = loaded
        return state

    return load_file


petals_loading._load_state_dict_from_local_file = read_or_refuse
petals_loading._load_state_dict_from_repo_file = without_retries(petals_loading._load_state_dict_from_repo_file)
