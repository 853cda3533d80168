"""The formats that a checkpoint's weights may have: in parts, pickled, quantised."""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import swarm.compat  # noqa: F401

import numpy as np
import pytest
import torch
from petals import AutoDistributedConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

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
def local() -> Iterator[LocalSwarm]:
    with LocalSwarm() as local:
        yield local


@pytest.fixture(scope="module")
def served_parts(parts: Path, local: LocalSwarm) -> Iterator[SwarmModel]:
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


def test_malicious_pickles_of_the_hub_are_refused(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Petals takes a file that it cannot read for a damaged download, and downloads it again, forever."""
    trap = tmp_path / "trap"
    directory = pickled(qwen, tmp_path / "pickled", malice=Malicious(trap))

    def cached(name: str, filename: str, **_: object) -> str | None:
        return str(directory / filename) if (directory / filename).is_file() else None

    adopt(str(directory))
    config = AutoDistributedConfig.from_pretrained(str(directory))
    monkeypatch.setattr("petals.server.from_pretrained.get_file_from_repo", cached)
    options: dict[str, Any] = {"config": config, "torch_dtype": torch.float32, "cache_dir": str(tmp_path)}
    with pytest.raises(ModelUnavailable, match=r"\(posix.mkdir\), which could run any code"):
        load_block("owner/name", 0, **options)
    pickled(qwen, tmp_path / "good")
    shutil.copy(tmp_path / "good" / "pytorch_model.bin", directory)
    assert load_block("owner/name", 0, **options).get_parameter("mlp.up_proj.weight").shape == (160, 64)
    assert not trap.exists()


def test_clients_refuse_malicious_pickles(
    qwen: Path, local: LocalSwarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a model on the hub, whose files nobody looks at before they are loaded."""
    directory = pickled(qwen, tmp_path / "pickled", malice=Malicious(tmp_path / "trap"))
    monkeypatch.setattr(weights, "locate", lambda name, **_: name)
    with pytest.raises(
        ModelUnavailable, match="^.*/pickled holds more than weights.*: convert the model to safetensors$"
    ):
        SwarmModel.load(str(directory), local.swarm, cache_dir=tmp_path, device="cpu", torch_dtype="float32")
    assert not (tmp_path / "trap").exists()


# Quantised


def rewritten(source: Path, directory: Path, quantised: dict[str, Any], state: dict[str, torch.Tensor]) -> Path:
    """Write a copy of a checkpoint with other weights, which its configuration says are quantised."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")
    return directory


def to_fp8(source: Path, directory: Path, size: tuple[int, int] | None, *more: str) -> Path:
    """Write a copy of a checkpoint as Qwen's and DeepSeek's are in FP8.

    :param size: rows and columns of the blocks that have a scale; None: each matrix has one
    :param more: weights that are quantised beside the matrices of the blocks
    """
    state = load_file(source / "model.safetensors")
    for name, weight in list(state.items()):
        if name in more or (".layers." in name and "norm" not in name and weight.ndim == 2):
            scales = torch.rand(
                *(-(-length // part) for length, part in zip(weight.shape, size or weight.shape, strict=True))
            )
            state[f"{name}_scale_inv"] = (scales + 0.5) / 100 if size else (scales.mean() + 0.5) / 100
            state[name] = (weight * 100).to(torch.float8_e4m3fn)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}
    return rewritten(source, directory, settings, state)


@pytest.mark.parametrize("variant", ["qwen3", "qwen3_moe", "gemma3"])
def test_fp8_is_what_transformers_makes_of_it(variant: str, tmp_path: Path) -> None:
    directory = to_fp8(make_tiny_family(tmp_path / "original", variant), tmp_path / "fp8", (16, 16))
    plain = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    assert_same_blocks(load_blocks(directory), plain, rtol=1e-6)


def test_fp8_of_matrices_that_blocks_do_not_divide(qwen: Path, tmp_path: Path) -> None:
    """The last block of rows or columns is then smaller."""
    directory = to_fp8(qwen, tmp_path / "fp8", (48, 40))
    state = load_file(directory / "model.safetensors")
    for number, block in enumerate(load_blocks(directory)):
        for name, weight in block.named_parameters():
            stored = state[f"model.layers.{number}.{name}"]
            if (scales := state.get(f"model.layers.{number}.{name}_scale_inv")) is not None:
                rows, columns = stored.shape
                spread = np.kron(scales.numpy(), np.ones((48, 40), np.float32))[:rows, :columns]
                assert np.array_equal(weight.detach().numpy(), stored.float().numpy() * spread)
            else:
                assert torch.equal(weight, stored)


def test_fp8_with_one_scale_for_a_matrix(qwen: Path, tmp_path: Path) -> None:
    directory = to_fp8(qwen, tmp_path / "fp8", None)
    state = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    expected = state[name].float() * state[f"{name}_scale_inv"]
    assert torch.equal(load_blocks(directory)[0].mlp.up_proj.weight, expected)


def test_fp8_without_scales_is_refused(qwen: Path, tmp_path: Path) -> None:
    state = load_file(to_fp8(qwen, tmp_path / "fp8", (16, 16)) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    del state[f"{name}_scale_inv"]
    directory = rewritten(qwen, tmp_path / "less", {"quant_method": "fp8", "weight_block_size": [16, 16]}, state)
    with pytest.raises(ModelUnavailable, match="^block 0 of .*: there are no scales for mlp.up_proj.weight$"):
        load_blocks(directory)


def test_clients_of_quantised_models(qwen: Path, local: LocalSwarm, tmp_path: Path) -> None:
    """A client needs embeddings, norm and head, which are mostly not quantised; it refuses those that are."""
    options: dict[str, Any] = {"cache_dir": tmp_path, "device": "cpu", "torch_dtype": "float32"}
    good = to_fp8(qwen, tmp_path / "good", (16, 16))
    model = SwarmModel.load(str(good), local.swarm, **options)
    embeddings = load_file(qwen / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.head.embed(range(9))[0], embeddings[:9])
    model.close()
    bad = to_fp8(qwen, tmp_path / "bad", (16, 16), "model.embed_tokens.weight")
    with pytest.raises(ModelUnavailable) as refused:
        SwarmModel.load(str(bad), local.swarm, **options)
    assert str(refused.value) == (
        f"{bad}: embeddings or a head that are quantised (model.embed_tokens.weight_scale_inv) are not supported: "
        "take the original model, or a GGUF file of it"
    )


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise matrices as gpt-oss has them: 32 inputs of an output share a power of two.

    :param weight: [experts, in, out]
    :returns: two values in each byte, [experts, out, in / 32, 16]; exponents, [experts, out, in / 32]; and the matrices
        that they stand for
    """
    groups = weight.transpose(1, 2).unflatten(2, (-1, 32))
    exponents = groups.abs().amax(-1).log2().floor() - 2
    scaled = groups / 2 ** exponents[..., None]
    codes = (scaled[..., None] - FP4).abs().argmin(-1).to(torch.uint8)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    values = FP4[codes.long()] * 2 ** exponents[..., None]
    return blocks, (exponents + 127).to(torch.uint8), values.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_of_gpt_oss(tmp_path: Path, dtype: torch.dtype) -> None:
    original = make_tiny_family(tmp_path / "original", "gpt_oss")
    state = load_file(original / "model.safetensors")
    rounded = {}
    for name, weight in list(state.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            state[f"{name}_blocks"], state[f"{name}_scales"], rounded[name] = to_mxfp4(state.pop(name))
            assert (rounded[name] - weight).abs().max() < weight.abs().max() / 5
    assert len(rounded) == 2 * 4
    directory = rewritten(original, tmp_path / "mxfp4", {"quant_method": "mxfp4"}, state)
    adopt(str(directory))
    config = AutoDistributedConfig.from_pretrained(str(directory))
    for number in range(4):
        block = load_block(str(directory), number, config=config, torch_dtype=dtype)
        for name, weight in block.named_parameters():
            key = f"model.layers.{number}.{name}"
            assert torch.equal(weight, (rounded[key] if key in rounded else state[key]).to(dtype)), name


@pytest.mark.parametrize(
    ("variant", "settings", "name"),
    [
        ("llama", {"quant_method": "awq", "bits": 4}, "AWQ"),
        ("llama", {"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ("qwen3", {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ("qwen3", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ("qwen3", {"load_in_8bit": True}, "bitsandbytes"),
        ("qwen3", {"quant_method": "mxfp4"}, "MXFP4"),
        ("gpt_oss", {"quant_method": "quark"}, "quark"),
    ],
)
def test_what_is_quantised_otherwise_is_refused(
    variant: str, settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    original = make_tiny_family(tmp_path / "original", variant)
    directory = rewritten(original, tmp_path / "quantised", settings, load_file(original / "model.safetensors"))
    with pytest.raises(ModelUnavailable) as refused:
        adopt(str(directory))
    assert str(refused.value) == (
        f"{directory}: weights quantised by {name} are not supported for {variant}: "
        "take the original model, its FP8 version, or a GGUF file of it"
    )


def test_quantised_models_of_petals_families_are_refused(tiny_bloom: Path, tmp_path: Path) -> None:
    directory = rewritten(tiny_bloom, tmp_path / "fp8", {"quant_method": "fp8"}, {})
    with pytest.raises(ModelUnavailable, match="weights quantised by FP8 are not supported for bloom"):
        adopt(str(directory))
