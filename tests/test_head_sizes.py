"""Attention heads whose size is not hidden size / heads: on petals' own path, and in what is counted of their cache."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM

from swarm import hardware
from swarm.errors import CacheFull
from swarm.local import LocalSwarm
from tests.conftest import greedy, load_model, tiny_server
from tests.support.families import chosen, make_tiny_family
from tests.test_session import run_greedy

BLOCKS = 4
CACHE_TOKENS = 192  # of each block
# The reference itself is sure of all its answers: the best two logits are further apart than rounding.
PROMPTS = ["The quick brown fox", "Who said that?", "Une abeille, deux abeilles", "The lazy dog " * 5]
TOKENS = 24


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads of 32 in a model of hidden size 64."""
    return make_tiny_family(tmp_path_factory.mktemp("models") / "tiny-qwen3", "qwen3")


@pytest.fixture(params=chosen(["no-batching", "batching"], usual=["no-batching"]))
def swarm_of_qwen3(qwen3: Path, request: pytest.FixtureRequest) -> Iterator[LocalSwarm]:
    with LocalSwarm() as local:
        local.start_server(tiny_server(qwen3, f"0:{BLOCKS}", CACHE_TOKENS, batching=request.param == "batching"))
        yield local


def test_answers_and_cache_are_right(qwen3: Path, swarm_of_qwen3: LocalSwarm) -> None:
    reference = Qwen3ForCausalLM.from_pretrained(qwen3, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(qwen3)
    with contextlib.closing(load_model(qwen3, swarm_of_qwen3, cache_timeout=0.5)) as model:
        (server,) = model.state.servers()
        assert server.cache_tokens_left == 2 * CACHE_TOKENS * BLOCKS  # keys and values count separately
        for prompt in PROMPTS:
            token_ids = tokenizer.encode(prompt)
            expected = greedy(reference, token_ids, TOKENS)
            # What is promised is there: a session may have all of it.
            with model.open_session(CACHE_TOKENS) as session:
                assert run_greedy(session, token_ids, len(expected)) == expected
        with model.open_session(CACHE_TOKENS + 1) as session, pytest.raises(CacheFull):
            session.step([1])


def test_memory_for_cache(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_memory", lambda device: 2**20)
    # 4 blocks, keys and values of 2 heads of 32, 4 bytes each.
    expected = 2**19 // (BLOCKS * 2 * 2 * 32 * 4)
    assert hardware.attn_cache_tokens(AutoConfig.from_pretrained(qwen3), "float32", 0.5, "cpu") == expected
