"""Sliding windows: blocks that have one keep only that in cache, and compute the same, however far a session goes."""

import asyncio
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import swarm.compat  # noqa: F401

import numpy as np
import pytest
import torch
from hivemind import MSGPackSerializer
from transformers import AutoModelForCausalLM, PreTrainedModel

from generation.loop import generate
from generation.parameters import GenerationParams
from generation.text import Detokenizer
from swarm.client.model import SwarmModel
from swarm.families.attention import Scoring
from swarm.local import LocalSwarm
from swarm.server import kernels
from swarm.server.attention_cache import ROOM, CacheDescriptor, Reach, ring_slots
from swarm.server.blocks import Part, RaggedBlocks
from swarm.server.families.layers import LayerBlocks
from swarm.wire.replies import Abilities, read_abilities
from swarm.wire.requests import rewound
from swarm.wire.text import Malformed
from tests.conftest import greedy, load_model, tiny_server
from tests.support.drafts import prophecies
from tests.support.families import assert_close, chosen, load_blocks, made_once, make_tiny_family, reference_states
from tests.test_batching import CPU, POISON, Bench, all_sent, fail_for_poison, petals_outputs, ragged
from tests.test_session import PROMPTS, infos, run_greedy

WINDOW = 8  # of the tiny models
# The windows of their four layers.
WINDOWS = {
    "mistral": (8, 8, 8, 8),  # in compiled loops
    "qwen2-window": (None, None, 8, 8),
    "gemma2": (8, None, 8, None),
    "gemma3": (8, None, 8, None),
    "gpt_oss": (8, None, 8, None),  # with sinks
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made_once(lambda: tmp_path_factory.mktemp("windows"), make_tiny_family)


# Slots


def test_ring_slots() -> None:
    for capacity in (1, 2, 7):
        for start in range(3 * capacity):
            for end in range(start + 1, start + capacity + 1):
                found = [slot for first, last in ring_slots(start, end, capacity) for slot in range(first, last)]
                assert found == [position % capacity for position in range(start, end)]


def descriptor(windows: Sequence[int | None], max_length: int, room: int, rows: int = 1) -> CacheDescriptor:
    return CacheDescriptor(tuple(windows), rows, max_length, 2, 16, torch.float32, CPU, room)


@pytest.mark.parametrize("windows", [(8, 8), (None, 5), (3, None, 20), (60, None), (None, None)])
@pytest.mark.parametrize("seed", range(5))
def test_how_far_a_session_can_go_back(windows: tuple[int | None, ...], seed: int) -> None:
    """Against a record of what is in each slot: wherever a session may go on, all that its tokens see is there."""
    rng, described = random.Random(seed), descriptor(windows, 100, 12)
    reach, end, back = Reach(described), 0, False
    rings = [[-1] * described.capacity(window) for window in windows]  # the position that each slot holds

    def holds(start: int) -> bool:
        needed = [range(0 if window is None else max(0, start + 1 - window), start) for window in windows]
        return all(ring[p % len(ring)] == p for ring, seen in zip(rings, needed, strict=True) for p in seen)

    for _ in range(200):
        allowed = [start for start in range(end + 1) if reach.allows(start)]
        assert 0 in allowed and end in allowed and all(map(holds, allowed))
        if not back:  # and wherever that is so, it may
            assert allowed == [start for start in range(end + 1) if start == 0 or holds(start)]
        start = rng.choice(allowed) if rng.random() < 0.2 else end
        back = back or start not in (0, end)
        if start == 0:
            back = False
        tokens = min(rng.randint(1, described.longest), described.max_length - start)
        for ring in rings:
            for position in range(start, start + tokens):
                ring[position % len(ring)] = position
        reach.advance(start, start + tokens)
        end = start + tokens
        if end == described.max_length:
            reach, end, back = Reach(described), 0, False
            rings = [[-1] * len(ring) for ring in rings]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loops_in_rings(dtype: torch.dtype) -> None:
    """Sequences in rings of different sizes give what caches of all tokens give, step by step around them."""
    torch.manual_seed(0)
    heads, group, size, length = 2, 3, 16, 80
    scoring = Scoring(0.3, window=5, softcap=0.7, sinks=torch.linspace(-1, 2, heads * group))
    attention = kernels.Attention(None, length, group)
    capacities = [8, 11, 64]
    rings = [torch.zeros(capacity, 2, heads, size, dtype=dtype) for capacity in capacities]
    whole = [torch.zeros(length, 2, heads, size, dtype=dtype) for _ in capacities]
    position = 0
    while position + 4 <= length:
        lengths = [1, 3, 2] if position % 2 else [4, 1, 2]
        count = min(lengths)  # sequences go on together, and what some have computed further is computed again
        positions = np.concatenate([np.arange(position, position + n) for n in lengths])
        queries = torch.randn(len(positions), heads, group, size).to(dtype)
        new = torch.randn(len(positions), 2, heads, size).to(dtype)
        where = [np.repeat([cache.data_ptr() for cache in caches], lengths) for caches in (rings, whole)]
        found = attention(queries, new, where[0], positions, scoring, np.repeat(capacities, lengths))
        torch.testing.assert_close(found, attention(queries, new, where[1], positions, scoring), rtol=0, atol=0)
        position += count


# Blocks


def random_batches(lengths: Sequence[int], longest: int, seed: int) -> list[list[tuple[int, int, int]]]:
    """Return batches that compute sequences in pieces: sequence, start and tokens of each."""
    rng, done, batches = random.Random(seed), [0] * len(lengths), []
    while any(done[i] < length for i, length in enumerate(lengths)):
        batch = []
        for i in sorted(range(len(lengths)), key=lambda _: rng.random()):
            size = min(rng.choice([0, 1, 1, 1, 2, 5, longest - 1, longest]), longest, lengths[i] - done[i])
            if size:
                batch.append((i, done[i], size))
                done[i] += size
        if batch:
            batches.append(batch)
    return batches


@torch.inference_mode()
def in_random_batches(blocks: RaggedBlocks, inputs: torch.Tensor, lengths: Sequence[int], seed: int) -> list[Any]:
    """Compute the inputs' beginnings of these lengths as sequences that share batches; sessions differ in length."""
    count = len(blocks.blocks)
    caches = [blocks.cache_descriptor(0, count, 1, n).make_zeros().sequences[0] for n in lengths]
    outputs: list[list[torch.Tensor]] = [[] for _ in lengths]
    for batch in random_batches(lengths, caches[-1].longest, seed):
        parts = [Part(caches[i], start, size) for i, start, size in batch]
        hidden = torch.cat([inputs[start : start + size] for _, start, size in batch])
        computed = blocks.forward(hidden, parts, 0, count).split([part.length for part in parts])
        for (i, _, _), rows in zip(batch, computed, strict=True):
            outputs[i].append(rows)
    return [torch.cat(rows) for rows in outputs]


@pytest.mark.parametrize("room", [4, 40])  # parts of more than 32 tokens are computed by PyTorch
@pytest.mark.parametrize("variant", WINDOWS)
def test_blocks_equal_transformers_around_the_ring(variant: str, room: int, paths: Any) -> None:
    inputs, outputs = reference_states(paths(variant), 230)
    config, blocks = load_blocks(paths(variant))
    plain, by_torch = (LayerBlocks(blocks, config, torch.float32, 256) for _ in range(2))
    by_torch._attention = None
    fused, _ = ragged(paths(variant))
    for seed, computing in enumerate((plain, by_torch, fused)):
        assert computing.windows == WINDOWS[variant]
        computing.room = room
        lengths = [20, 90, 230]
        for length, computed in zip(lengths, in_random_batches(computing, inputs, lengths, seed), strict=True):
            assert_close(computed, outputs[:length])


def test_a_cache_is_as_large_as_the_windows(paths: Any) -> None:
    token = 2 * 2 * 32 * 4  # bytes in a block: keys and values, two heads, their size, float32
    for variant, windows in WINDOWS.items():
        blocks, _ = ragged(paths(variant))
        size = token if variant != "qwen2-window" else token // 2
        whole = sum(window is None for window in windows)
        for length, kept in ((100, 100), (5000, WINDOW - 1 + ROOM)):
            described = blocks.cache_descriptor(0, 4, 3, length)
            cache = described.make_zeros()
            allocated = sum(tensor.nbytes for tensor in cache._tensors.values())
            assert allocated == described.numel() * 4 == 3 * size * (whole * length + (4 - whole) * kept)
        assert blocks.cache_descriptor(2, 3, 1, 5000).numel() * 4 == size * kept


def test_without_windows_nothing_changes() -> None:
    (shape,) = descriptor((None,) * 4, 100, ROOM, rows=3).shapes.values()
    assert shape == (4, 3, 100, 2, 2, 16)


def test_more_tokens_at_once_than_a_ring_has_room_for_are_refused() -> None:
    (sequence,) = descriptor((8, None), 100, 12).make_zeros().sequences
    Part(sequence, 50, 12)
    with pytest.raises(ValueError, match="13 tokens are more than the 12"):
        Part(sequence, 50, 13)
    (short,) = descriptor((8, None), 19, 12).make_zeros().sequences  # is never overwritten
    Part(short, 0, 19)


def test_a_layer_with_another_window_than_its_cache_is_not_computed(paths: Any) -> None:
    blocks, _ = ragged(paths("gemma3"))
    cache = blocks.cache_descriptor(0, 4, 1, 20).make_zeros().sequences[0]
    blocks.blocks[2].self_attn.sliding_window = 9
    with torch.inference_mode(), pytest.raises(ValueError, match="block 2 has a window of 9, and its cache one of 8"):
        blocks.forward(torch.randn(3, 64), [Part(cache, 0, 3)], 0, 4)


# Sessions of a server


def equal(output: torch.Tensor, modules: list[Any], inputs: torch.Tensor) -> None:
    assert_close(output, petals_outputs(modules, inputs)[-len(output) :])


def narrow(path: Path) -> tuple[RaggedBlocks, list[Any]]:
    """Load a model's blocks, whose rings have little room."""
    blocks, modules = ragged(path)
    blocks.room = 12
    return blocks, modules


@pytest.mark.parametrize("variant", ["mistral", "gemma3", "gpt_oss"])
def test_sessions_that_go_back(variant: str, paths: Any) -> None:
    """Short ways are gone at no cost, long ones are refused; the beginning is never too far."""
    blocks, modules = narrow(paths(variant))

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            bench.batcher.start()
            session, tokens = await bench.open(120), torch.randn(70, 64)
            equal(await bench.step(session, 0, tokens), modules, tokens)
            assert bench.batcher.batches.value == 6  # of no more tokens than there is room for
            for back in (1, 5, 12, 6):
                start = len(tokens) - back
                tokens = torch.cat([tokens[:start], torch.randn(back, 64)])
                equal(await bench.step(session, start, tokens[start:]), modules, tokens)
            for position in range(70, 110):
                tokens = torch.cat([tokens, torch.randn(1, 64)])
                equal(await bench.step(session, position, tokens[position:]), modules, tokens)
            for start in (1, 7, 8, 60, 97):
                with pytest.raises(RuntimeError, match=f"what tokens from position {start} see is overwritten"):
                    await bench.step(session, start, torch.randn(1, 64))
            equal(await bench.step(session, 98, tokens[98:]), modules, tokens)
            with pytest.raises(RuntimeError, match="position 97"):
                await bench.step(session, 97, torch.randn(1, 64))
            again = torch.randn(15, 64)  # fewer than there are slots
            equal(await bench.step(session, 0, again), modules, again)
            for start in (14, 3, 1):
                equal(await bench.step(session, start, again[start:]), modules, again)

    asyncio.run(scenario())


@pytest.mark.parametrize("variant", ["mistral", "gemma3"])
def test_sequences_that_go_on_from_each_other(variant: str, paths: Any) -> None:
    """A prompt that is computed once for all, then hypotheses, once around the ring and further."""
    blocks, modules = narrow(paths(variant))

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            bench.batcher.start()
            session, prompt = await bench.open(120, batch_size=3), torch.randn(1, 29, 64)
            outputs = await bench.channel.step(session, 0, prompt, None, None)
            equal(outputs[0], modules, prompt[0])
            rows = [prompt[0]] * 3
            for turn in range(25):
                hypotheses = [None, [2, 0, 0], [1, 1, 2]][turn % 3]
                tokens = torch.randn(3, 1 + turn % 4, 64)
                start = len(rows[0])
                outputs = await bench.channel.step(session, start, tokens, None, hypotheses)
                before = rows if hypotheses is None else [rows[number] for number in hypotheses]
                rows = [torch.cat([past, new]) for past, new in zip(before, tokens, strict=True)]
                for output, row in zip(outputs, rows, strict=True):
                    equal(output, modules, row)
            assert len(rows[0]) > 4 * 19

    asyncio.run(scenario())


def test_a_batch_that_is_computed_again_overwrites_nothing_it_sees(paths: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When another's step has failed after this one's tokens were written."""
    blocks, modules = narrow(paths("gemma3"))
    fail_for_poison(monkeypatch, blocks)
    forward, computing = blocks.forward, threading.Event()

    def noted(*args: Any) -> torch.Tensor:
        computing.set()
        return forward(*args)

    monkeypatch.setattr(blocks, "forward", noted)

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            bench.batcher.start()
            session, tokens = await bench.open(120), torch.randn(52, 64)
            equal(await bench.step(session, 0, tokens[:40]), modules, tokens[:40])
            computing.clear()
            with bench.batcher.batches.get_lock():  # holds the batcher up at the end of a batch, until all wait
                held = asyncio.create_task(bench.step(await bench.open(8), 0, torch.randn(1, 64)))
                assert await asyncio.to_thread(computing.wait, 10)
                step = asyncio.create_task(bench.step(session, 40, tokens[40:]))
                bad = asyncio.create_task(bench.step(await bench.open(8), 0, torch.full((1, 64), POISON)))
                await all_sent()
            await held
            with pytest.raises(RuntimeError, match="poison"):
                await bad
            equal(await step, modules, tokens)

    asyncio.run(scenario())


def test_a_cache_for_other_blocks_is_refused(paths: Any) -> None:
    blocks, modules = narrow(paths("gemma3"))

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            bench.batcher.start()
            session = await bench.channel.open(bench.allocate(blocks.cache_descriptor(0, 2, 1, 20)), 1, 3)
            with pytest.raises(RuntimeError, match=r"does not fit blocks \[1, 3\)"):
                await bench.step(session, 0, torch.randn(1, 64))
            inputs = torch.randn(30, 64)
            part = await bench.step(await bench.open(40, 1, 3), 0, inputs)
            torch.testing.assert_close(part, petals_outputs(modules[1:3], inputs), rtol=1e-4, atol=1e-4)

    asyncio.run(scenario())


# What servers and clients tell each other


def test_what_a_reply_does_not_mention_is_as_before() -> None:
    told = [{"rewind": True, "spread": True}, {"earliest": 7}, {}, {"earliest": 0}]
    abilities, seen = Abilities(), []
    for news in told:
        abilities = read_abilities(MSGPackSerializer.dumps(news), abilities)
        seen.append((abilities.rewind, abilities.spread, abilities.earliest))
    assert seen == [(True, True, 0), (True, True, 7), (True, True, 7), (True, True, 0)]
    for nonsense in (-1, 1.5, True, "7", 2**63):
        with pytest.raises(Malformed):
            read_abilities(MSGPackSerializer.dumps({"earliest": nonsense}))


def test_a_step_that_goes_back_too_far_is_refused_by_the_handler() -> None:
    assert [rewound(30, wanted, 18) for wanted in (None, 30, 18, 0)] == [30, 30, 18, 0]
    for wanted in (17, 1):
        with pytest.raises(Malformed, match=f"cannot go back to position {wanted}: .* from 18 on"):
            rewound(30, wanted, 18)


# Swarms


@dataclass
class Served:
    """A chain of two servers, its client, and plain Transformers."""

    model: SwarmModel
    reference: PreTrainedModel
    text: list[int]


@pytest.fixture(scope="module", params=chosen(["gemma3", "mistral"], usual=["gemma3"]))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served") / request.param
    path = make_tiny_family(directory, request.param, max_position_embeddings=2048)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with LocalSwarm() as local:
        local.start_server(tiny_server(path, "0:2"))
        local.start_server(tiny_server(path, "2:4"))
        model = load_model(path, local)
        yield Served(model, reference, (model.tokenizer.encode(" ".join(PROMPTS)) * 100)[:800])
        model.close()


def tokens_received(served: Served) -> list[int]:
    return [info["inference_tokens"] for info in infos(served.model)]


def go_back(served: Served, length: int, *, knowing: bool = True) -> tuple[list[int], Any]:
    """Compute a text further than it has room, truncate to ``length`` and go on with other tokens.

    :param knowing: whether the client has heard how far back it can go
    :returns: how many tokens each server then computed, and the session, which is closed
    """
    other = [9, 8, 7, 6]
    with served.model.open_session(1000) as session:
        expected = greedy(served.reference, served.text, 12)
        assert run_greedy(session, served.text, len(expected)) == expected
        end = session.position
        assert end > WINDOW - 1 + ROOM + 200
        for reachable in (0, end - ROOM, end):
            assert session.rewinds_to(reachable)
        assert not session.rewinds_to(end - ROOM - 1) and not session.rewinds_to(1)
        if not knowing:
            for span in session._chain.spans:
                span._abilities = Abilities(rewind=True, spread=True)  # type: ignore[union-attr]
        before = tokens_received(served)
        session.truncate(length)
        expected = greedy(served.reference, [*served.text, *expected][:length] + other, 12)
        assert run_greedy(session, other, len(expected)) == expected
        new = len(other) + len(expected) - 1
        return [now - then - new for now, then in zip(tokens_received(served), before, strict=True)], session


@pytest.mark.parametrize("length", [0, 400, 790])
def test_a_way_back_that_costs_nothing(served: Served, length: int) -> None:
    again, session = go_back(served, length)
    assert again == [0, 0] and session.recoveries == 0 and not session.losses


def test_a_way_back_that_is_computed_again(served: Served) -> None:
    """The client knows that what it needs is gone. No server has failed."""
    again, session = go_back(served, 200)
    assert again == [200, 200] and session.recoveries == 0 and not session.losses


def test_a_way_back_that_servers_refuse(served: Served) -> None:
    """A client that does not know is answered as after a lost server: what it then gets is right."""
    again, session = go_back(served, 200, knowing=False)
    assert all(count >= 200 for count in again) and session.recoveries
    assert "cannot go back to position 200" in session.losses[0].reason


@pytest.mark.parametrize("lies", [0.0, 0.3])
def test_drafts_around_the_ring(served: Served, lies: float) -> None:
    """Going back by a draft needs no more room than the ring has."""
    expected = greedy(served.reference, served.text, 40)
    drafting = prophecies([*served.text, *expected], lies, (3, 15))
    with served.model.open_session(1000) as session:
        params = GenerationParams(max_new_tokens=len(expected))
        detokenizers = [Detokenizer(served.model.tokenizer)]
        options = {"detokenizers": detokenizers, "defaults": served.model.generation_config, "drafting": drafting}
        chunks = list(generate(session, served.text, params, budget=len(expected), **options))
        assert [token_id for _, chunk in chunks for token_id in chunk.token_ids] == expected
        assert session.recoveries == 0 and drafting.taken > 10
