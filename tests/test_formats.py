"""The formats that a checkpoint's weights may have: in parts, pickled, quantised."""

import contextlib
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import swarm.compat  # noqa: F401

import pytest
import torch
from petals import AutoDistributedConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm import weights
from swarm.client.model import SwarmModel
from swarm.errors import ModelUnavailable
from swarm.families.adopt import adopt
from swarm.families.checkpoint import load_block
from swarm.local import LocalSwarm
from tests.conftest import greedy, load_model, tiny_server
from tests.support.families import make_tiny_family

PROMPT = "The quick brown fox jumps"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_family(tmp_path_factory.mktemp("formats") / "qwen", "qwen3")


def load_blocks(path: Path) -> list[Any]:
    adopt(str(path))
    config = AutoDistributedConfig.from_pretrained(str(path))
    return [load_block(str(path), i, config=config, torch_dtype=torch.float32) for i in range(config.num_hidden_layers)]


def assert_same_blocks(blocks: list[Any], model: Any, rtol: float = 0) -> None:
    for block, layer in zip(blocks, model.model.layers, strict=True):
        loaded, expected = dict(block.named_parameters()), dict(layer.named_parameters())
        assert loaded.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(loaded[name], weight, rtol=rtol, atol=0)


def mapped(file: Path) -> bool:
    """Whether this process has mapped the file into its memory."""
    return str(file) in Path("/proc/self/maps").read_text()


# In parts


@pytest.fixture(scope="module")
def parts(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in six files."""
    directory = tmp_path_factory.mktemp("formats") / "parts"
    AutoModelForCausalLM.from_pretrained(qwen, dtype="auto").save_pretrained(directory, max_shard_size="200KB")
    for file in qwen.glob("tokenizer*"):
        shutil.copy(file, directory)
    assert len(list(directory.glob("*.safetensors"))) == 6
    return directory


def test_blocks_of_a_model_in_parts_are_mapped_and_not_read(parts: Path, qwen: Path) -> None:
    blocks = load_blocks(parts)
    assert_same_blocks(blocks, AutoModelForCausalLM.from_pretrained(qwen, dtype="auto"))
    assert all(mapped(file) for file in parts.glob("*.safetensors"))


def test_a_server_reads_only_the_parts_that_hold_its_blocks(parts: Path, tmp_path: Path) -> None:
    adopt(str(parts))
    copy = tmp_path / "copy"
    shutil.copytree(parts, copy)
    (copy / "model-00006-of-00006.safetensors").write_bytes(b"not yet here")
    config = AutoDistributedConfig.from_pretrained(str(copy))
    load_block(str(copy), 0, config=config, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def served_parts(parts: Path) -> Iterator[SwarmModel]:
    with LocalSwarm() as local:
        local.start_server(tiny_server(parts, "0:4"))
        model = load_model(parts, local)
        yield model
        model.close()


def test_client_and_server_of_a_model_in_parts(served_parts: SwarmModel, parts: Path, qwen: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(qwen, dtype="auto").eval()
    tokens = AutoTokenizer.from_pretrained(qwen)(PROMPT).input_ids
    expected = greedy(reference, tokens, 12)
    answer: list[int] = []
    with served_parts.open_session(64) as session:
        while len(answer) < len(expected):
            answer.append(int(session.step(answer[-1:] or tokens).argmax()))
    assert answer == expected


# Pickles


class Malicious:
    """What is unpickled runs: here it would make a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.directory),)


def pickled(source: Path, directory: Path, **extra: Any) -> Path:
    """Write the model in PyTorch's own format."""
    directory.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, directory)
    state = AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()
    state.pop("lm_head.weight")
    torch.save({**{name: tensor.clone() for name, tensor in state.items()}, **extra}, directory / "pytorch_model.bin")
    return directory


def test_pickled_blocks_are_mapped(qwen: Path, tmp_path: Path) -> None:
    directory = pickled(qwen, tmp_path / "pickled")
    assert weights.locate(str(directory), cache_dir=tmp_path) == str(directory)
    blocks = load_blocks(directory)
    assert_same_blocks(blocks, AutoModelForCausalLM.from_pretrained(qwen, dtype="auto"))
    assert mapped(directory / "pytorch_model.bin")


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickles_are_refused_and_do_not_run(qwen: Path, tmp_path: Path, zipped: bool) -> None:
    trap = tmp_path / "trap"
    directory = pickled(qwen, tmp_path / "pickled", malice=Malicious(trap))
    file = directory / "pytorch_model.bin"
    if not zipped:
        file.write_bytes(pickle.dumps(Malicious(trap), protocol=2))
    with pytest.raises(ModelUnavailable) as refused:
        weights.locate(str(directory), cache_dir=tmp_path)
    sentence = (
        f"{file} holds more than weights (posix.mkdir), which could run any code: convert the model to safetensors"
    )
    assert str(refused.value) == sentence
    adopt(str(directory))
    config = AutoDistributedConfig.from_pretrained(str(directory))
    with pytest.raises(ModelUnavailable, match="convert the model to safetensors"):  # and does not try for ever
        load_block(str(directory), 0, config=config, torch_dtype=torch.float32)
    assert not trap.exists()
    with contextlib.suppress(RuntimeError):  # that the bare pickle is no weights
        torch.load(file, weights_only=False)  # nothing guards against it, and it is a trap
    assert trap.exists()
