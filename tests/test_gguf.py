"""GGUF files: written from tiny checkpoints with gguf's own tables, converted, and compared with the checkpoints."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import swarm.compat  # noqa: F401

import numpy as np
import pytest
import torch
from petals import AutoDistributedConfig
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, FalconForCausalLM

from swarm import weights
from swarm.errors import ModelUnavailable
from swarm.families.adopt import adopt
from swarm.families.checkpoint import load_block
from swarm.families.tensors import check_tensors
from swarm.local import LocalSwarm
from swarm.products.linear import PackedLinear
from swarm.weights.gguf.architectures import ARCHITECTURES
from swarm.weights.gguf.tokens import eos_token_ids, splitter
from tests.conftest import greedy, load_model, tiny_server
from tests.support.families import load_blocks, make_tiny_family
from tests.support.gguf_files import write_gguf
from tests.support.processes import ROOT
from tests.support.tiny import CORPUS, make_tiny_bloom, save_random
from tests.test_weights import FakeHub, hub, locate_all

__all__ = ["hub"]  # a fixture

# What a file does not say and llama.cpp takes for granted.
FIXED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": []},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3": {"query_pre_attn_scalar": 32, "sliding_window_pattern": 6, "num_hidden_layers": 7},
    "mistral": {"sliding_window": None},
}
VARIANTS = (
    "llama llama3 llama-biased mistral mixtral qwen2 qwen3 qwen3_moe gemma2 gemma3 phi3 olmo2 smollm3 granite gpt_oss"
).split()
TEXTS = ["The quick brown fox jumps", "Ein Schwarm </s> von 12345 Servern", "分散された\n\n  x", ""]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            directory = tmp_path_factory.mktemp("gguf") / variant
            made[variant] = make_tiny_family(directory, variant, **FIXED.get(variant, {}))
        return made[variant]

    return get


@torch.inference_mode()
def logits(path: Path | str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    result: torch.Tensor = model(torch.randint(4, 400, (1, 60), generator=torch.Generator().manual_seed(1))).logits
    return result


def assert_converted(checkpoint: Path, tmp_path: Path, **options: Any) -> Path:
    file = write_gguf(checkpoint, tmp_path / "model.gguf", **options)
    place = Path(weights.locate(str(file), cache_dir=tmp_path / "cache"))
    expected = logits(checkpoint)
    torch.testing.assert_close(logits(place), expected, rtol=0, atol=float(expected.abs().max()) * 2e-5)
    return place


@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_files_compute_what_the_checkpoints_do(variant: str, checkpoints: Any, tmp_path: Path) -> None:
    place = assert_converted(checkpoints(variant), tmp_path)
    before, after = (AutoTokenizer.from_pretrained(path) for path in (checkpoints(variant), place))
    for text in TEXTS:
        assert after(text).input_ids == before(text).input_ids
        assert after.decode(after(text).input_ids) == before.decode(before(text).input_ids)
    assert (after.bos_token, after.eos_token, after.pad_token) == ("<s>", "</s>", "<pad>")
    assert after.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
    generation = json.loads((place / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("variant", "rotation"),
    [
        ("llama", LINEAR),
        ("qwen3", LINEAR),
        ("llama", {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 64}),
        ("gemma3", {"full_attention": LINEAR, "sliding_attention": LOCAL}),  # so are those from 4B
    ],
)
def test_scaled_rotations(variant: str, rotation: dict[str, Any], tmp_path: Path) -> None:
    settings = {**FIXED.get(variant, {}), "rope_parameters": rotation}
    assert_converted(make_tiny_family(tmp_path / "model", variant, **settings), tmp_path)


def make_tiny_falcon_7b(directory: Path) -> Path:
    options = {"num_hidden_layers": 2, "multi_query": True, "alibi": False, "bias": False}
    return save_random(FalconForCausalLM, FalconConfig, directory, **options)


@pytest.mark.parametrize("make", [make_tiny_bloom, make_tiny_falcon_7b])
def test_families_of_petals(make: Any, tmp_path: Path) -> None:
    assert_converted(make(tmp_path / "model"), tmp_path)


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "MXFP4"])
def test_quantised_files(variant: str, kind: str, checkpoints: Any, tmp_path: Path) -> None:
    """What is converted are the file's own values: only those that quantising took away are gone."""
    file = write_gguf(checkpoints(variant), tmp_path / "model.gguf", kind)
    place = Path(weights.locate(str(file), cache_dir=tmp_path / "cache"))
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (checkpoints(variant), place))
    quantised = 0
    for name, weight in before.state_dict().items():
        converted = after.state_dict()[name]
        assert converted.dtype == torch.float32
        errors = (converted - weight).abs().max() / weight.abs().max()
        assert errors <= {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2, "Q4_1": 0.1, "MXFP4": 0.3}[kind], name
        quantised += bool(errors > 1e-6)
    assert quantised >= 4 * 6  # matrices of each block


@pytest.mark.parametrize("variant", ["gemma3", "mixtral", "gpt_oss"])
def test_servers_read_converted_files(variant: str, checkpoints: Any, tmp_path: Path) -> None:
    place = weights.locate(str(write_gguf(checkpoints(variant), tmp_path / "model.gguf")), cache_dir=tmp_path / "cache")
    adopt(place)
    config = AutoDistributedConfig.from_pretrained(place)
    layers = AutoModelForCausalLM.from_pretrained(checkpoints(variant), dtype="auto").model.layers
    for number, layer in enumerate(layers):
        block = load_block(place, number, config=config, torch_dtype=torch.float32)
        for name, weight in layer.named_parameters():
            torch.testing.assert_close(block.get_parameter(name), weight, rtol=0, atol=1e-6)


def test_large_models_are_written_in_parts_and_in_bfloat16(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm.weights.gguf.FLOAT32_PARAMETERS", 1000)
    monkeypatch.setattr("swarm.weights.gguf.files.FILE_SIZE", 200_000)
    file = write_gguf(checkpoints("qwen3"), tmp_path / "model.gguf")
    place = Path(weights.locate(str(file), cache_dir=tmp_path / "cache"))
    assert len(list(place.glob("model-*.safetensors"))) > 3
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (checkpoints("qwen3"), place))
    for name, weight in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], weight.bfloat16())


@pytest.mark.parametrize(
    ("variant", "kind"), [("llama", "Q4_0"), ("llama", "Q4_1"), ("llama", "Q8_0"), ("qwen3_moe", "Q8_0")]
)
def test_large_models_keep_their_bits(
    variant: str, kind: str, checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers compute with the values of the file, as of a small one."""
    file = write_gguf(checkpoints(variant), tmp_path / "model.gguf", kind)
    small = load_blocks(Path(weights.locate(str(file), cache_dir=tmp_path / "small")))[1]
    monkeypatch.setattr("swarm.weights.gguf.FLOAT32_PARAMETERS", 1000)
    place = Path(weights.locate(str(file), cache_dir=tmp_path / "large"))
    check_tensors(str(place))
    for quant in (None, "auto"):
        for block, expected in zip(load_blocks(place, quant)[1], small, strict=True):
            layers = {name: layer for name, layer in expected.named_modules() if isinstance(layer, torch.nn.Linear)}
            assert len(layers) >= 4
            for name, layer in layers.items():
                found: Any = block.get_submodule(name)
                assert isinstance(found, PackedLinear) == (quant == "auto")
                weight = found.product.dense() if quant == "auto" else found.weight
                assert torch.equal(weight, layer.weight), name
                if quant == "auto":
                    assert found.weights.format == ("int8 in groups" if kind == "Q8_0" else "int4")


# Names


def test_names(checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(checkpoints("llama"), tmp_path / "My.Model.Q8_0.gguf")
    place = weights.locate(str(file), cache_dir=tmp_path / "cache")
    prefix = weights.dht_prefix(str(file))
    assert prefix == Path(place).name
    assert re.fullmatch("My-Model-Q8_0-[0-9a-f]{8}-v2", str(prefix))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (file.name, f"./{file.name}", f"~/{file.name}"):
        assert (weights.locate(name, cache_dir=tmp_path / "cache"), weights.dht_prefix(name)) == (place, prefix)
    changed = bytearray(file.read_bytes())
    changed[-50] ^= 1
    file.write_bytes(changed)
    assert weights.dht_prefix(str(file)) not in (None, prefix)


def test_names_on_the_hub(checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub's cache holds is not asked for again."""
    file = write_gguf(checkpoints("llama"), tmp_path / "model.gguf")
    asked: list[tuple[str, str]] = []

    def cached(repository: str, name: str) -> str | None:
        asked.append((repository, name))
        return str(file)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    name = "owner/name:files/model.gguf"
    assert weights.locate(name, cache_dir=tmp_path / "cache") == weights.locate(str(file), cache_dir=tmp_path / "cache")
    assert weights.dht_prefix(name) == weights.dht_prefix(str(file))
    assert set(asked) == {("owner/name", "files/model.gguf")}


def test_files_are_downloaded_from_the_hub(
    checkpoints: Any, tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(checkpoints("llama"), tmp_path / "model.gguf")
    monkeypatch.setitem(FakeHub.FILES, "/org/good/resolve/main/files/model.gguf", file.read_bytes())
    names = ["org/good:files/model.gguf", "org/missing:model.gguf", "org/bare:model.gguf"]
    place, *refusals = locate_all(hub, tmp_path / "hub", *names)
    assert Path(place).name == Path(weights.locate(str(file), cache_dir=tmp_path / "cache")).name
    problem = "ModelUnavailable: cannot get org/{} from the hub: {}"
    assert refusals == [
        problem.format("missing", "there is no such model, or it is private"),
        problem.format("bare", "it has no model.gguf"),
    ]
    assert FakeHub.requests.count("GET org/good") == 1
    assert locate_all(hub, tmp_path / "hub", names[0]) == [place]
    assert FakeHub.requests.count("GET org/good") == 1


def refusal(name: Path | str, tmp_path: Path) -> str:
    with pytest.raises(ModelUnavailable) as refused:
        weights.locate(str(name), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.partial"))
    return str(refused.value)


def test_no_such_file(tmp_path: Path) -> None:
    name = tmp_path / "model.gguf"
    expected = f"{name}: no such file; of a file on the hub, the name is OWNER/NAME:FILE.gguf"
    assert refusal(name, tmp_path) == expected


def test_broken_files(checkpoints: Any, tmp_path: Path) -> None:
    file = write_gguf(checkpoints("llama"), tmp_path / "model.gguf")
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5000], whole[:20], b"", b"version https://git-lfs", b"\0" * 9999):
        file.write_bytes(content)
        assert refusal(file, tmp_path).startswith(f"{file}: ")


# What is not understood


@pytest.mark.parametrize(
    ("variant", "settings", "reason"),
    [
        ("llama", {"arch__new_setting": 1}, "it has settings that are not understood: llama.new_setting"),
        ("qwen3", {"arch__attention__clamp_kqv": 1.5}, "not understood: qwen3.attention.clamp_kqv"),
        ("llama", {"arch__rope__scaling__type": "longrope"}, "its rotation is scaled by 'longrope'"),
        ("llama", {"arch__rope__scaling__type": "yarn"}, "it has no 'llama.rope.scaling.original_context_length'"),
        ("llama", {"arch__rope__scaling__factor": 4.0}, "its rotation is scaled by 4.0, and it does not say how"),
        ("llama", {"split__count": 2}, "merge them with llama-gguf-split --merge"),
        ("olmo2", {"arch__attention__sliding_window": 8}, "not understood: olmo2.attention.sliding_window"),
        ("llama", {"tokenizer__ggml__add_sep_token": True}, "its tokenizer adds separators"),
    ],
)
def test_settings_that_are_not_understood_are_refused(
    variant: str, settings: dict[str, Any], reason: str, checkpoints: Any, tmp_path: Path
) -> None:
    file = write_gguf(checkpoints(variant), tmp_path / "model.gguf", **settings)
    assert f"{file}: cannot convert {file}: " in (sentence := refusal(file, tmp_path))
    assert reason in sentence


def edited(file: Path, old: bytes, new: bytes) -> Path:
    """Replace a text in the file by one of the same length."""
    assert len(old) == len(new) and old in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(old, new))
    return file


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"gpt-2", b"gpt-9", "its kind of tokenizer is not known: gpt2, gpt-9"),
        (b"gpt2", b"gpt9", "its kind of tokenizer is not known: gpt9"),
        (b"blk.3.attn_q.weight", b"blk.3.attn_z.weight", "it has no 'blk.3.attn_q.weight'"),
        (b"blk.3.attn_q.weight", b"blk.4.attn_q.weight", "it has no 'blk.3.attn_q.weight'"),
        (b"qwen2.block_count", b"qwen2.block_kount", "it has no 'qwen2.block_count'"),
    ],
)
def test_files_of_another_kind_are_refused(
    old: bytes, new: bytes, reason: str, checkpoints: Any, tmp_path: Path
) -> None:
    file = edited(write_gguf(checkpoints("qwen2"), tmp_path / "model.gguf"), old, new)
    assert reason in refusal(file, tmp_path)


def test_tensors_that_are_not_understood_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    file = write_gguf(checkpoints("llama-biased"), tmp_path / "model.gguf")
    # Without this one, no biases are looked for.
    edited(file, b"blk.0.attn_q.bias", b"blk.0.attn_x.bias")
    assert "it has tensors that are not understood: blk.0.attn_k.bias, blk.0.attn_output.bias" in refusal(
        file, tmp_path
    )


def test_unknown_architectures_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    file = edited(write_gguf(checkpoints("qwen2"), tmp_path / "model.gguf"), b"qwen2", b"mamba")
    assert "its architecture is 'mamba'; these are known: llama, qwen2, qwen3" in refusal(file, tmp_path)


def test_rotations_other_than_those_of_llama3_are_refused(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    divisors = np.linspace(1, 8, 8).astype(np.float32)
    monkeypatch.setattr("tests.support.gguf_files.llama3_divisors", lambda model: divisors)
    file = write_gguf(checkpoints("llama3"), tmp_path / "model.gguf")
    assert "it scales the frequencies of its rotation otherwise than Llama 3" in refusal(file, tmp_path)


# Tokenizers


def test_sentencepiece(checkpoints: Any, tmp_path: Path) -> None:
    """Texts become the tokens that SentencePiece itself makes of them.

    But for those that begin with a space: Transformers, like the originals of Llama and Mistral there, adds none then.
    """
    model = train_sentencepiece(tmp_path)
    file = write_gguf(checkpoints("llama"), tmp_path / "model.gguf", sentencepiece=model)
    tokenizer = AutoTokenizer.from_pretrained(weights.locate(str(file), cache_dir=tmp_path / "cache"))
    original = SentencePieceProcessor(str(model))
    for text in ("The quick brown fox", "Ein  Schwarm\nvon 12 Servern, 🙂", "分散された x", "naïve", "x"):
        assert tokenizer(text).input_ids == [original.bos_id(), *original.encode(text)]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("a</s>").input_ids[-1] == original.eos_id()


@pytest.mark.parametrize(
    ("kind", "text", "pieces"),
    [
        ("llama-bpe", "Don't 12345", ["Don", "'t", " ", "123", "45"]),
        ("qwen2", "Don't 12", ["Don", "'t", " ", "1", "2"]),
        ("tekken", "McCoy 12", ["Mc", "Coy", " ", "1", "2"]),
        ("gpt-4o", "McCoy's 1234", ["Mc", "Coy's", " ", "123", "4"]),
        ("smollm", "Don't 12", ["Don", "'t", " ", "1", "2"]),
        ("gpt-2", "Don't 12", ["Don", "'t", " 12"]),
        ("bloom", "Don't, 12!", ["Don't", ",", " 12", "!"]),
        ("falcon", "Don't 12345!", ["Don", "'", "t", " ", "123", "45", "!"]),
    ],
)
def test_splits_of_texts(kind: str, text: str, pieces: list[str]) -> None:
    found = splitter(kind).pre_tokenize_str(text)
    assert [piece.replace("Ġ", " ") for piece, _ in found] == pieces


def test_tokens_that_end_answers() -> None:
    def ends(*tokens: str, **ids: int) -> Any:
        return eos_token_ids({"tokens": tokens, "token_type": [3] * len(tokens), "eos_token_id": 0, **ids})

    assert ends("</s>", "a") == 0
    assert ends("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>") == [0, 1, 2]
    assert ends("<eos>", "x", "<end_of_turn>") == [0, 2]
    assert ends("</s>", "turn", eot_token_id=1) == [0, 1]
    assert ends("<|endoftext|>", "<|end|>") == [0, 1]
    assert ends("<|return|>", "<|end|>", "<|call|>") == [0, 2]  # of gpt-oss: a thought's end is no answer's
    assert eos_token_ids({"tokens": ["a"], "token_type": [1]}) is None


def train_sentencepiece(directory: Path) -> Path:
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_prefix=str(directory / "spm"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        split_digits=True,
    )
    return directory / "spm.model"


# In use


def test_a_swarm_of_a_gguf_file(checkpoints: Any, tmp_path: Path) -> None:
    """Client and server are told the file only, and meet under its name."""
    file = write_gguf(checkpoints("gemma3"), tmp_path / "model.gguf")
    reference = AutoModelForCausalLM.from_pretrained(checkpoints("gemma3"), dtype="auto").eval()
    token_ids = AutoTokenizer.from_pretrained(checkpoints("gemma3"))(TEXTS[0]).input_ids
    expected = greedy(reference, token_ids, 12)
    with LocalSwarm() as local:
        options = dataclasses.replace(tiny_server(file, "0:7"), cache_dir=tmp_path)
        local.start_server(options)
        model = load_model(file, local)
        answer: list[int] = []
        with model.open_session(64) as session:
            while len(answer) < len(expected):
                answer.append(int(session.step(answer[-1:] or token_ids).argmax()))
        model.close()
    assert answer == expected


def test_documented_architectures() -> None:
    documents = (ROOT / "docs" / "models.md").read_text()
    (line,) = re.findall(r"\*\*Architectures\*\*: (.*?)\.\n", documents, re.DOTALL)
    assert set(re.findall("`(.*?)`", line)) == set(ARCHITECTURES)
