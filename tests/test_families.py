"""Every family of ``swarm.families``, against plain Transformers."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import swarm.compat  # noqa: F401

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm.client.model import SwarmModel
from swarm.local import LocalSwarm
from swarm.server.families import make_ragged_blocks
from swarm.server.families.layers import LayerBlocks
from swarm.server.families.llama import FusedLayerBlocks
from tests.support.families import (
    VARIANTS,
    as_petals_calls,
    assert_close,
    in_batches,
    load_blocks,
    made_once,
    make_tiny_family,
    reference_states,
)

FUSED = {"llama", "llama3", "mistral", "qwen2", "qwen2-window", "qwen3"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made_once(lambda: tmp_path_factory.mktemp("families"), make_tiny_family)


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_equal_transformers(variant: str, checkpoints: Any) -> None:
    path = checkpoints(variant)
    inputs, outputs = reference_states(path)
    config, blocks = load_blocks(path)
    assert_close(as_petals_calls(blocks, inputs, [(0, 60)]), outputs)
    assert_close(as_petals_calls(blocks, inputs, [(0, 20), (20, 21), (21, 60)]), outputs)
    modules: Sequence[Any] = [SimpleNamespace(module_shards=[block]) for block in blocks]
    plain = LayerBlocks(blocks, config, torch.float32, 128)
    plain_by_torch = LayerBlocks(blocks, config, torch.float32, 128)
    plain_by_torch._attention = None
    for ragged in (plain, plain_by_torch):
        for computed in in_batches(ragged, inputs):
            assert_close(computed, outputs)
    served = make_ragged_blocks(modules, config, torch.float32, 128)
    assert served is not None and isinstance(served, FusedLayerBlocks) == (variant in FUSED)
    for computed in in_batches(served, inputs):
        assert_close(computed, outputs)


@pytest.fixture(scope="module")
def empty_swarm() -> Iterator[LocalSwarm]:
    """A swarm without servers: enough to load the client's part of a model."""
    with LocalSwarm() as local:
        yield local


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_ends_equal_transformers(variant: str, checkpoints: Any, empty_swarm: LocalSwarm) -> None:
    """Embeddings and logits, which some families scale or cap: greedy answers do not show it."""
    path = checkpoints(variant)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    token_ids = torch.randint(4, 400, (1, 9), generator=torch.Generator().manual_seed(1))
    inputs, outputs = reference_states(path, 9)
    model = SwarmModel.load(str(path), empty_swarm.swarm, cache_dir=path.parent, device="cpu", torch_dtype="float32")
    try:
        torch.testing.assert_close(model.head.embed(token_ids[0].tolist())[0], inputs)
        with torch.inference_mode():
            expected = reference(token_ids).logits[0]
        torch.testing.assert_close(model.head.logits(outputs), expected, rtol=1e-4, atol=1e-4)
    finally:
        model.close()
