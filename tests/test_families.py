"""Every family of ``swarm.families``, against plain Transformers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import swarm.compat  # noqa: F401

import pytest
import torch
from petals import AutoDistributedConfig
from transformers import AutoModelForCausalLM

from swarm.client.model import SwarmModel
from swarm.families.adopt import adopt
from swarm.families.checkpoint import load_block
from swarm.local import LocalSwarm
from swarm.server.blocks import Part, RaggedBlocks
from swarm.server.families import make_ragged_blocks
from swarm.server.families.layers import LayerBlocks
from swarm.server.families.llama import FusedLayerBlocks
from tests.support.families import VARIANTS, make_tiny_family

FUSED = {"llama", "llama3", "mistral", "qwen2", "qwen2-window", "qwen3"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            made[variant] = make_tiny_family(tmp_path_factory.mktemp("families") / variant, variant)
        return made[variant]

    return get


def load_blocks(path: Path) -> tuple[Any, list[Any]]:
    adopt(str(path))
    config = AutoDistributedConfig.from_pretrained(str(path))
    count = config.num_hidden_layers
    return config, [load_block(str(path), i, config=config, torch_dtype=torch.float32) for i in range(count)]


@torch.inference_mode()
def reference_states(path: Path, tokens: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs of the first block and outputs of the last, [tokens, hidden size] each."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}

    def note_inputs(module: Any, args: Any, kwargs: Any) -> None:
        seen["inputs"] = (args[0] if args else kwargs["hidden_states"])[0].clone()

    model.model.layers[0].register_forward_pre_hook(note_inputs, with_kwargs=True)
    model.model.norm.register_forward_pre_hook(lambda module, args: seen.update(outputs=args[0][0].clone()))
    model(torch.randint(4, 400, (1, tokens), generator=torch.Generator().manual_seed(1)))
    return seen["inputs"], seen["outputs"]


@torch.inference_mode()
def in_batches(blocks: RaggedBlocks, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Compute the inputs as two sequences that share batches, in steps of different sizes."""
    caches = blocks.cache_descriptor(0, len(blocks.blocks), 2, 128).make_zeros().sequences
    batches: list[list[tuple[int, int, int]]] = [  # sequence, start, tokens
        [(0, 0, 5), (1, 0, 40)],
        [(0, 5, 1), (1, 40, 1)],
        [(0, 6, 1), (1, 41, 9)],
        [(0, 7, 40), (1, 50, 1)],
        [(0, 47, 1), (1, 51, 9)],
        [(0, 48, 12)],
    ]
    outputs: list[list[torch.Tensor]] = [[], []]
    for batch in batches:
        parts = [Part(caches[sequence], start, size) for sequence, start, size in batch]
        hidden = torch.cat([inputs[start : start + size] for _, start, size in batch])
        computed = blocks.forward(hidden, parts, 0, len(blocks.blocks))
        for (sequence, _, _), rows in zip(batch, computed.split([size for *_, size in batch]), strict=True):
            outputs[sequence].append(rows)
    return [torch.cat(rows) for rows in outputs]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=float(expected.abs().max()) * 2e-5)


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


@torch.inference_mode()
def as_petals_calls(blocks: Sequence[Any], inputs: torch.Tensor, steps: Sequence[tuple[int, int]]) -> torch.Tensor:
    past: list[Any] = [None] * len(blocks)
    outputs = []
    for start, end in steps:
        hidden = inputs[None, start:end]
        for i, block in enumerate(blocks):
            hidden, past[i] = block(hidden, layer_past=past[i], use_cache=True)
        outputs.append(hidden[0])
    return torch.cat(outputs)


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
