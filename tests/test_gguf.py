"""GGUF files: written from tiny checkpoints with gguf's own tables, converted, and compared with the checkpoints."""

import json
from pathlib import Path
from typing import Any

import swarm.compat  # noqa: F401

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm import weights
from swarm.errors import ModelUnavailable
from tests.support.families import make_tiny_family
from tests.support.gguf_files import write_gguf

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
