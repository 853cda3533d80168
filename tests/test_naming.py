"""How a model's blocks are named in the DHT, and that two models never share a name."""

import json
from pathlib import Path

import pytest

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
