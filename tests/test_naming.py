"""How a model's blocks are named in the DHT, and that two models never share a name."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from swarm import weights
from swarm.families.classes import register

from petals import AutoDistributedConfig  # isort: skip  after swarm.compat

REVISION = "0" * 40


def put_into_hub_cache(cache: Path, name: str, config: dict[str, object]) -> None:
    """Put a configuration where huggingface-hub keeps what it has downloaded."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)


@pytest.mark.parametrize(
    ("model_type", "name", "prefix"),
    [
        # What the public swarm announces; the rules are in petals' models/*/config.py, Mixtral's in its main branch.
        ("llama", "meta-llama/Meta-Llama-3.1-405B-Instruct", "Meta-Llama-3-1-405B-Instruct-hf"),
        ("mixtral", "mistralai/Mixtral-8x22B-Instruct-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0-1"),
        ("bloom", "bigscience/bloom", "bigscience/bloom-petals"),
        ("bloom", "bigscience/bloom-7b1", "bigscience/bloom-7b1-petals"),
        ("llama", "meta-llama/Llama-2-70b-chat-hf", "Llama-2-70b-chat-hf"),
        ("llama", "petals-team/StableBeluga2", "StableBeluga2-hf"),
        ("falcon", "tiiuae/falcon-180B-chat", "falcon-180B-chat"),
        ("falcon", "tiiuae/falcon-7b.x", "falcon-7b-x"),
        # Families that petals does not have.
        ("qwen3", "Qwen/Qwen3-0.6B", "Qwen3-0-6B"),
        ("qwen3_moe", "Qwen/Qwen3-30B-A3B", "Qwen3-30B-A3B"),
        ("mistral", "mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-Instruct-v0-3"),
        ("gpt_oss", "openai/gpt-oss-20b", "gpt-oss-20b"),
        ("gemma2", "google/gemma-2-2b-it", "gemma-2-2b-it"),
    ],
)
def test_names_of_hub_models(tmp_path: Path, model_type: str, name: str, prefix: str) -> None:
    """Names are those of stock petals, so that models of the public swarm can be joined."""
    if model_type not in ("bloom", "falcon"):
        register(model_type)
    put_into_hub_cache(tmp_path, name, {"model_type": model_type})
    config = AutoDistributedConfig.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    assert config.dht_prefix == prefix
    named = AutoDistributedConfig.from_pretrained(
        name, cache_dir=tmp_path, local_files_only=True, dht_prefix="another-name"
    )
    assert named.dht_prefix == "another-name"


def write_model(directory: Path, *, seed: int = 1, files: int = 1, config: dict[str, object] | None = None) -> Path:
    """Write a configuration and random weights: of one tensor so large that it is not read as a whole."""
    generator = np.random.default_rng(seed)
    tensors = {f"layer.{number}": generator.random((9, 7), np.float32) for number in range(5)}
    tensors["large"] = generator.random((256, 256), np.float32)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "llama", "hidden_size": 64}))
    names = list(tensors)
    parts = [names[number::files] for number in range(files)]
    files_of = {name: f"part-{number}.safetensors" for number, part in enumerate(parts) for name in part}
    if files == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    for number, part in enumerate(parts):
        save_file({name: tensors[name] for name in part}, directory / f"part-{number}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files_of}))
    return directory


def test_copies_have_one_name(tmp_path: Path) -> None:
    """Neither paths, times, and how the weights are divided into files matter, nor do tokens and training."""
    model = write_model(tmp_path / "a" / "My.Model 2")
    name = weights.dht_prefix(str(model))
    assert name is not None and re.fullmatch(r"My-Model-2-[0-9a-f]{8}", name)
    copy = shutil.copytree(model, tmp_path / "b" / "My.Model 2", copy_function=shutil.copyfile)
    os.utime(copy / "model.safetensors", (0, 0))
    (copy / "README.md").write_text("a copy")
    divided = write_model(tmp_path / "c" / "My.Model 2", files=3)
    (divided / "config.json").write_text(
        json.dumps(
            {
                "hidden_size": 64,
                "model_type": "llama",
                "eos_token_id": [1, 2],
                "torch_dtype": "bfloat16",
                "transformers_version": "5.24.0",
                "rope_scaling": None,
            }
        )
    )
    assert weights.dht_prefix(str(copy)) == weights.dht_prefix(str(divided)) == name


def change_weight(model: Path, name: str, place: int) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name].reshape(-1)[place] += 1
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: change_weight(model, "layer.3", 11),
        lambda model: change_weight(model, "large", 0),
        lambda model: change_weight(model, "large", 256 * 128),
        lambda model: change_weight(model, "large", -1),
        lambda model: (model / "config.json").write_text('{"model_type": "llama", "hidden_size": 64, "head_dim": 8}'),
        lambda model: save_file(
            {name.replace("layer.0", "layer.9"): it for name, it in load_file(model / "model.safetensors").items()},
            model / "model.safetensors",
        ),
        lambda model: save_file(
            {name: it.reshape(-1) for name, it in load_file(model / "model.safetensors").items()},
            model / "model.safetensors",
        ),
    ],
    ids=["small", "first", "middle", "last", "config", "name", "shape"],
)
def test_other_models_have_other_names(tmp_path: Path, change: Callable[[Path], object]) -> None:
    model, other = write_model(tmp_path / "a" / "model"), write_model(tmp_path / "b" / "model")
    assert weights.dht_prefix(str(model)) == weights.dht_prefix(str(other))
    change(other)
    assert weights.dht_prefix(str(model)) != weights.dht_prefix(str(other))


@pytest.mark.parametrize("new_format", [True, False])
def test_names_of_pytorch_files(tmp_path: Path, new_format: bool) -> None:
    places = [tmp_path / str(number) / "model" for number in range(3)]
    for directory, value in zip(places[:2], (1.0, 2.0), strict=True):
        directory.mkdir(parents=True)
        (directory / "config.json").write_text('{"model_type": "llama"}')
        state = {"a": torch.zeros(4), "b": torch.full((300_000,), value)}
        torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    shutil.copytree(places[0], places[2])
    one, other, copy = (weights.dht_prefix(str(place)) for place in places)
    assert one == copy != other


def test_a_model_of_the_hub_is_known_by_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody downloads all of its weights only to name it; a copy in a directory may serve it all the same."""
    model = write_model(tmp_path / "model")
    put_into_hub_cache(tmp_path / "hub", "owner/name", {"model_type": "llama", "hidden_size": 64})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    of_hub, of_directory = weights.fingerprint("owner/name"), weights.fingerprint(str(model))
    assert of_hub.weights is None and of_directory.weights is not None
    assert of_hub.difference(of_directory) is None
