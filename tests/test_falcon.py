"""Falcon in all its variants, against plain Transformers."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import swarm.compat  # noqa: F401
from swarm.compat import shared_dht

import pytest
import torch
from petals import AutoDistributedModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig

from swarm.client.model import SwarmModel
from swarm.errors import ModelUnavailable
from swarm.families.adopt import adopt
from swarm.local import LocalSwarm
from swarm.server.blocks import Part, RaggedBlocks
from swarm.server.families import make_ragged_blocks
from swarm.server.families.falcon import FalconBlocks
from swarm.weights import dht_prefix
from tests.conftest import greedy, load_model, tiny_server
from tests.support.falcon import FALCON_VARIANTS, NEWER, make_tiny_falcon
from tests.support.families import (
    as_petals_calls,
    assert_close,
    chosen,
    in_batches,
    load_blocks,
    made_once,
    reference_states,
)
from tests.test_session import PROMPTS, infos, run_greedy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a checkpoint of a variant, once."""
    return made_once(lambda: tmp_path_factory.mktemp("falcon"), make_tiny_falcon)


def ragged(blocks: list[Any], config: Any, max_length: int = 128) -> RaggedBlocks:
    modules: Any = [SimpleNamespace(module_shards=[block]) for block in blocks]
    ragged = make_ragged_blocks(modules, config, torch.float32, max_length)
    assert isinstance(ragged, FalconBlocks)
    return ragged


@pytest.mark.parametrize("variant", FALCON_VARIANTS)
def test_blocks_equal_transformers(variant: str, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint(variant)
    inputs, outputs = reference_states(path)
    config, blocks = load_blocks(path)
    assert_close(as_petals_calls(blocks, inputs, [(0, 60)]), outputs)
    assert_close(as_petals_calls(blocks, inputs, [(0, 20), (20, 21), (21, 60)]), outputs)
    batching = ragged(blocks, config)
    for computed in in_batches(batching, inputs):
        assert_close(computed, outputs)
    batching._attention = None  # as on a GPU
    for computed in in_batches(batching, inputs):
        assert_close(computed, outputs)
    # Petals goes on using the blocks, whose weights are packed now.
    assert_close(as_petals_calls(blocks, inputs, [(0, 59), (59, 60)]), outputs)


def test_alibi_is_rounded_to_bfloat16(checkpoint: Callable[[str], Path]) -> None:
    """Its biases are what bfloat16 holds of them, which far positions show: 257 counts as 256."""
    path = checkpoint("rw")
    inputs, outputs = reference_states(path, 520)
    config, blocks = load_blocks(path)
    assert_close(as_petals_calls(blocks, inputs, [(0, 300), (300, 520)]), outputs)
    batching = ragged(blocks, config, 520)
    cache = batching.cache_descriptor(0, len(blocks), 1, 520).make_zeros().sequences[0]
    with torch.inference_mode():
        rows = [batching.forward(inputs[:500].clone(), [Part(cache, 0, 500)], 0, len(blocks))]
        for start in range(500, 520):
            rows.append(batching.forward(inputs[start : start + 1].clone(), [Part(cache, start, 1)], 0, len(blocks)))
    assert_close(torch.cat(rows), outputs)


@pytest.mark.parametrize("variant", FALCON_VARIANTS)
def test_gradients_equal_transformers(variant: str, checkpoint: Callable[[str], Path]) -> None:
    """What ``rpc_backward`` computes, for a batch of two, before and after the weights are packed."""
    path = checkpoint(variant)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False).transformer
    config, blocks = load_blocks(path)
    generator = torch.Generator().manual_seed(2)
    inputs, weights = torch.randn(2, 2, 30, config.hidden_size, generator=generator)

    def gradients(transformer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        hidden = inputs.clone().requires_grad_()
        return torch.autograd.grad((transformer(hidden) * weights).sum(), hidden)[0]

    def through_blocks(hidden: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            (hidden,) = block.requires_grad_(False)(hidden)
        return model.ln_f(hidden)

    expected = gradients(lambda hidden: model(inputs_embeds=hidden).last_hidden_state)
    assert_close(gradients(through_blocks), expected)
    ragged(blocks, config)
    assert_close(gradients(through_blocks), expected)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({**NEWER, "parallel_attn": False}, "new_decoder_architecture without parallel_attn is not supported"),
        ({**NEWER, "num_kv_heads": 3}, "num_attention_heads 4 is no multiple of num_kv_heads 3"),
        (
            {"num_ln_in_parallel_attn": 2},
            "num_ln_in_parallel_attn 2 with new_decoder_architecture False is not supported",
        ),
        ({"multi_query": False, "num_kv_heads": 2}, "num_kv_heads 2 of 4 heads needs new_decoder_architecture"),
    ],
)
def test_settings_that_transformers_cannot_compute(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    FalconConfig(hidden_size=64, num_attention_heads=4, **settings).save_pretrained(tmp_path)
    with pytest.raises(ModelUnavailable, match=f"{tmp_path}: {reason}"):
        adopt(str(tmp_path))


def assert_greedy(model: SwarmModel, path: Path) -> None:
    """Compare 40 greedy tokens for each prompt with those of plain Transformers."""
    reference, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    for prompt in PROMPTS:
        token_ids = tokenizer.encode(prompt)
        expected = greedy(reference, token_ids, 40)
        with model.open_session(128) as session:
            assert run_greedy(session, token_ids, len(expected)) == expected


@pytest.mark.parametrize("variant", chosen(["40b", "11b", "7b", "rw"], usual=["7b"]))
def test_batching_servers(variant: str, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint(variant)
    with LocalSwarm() as local:
        for blocks in ("0:2", "2:4"):
            local.start_server(tiny_server(path, blocks))
        model = load_model(path, local)
        assert [info["batching"] for info in infos(model)] == [True, True]
        assert_greedy(model, path)
        model.close()


@pytest.mark.parametrize("variant", chosen(["40b", "7b", "rw"], usual=["40b"]))
def test_petals_own_path(variant: str, checkpoint: Callable[[str], Path]) -> None:
    """A server that batches, one that does not, and petals' own ways to generate and to train through both."""
    path = checkpoint(variant)
    causal = AutoModelForCausalLM.from_pretrained(path)
    reference = causal.transformer
    token_ids = torch.randint(4, 400, (2, 9), generator=torch.Generator().manual_seed(3))

    def passes(transformer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = reference.word_embeddings(token_ids).detach().requires_grad_()
        outputs = transformer(inputs_embeds=embeddings).last_hidden_state
        (gradients,) = torch.autograd.grad(outputs.square().sum(), embeddings)
        return outputs, gradients

    with LocalSwarm() as local:
        local.start_server(tiny_server(path, "0:2"))
        local.start_server(tiny_server(path, "2:4", batching=False))
        model = load_model(path, local)
        assert [info["batching"] for info in infos(model)] == [True, False]
        assert_greedy(model, path)
        with shared_dht(local.swarm.dht):
            trained = AutoDistributedModelForCausalLM.from_pretrained(
                str(path), initial_peers=[], dht_prefix=dht_prefix(str(path)), torch_dtype=torch.float32
            )
        generated = trained.generate(token_ids[:1], max_new_tokens=20, do_sample=False)
        assert generated[0, 9:].tolist() == greedy(causal, token_ids[0].tolist(), 20)
        for ours, expected in zip(passes(trained.transformer), passes(reference), strict=True):
            assert_close(ours, expected)
        model.close()
