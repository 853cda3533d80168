"""Servers that batch: exact beside plain Transformers and stock servers, for this client and petals' own."""

import asyncio
import dataclasses
import functools
import gc
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind.compression import serialize_torch_tensor
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
from hivemind.proto import runtime_pb2
from petals import AutoDistributedConfig
from petals.client.inference_session import InferenceSession
from petals.client.remote_sequential import RemoteSequential
from petals.server.handler import TransformerConnectionHandler
from petals.utils.convert_block import QuantType, convert_block
from petals.utils.misc import DUMMY, DUMMY_INT64
from transformers import BloomForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase

from generation.pace import SIZES
from swarm.client.history import HistoryBudget
from swarm.client.model import SwarmModel
from swarm.client.session import SwarmSession
from swarm.client.terms import SessionTerms
from swarm.errors import SessionLengthExceeded
from swarm.families.adopt import adopt
from swarm.families.checkpoint import load_block
from swarm.local import LocalSwarm
from swarm.server.attention_cache import CacheDescriptor
from swarm.server.batching import CPU_MIXED, CPU_PREFILL, TURN_TOKENS, Batcher, next_batch
from swarm.server.blocks import Part, RaggedBlocks
from swarm.server.cache import SharedMemoryCache
from swarm.server.channel import HEADER, HandlerChannel
from swarm.server.compute import compute_batch
from swarm.server.container import TRAINING_TOKENS
from swarm.server.families import make_ragged_blocks
from swarm.server.families.bloom import BloomBlocks
from swarm.server.families.layers import LayerBlocks
from swarm.server.families.llama import FusedLayerBlocks
from swarm.server.steps import Session, Step, StepKind, is_draft
from swarm.wire.requests import check_inputs, check_room, rewound
from tests.conftest import greedy, load_model, tiny_server
from tests.support.tiny import make_tiny_bloom, make_tiny_llama
from tests.test_session import PROMPTS, in_threads, infos, lose, run_greedy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama") / "tiny-llama")


@pytest.fixture(scope="module")
def stock_chain(tiny_bloom: Path) -> Iterator[SwarmModel]:
    """A swarm in which a batching server is followed by a stock one."""
    with LocalSwarm() as local:
        local.start_server(tiny_server(tiny_bloom, "0:2"))
        local.start_server(tiny_server(tiny_bloom, "2:4", batching=False))
        model = load_model(tiny_bloom, local)
        yield model
        model.close()


def load_blocks(path: Path, quant: QuantType = QuantType.NONE, **options: Any) -> tuple[list[Any], Any]:
    """Load blocks as petals' server does, with some options of their configuration changed."""
    adopt(str(path))
    config = AutoDistributedConfig.from_pretrained(str(path))
    config.update(options)
    blocks = [
        load_block(str(path), i, config=config, torch_dtype=torch.float32) for i in range(config.num_hidden_layers)
    ]
    return [convert_block(block, i, config, (CPU,), CPU, quant) for i, block in enumerate(blocks)], config


def ragged(path: Path) -> tuple[RaggedBlocks, list[Any]]:
    modules, config = load_blocks(path)
    blocks = make_ragged_blocks(modules, config, torch.float32, 256)
    assert blocks is not None
    return blocks, modules


@torch.inference_mode()
def petals_outputs(modules: list[Any], hidden: torch.Tensor) -> torch.Tensor:
    """What petals' own blocks make of a sequence: [tokens, hidden size]."""
    hidden = hidden[None]
    for module in modules:
        (hidden,) = module.forward(hidden)
    return hidden[0]


@pytest.mark.parametrize("by_kernel", [True, False])  # without, attention is computed as on a GPU
@pytest.mark.parametrize("family", [BloomBlocks, FusedLayerBlocks])
def test_ragged_blocks_equal_petals_blocks(family: type, by_kernel: bool, tiny_bloom: Path, tiny_llama: Path) -> None:
    blocks, modules = ragged(tiny_bloom if family is BloomBlocks else tiny_llama)
    assert type(blocks) is family
    if not by_kernel:
        blocks._attention = None
    torch.manual_seed(0)
    lengths, hidden_size = [5, 9, 30], blocks.config.hidden_size
    sequences = [torch.randn(length, hidden_size) for length in lengths]
    caches = [blocks.cache_descriptor(0, 4, 1, 64).make_zeros().sequences[0] for _ in lengths]
    outputs: list[list[torch.Tensor]] = [[] for _ in lengths]
    # Batches of pieces: prompts, single tokens and both together.
    with torch.inference_mode():
        for pieces in ([(0, 0, 4), (2, 0, 7)], [(0, 4, 1), (1, 0, 8), (2, 7, 22)], [(1, 8, 1), (2, 29, 1)]):
            parts = [Part(caches[i], start, length) for i, start, length in pieces]
            inputs = torch.cat([sequences[i][start : start + length] for i, start, length in pieces])
            results = blocks.forward(inputs, parts, 0, 4).split([length for _, _, length in pieces])
            for (i, _, _), result in zip(pieces, results, strict=True):
                outputs[i].append(result)
    for sequence, output in zip(sequences, outputs, strict=True):
        torch.testing.assert_close(torch.cat(output), petals_outputs(modules, sequence), rtol=1e-4, atol=1e-4)


def test_a_part_of_the_span(tiny_llama: Path) -> None:
    """A session may need only some of a server's blocks; its cache is for those."""
    blocks, modules = ragged(tiny_llama)
    hidden = torch.randn(6, 64)
    cache = blocks.cache_descriptor(1, 3, 1, 8).make_zeros().sequences[0]
    with torch.inference_mode():
        output = blocks.forward(hidden.clone(), [Part(cache, 0, 6)], 1, 3)
    torch.testing.assert_close(output, petals_outputs(modules[1:3], hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [make_tiny_bloom, make_tiny_llama])
def test_packed_weights_are_not_kept_a_second_time(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """A checkpoint of the dtype that is computed in is mapped into memory, for as long as one tensor is in there."""
    path = make(tmp_path / "model")
    modules, config = load_blocks(path)
    maps = Path("/proc/self/maps")
    assert str(path) in maps.read_text()
    assert make_ragged_blocks(modules, config, torch.float32, 256) is not None
    gc.collect()
    assert str(path) not in maps.read_text()


def test_quantised_weights_are_left_to_petals(tiny_bloom: Path) -> None:
    modules, config = load_blocks(tiny_bloom, QuantType.NF4)
    assert make_ragged_blocks(modules, config, torch.float32, 256) is None
    hidden = torch.randn(7, 64)
    with LocalSwarm() as local:
        local.start_server(dataclasses.replace(tiny_server(tiny_bloom, "0:4"), quant="nf4"))
        model = load_model(tiny_bloom, local)
        assert [info["batching"] for info in infos(model)] == [False]
        with InferenceSession(model.state.manager, 16) as session, torch.inference_mode():
            outputs = torch.cat([session.step(part) for part in hidden[None].split([4, 3], dim=1)], dim=1)
        model.close()
    torch.testing.assert_close(outputs[0], petals_outputs(modules, hidden), rtol=1e-4, atol=1e-4)


def test_what_a_family_does_not_accept_is_computed_otherwise(tiny_bloom: Path, tiny_llama: Path) -> None:
    """Each guard is its own family's: BLOOM has no word for its activation, so none is read."""
    for path, option, value, expected in (
        (tiny_llama, "hidden_act", "gelu", LayerBlocks),
        (tiny_llama, "hidden_act", "silu", FusedLayerBlocks),
        (tiny_bloom, "pretraining_tp", 2, type(None)),  # by petals
        (tiny_bloom, "hidden_act", "gelu", BloomBlocks),
    ):
        modules, config = load_blocks(path, **{option: value})
        assert type(make_ragged_blocks(modules, config, torch.float32, 256)) is expected, (path.name, option)


class Bench:
    """A batcher without servers: its channels and its cache are in this process."""

    def __init__(self, blocks: RaggedBlocks, channels: int = 1, **options: float) -> None:
        self.blocks = blocks
        self.cache = SharedMemoryCache(2**30)
        self.batcher = Batcher(blocks, self.cache, channels, **options)  # type: ignore[arg-type]
        self.channels: list[HandlerChannel] = [self.batcher.handler_channel(index) for index in range(channels)]
        self.channel = self.channels[0]
        self.handles = 0

    async def __aenter__(self) -> "Bench":
        for channel in self.channels:
            channel._connection = channel._connection.dup()  # as a handler's process has one of its own
            await channel.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self.batcher.is_alive() and not self.batcher.ident:
            self.batcher.start()
        self.batcher.stop()
        await asyncio.to_thread(self.batcher.join, 10)
        assert not self.batcher.is_alive()

    def allocate(self, descriptor: Any) -> int:
        """What `allocate_cache` does in a handler."""
        self.handles += 1
        self.cache._pipe_send.send(((self.handles,), (descriptor,)))
        return self.handles

    def free(self, handle: int) -> None:
        """What `allocate_cache` does in a handler when its session ends, before the channel is sent its closing."""
        self.cache._pipe_send.send(((handle,), None))

    async def open(
        self, max_length: int, first: int = 0, last: int = 4, batch_size: int = 1, channel: HandlerChannel | None = None
    ) -> int:
        descriptor = self.blocks.cache_descriptor(first, last, batch_size, max_length)
        return await (channel or self.channel).open(self.allocate(descriptor), first, last)

    async def step(self, session: int, start: int, hidden: torch.Tensor) -> torch.Tensor:
        return (await asyncio.wait_for(self.channel.step(session, start, hidden[None], None, None), 10))[0]


async def all_sent() -> None:
    """Let the tasks run up to where they wait for an answer."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_steps_that_wait_are_one_batch(tiny_llama: Path) -> None:
    blocks, modules = ragged(tiny_llama)

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            inputs = torch.randn(16, 1, 64)
            sessions = [await bench.open(8) for _ in inputs]
            steps = [asyncio.create_task(bench.step(s, 0, x)) for s, x in zip(sessions, inputs, strict=True)]
            await all_sent()
            bench.batcher.start()
            outputs = await asyncio.gather(*steps)
            assert bench.batcher.batches.value == 1
            for x, output in zip(inputs, outputs, strict=True):
                torch.testing.assert_close(output, petals_outputs(modules, x), rtol=1e-4, atol=1e-4)

    asyncio.run(scenario())


def test_a_long_prompt_lets_others_go_on(tiny_llama: Path) -> None:
    """While a session decodes, another's prompt is computed in chunks; its steps take part in each batch."""
    blocks, modules = ragged(tiny_llama)
    chunks = 2

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            prompt, token = torch.randn(CPU_MIXED + CPU_PREFILL, 64), torch.randn(1, 64)
            long, short = await bench.open(256), await bench.open(8)
            prefill = asyncio.create_task(bench.step(long, 0, prompt))
            decode = asyncio.create_task(bench.step(short, 0, token))
            await all_sent()
            bench.batcher.start()
            await decode
            assert bench.batcher.batches.value < chunks or not prefill.done()
            output = await prefill
            assert bench.batcher.batches.value == chunks
            torch.testing.assert_close(output, petals_outputs(modules, prompt), rtol=1e-4, atol=1e-4)

    asyncio.run(scenario())


def test_different_parts_of_the_span_take_turns(tiny_llama: Path) -> None:
    blocks, modules = ragged(tiny_llama)

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            x = torch.randn(3, 64)
            whole, part = await bench.open(8), await bench.open(8, 1, 3)
            steps = [asyncio.create_task(bench.step(session, 0, x)) for session in (whole, part)]
            await all_sent()
            bench.batcher.start()
            outputs = await asyncio.gather(*steps)
            torch.testing.assert_close(outputs[0], petals_outputs(modules, x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(outputs[1], petals_outputs(modules[1:3], x), rtol=1e-4, atol=1e-4)

    asyncio.run(scenario())


def test_a_batch_that_fails_is_reported_and_the_next_one_works(tiny_llama: Path) -> None:
    blocks, _ = ragged(tiny_llama)

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            bench.batcher.start()
            session = await bench.open(8)
            with pytest.raises(RuntimeError):
                await bench.step(session, 7, torch.randn(3, 64))  # does not fit its cache
            again = await bench.open(8)
            assert (await bench.step(again, 0, torch.randn(3, 64))).shape == (3, 64)

    asyncio.run(scenario())


def test_what_a_closed_session_waits_for_is_not_computed(tiny_llama: Path) -> None:
    blocks, _ = ragged(tiny_llama)

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            session, other = await bench.open(256), await bench.open(8)
            step = asyncio.create_task(bench.step(session, 0, torch.randn(200, 64)))
            await all_sent()
            await bench.channel.close(session)
            bench.batcher.start()
            await bench.step(other, 0, torch.randn(1, 64))
            assert bench.batcher.batches.value == 1
            step.cancel()

    asyncio.run(scenario())


def equal(output: torch.Tensor, modules: list[Any], inputs: torch.Tensor) -> None:
    torch.testing.assert_close(output, petals_outputs(modules, inputs)[-len(output) :], rtol=1e-4, atol=1e-4)


def slow_down(monkeypatch: pytest.MonkeyPatch, blocks: RaggedBlocks, seconds: float) -> None:
    forward = blocks.forward

    def slow(*args: Any) -> torch.Tensor:
        time.sleep(seconds)
        return forward(*args)

    monkeypatch.setattr(blocks, "forward", slow)


def test_sessions_that_are_given_up_while_a_batch_runs(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client that hangs up early leaves for the batcher: an opening, whose attention cache is free again."""
    blocks, modules = ragged(tiny_llama)
    slow_down(monkeypatch, blocks, 0.2)
    given_up = 0

    async def hang_up(bench: Bench, steps: bool) -> None:
        handle = bench.allocate(blocks.cache_descriptor(0, 4, 1, 8))
        session = await bench.channel.open(handle, 0, 4)
        step = asyncio.create_task(bench.step(session, 0, torch.randn(1, 64)))
        if steps:
            await all_sent()
        step.cancel()
        bench.free(handle)
        await bench.channel.close(session)

    async def scenario() -> None:
        nonlocal given_up
        async with Bench(blocks) as bench:
            bench.batcher.start()
            steady, inputs = await bench.open(16), torch.randn(10, 64)
            for position in range(len(inputs)):
                step = asyncio.create_task(bench.step(steady, position, inputs[position : position + 1]))
                while not step.done():
                    await asyncio.gather(*(hang_up(bench, steps=bool(given_up % 2)) for _ in range(3)))
                    given_up += 3
                    await asyncio.wait({step}, timeout=0.04)
                equal(step.result(), modules, inputs[: position + 1])
            assert not bench.cache._allocated_tensors.keys() - {1}

    asyncio.run(scenario())
    assert given_up >= 100


def test_a_session_is_given_up_before_the_batcher_has_seen_it(tiny_llama: Path) -> None:
    blocks, modules = ragged(tiny_llama)

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            handle = bench.allocate(blocks.cache_descriptor(0, 4, 1, 8))
            session = await bench.channel.open(handle, 0, 4)
            bench.free(handle)
            bench.batcher.start()
            with pytest.raises(RuntimeError, match="was given back"):
                await bench.step(session, 0, torch.randn(1, 64))
            await bench.channel.close(session)
            inputs = torch.randn(3, 64)
            equal(await bench.step(await bench.open(8), 0, inputs), modules, inputs)

    asyncio.run(scenario())


class TooLarge:
    """A descriptor of attention cache for which there is no memory."""

    def make_zeros(self) -> torch.Tensor:
        raise RuntimeError("not enough memory: you tried to allocate 99999999999 bytes")


def test_no_memory_for_one_session(tiny_llama: Path) -> None:
    blocks, modules = ragged(tiny_llama)

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            large = await bench.channel.open(bench.allocate(TooLarge()), 0, 4)
            small, inputs = await bench.open(8), torch.randn(3, 64)
            steps = [asyncio.create_task(bench.step(session, 0, inputs)) for session in (large, small)]
            await all_sent()
            bench.batcher.start()
            with pytest.raises(RuntimeError, match="not enough memory"):
                await steps[0]
            equal(await steps[1], modules, inputs)

    asyncio.run(scenario())


POISON = 777.0


def fail_for_poison(monkeypatch: pytest.MonkeyPatch, blocks: RaggedBlocks) -> None:
    """Let a computation fail after its work is done, if such a value is among its inputs."""
    forward = blocks.forward

    def fragile(hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        poisoned = bool((hidden == POISON).any())
        outputs = forward(hidden, *args)
        if poisoned:
            raise ZeroDivisionError("poison")
        return outputs

    monkeypatch.setattr(blocks, "forward", fragile)


def test_only_the_guilty_step_of_a_batch_fails(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are computed once more, alone; one that has reordered its cache does not do so again."""
    blocks, modules = ragged(tiny_llama)
    fail_for_poison(monkeypatch, blocks)
    torch.manual_seed(0)

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            bench.batcher.start()
            past, token = torch.randn(2, 3, 64), torch.randn(2, 1, 64)
            beams = await bench.open(8, batch_size=2)
            await bench.channel.step(beams, 0, past, None, None)
            sessions = [await bench.open(8) for _ in range(4)]
            others = [torch.randn(1, 64) for _ in range(3)]
            with bench.batcher.batches.get_lock():  # holds the batcher up at the end of a batch, until all wait
                held = asyncio.create_task(bench.step(sessions[0], 0, others[0]))
                await asyncio.sleep(0.1)
                steps = [
                    asyncio.create_task(bench.step(sessions[1], 0, others[1])),
                    asyncio.create_task(bench.step(sessions[2], 0, torch.full((1, 64), POISON))),
                    asyncio.create_task(bench.channel.step(beams, 3, token, None, [1, 0])),
                    asyncio.create_task(bench.step(sessions[3], 0, others[2])),
                ]
                await all_sent()
            with pytest.raises(RuntimeError, match="ZeroDivisionError: poison"):
                await steps[1]
            for step, inputs in ((held, others[0]), (steps[0], others[1]), (steps[3], others[2])):
                equal(await step, modules, inputs)
            for row, output in enumerate(await steps[2]):
                equal(output, modules, torch.cat([past[1 - row], token[row]]))
            assert (await bench.step(sessions[2], 0, others[0])).shape == (1, 64)  # its next step is as good as any

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("shape", "start", "prompts", "hypotheses", "reason"),
    [
        ((1, 1, 64), 0.0, None, None, "from position 0.0 do not fit"),
        ((1, 1, 64), False, None, None, "from position False do not fit"),
        ((1, 1, 64), 8, None, None, "from position 8 do not fit 8"),
        ((1, 1, 64), -1, None, None, "from position -1 do not fit"),
        ((3, 1, 64), 0, None, None, r"\[3, 1, 64\] are not \[2, tokens, 64\]"),
        ((2, 1, 32), 0, None, None, r"\[2, 1, 32\] are not \[2, tokens, 64\]"),
        ((2, 1, 64), 0, None, [0, 2], "hypotheses"),
        ((2, 1, 64), 0, None, [0.0, 1], "hypotheses"),
        ((2, 1, 64), 0, [None], None, "deep prompts of 1 blocks"),
        ((2, 1, 64), 0, [torch.zeros(1, 1, 64), None, None, None], None, "deep prompts of shape"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_by_the_batcher_too(
    tiny_llama: Path, shape: Any, start: Any, prompts: Any, hypotheses: Any, reason: str
) -> None:
    blocks, modules = ragged(tiny_llama)

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            odd, other, inputs = await bench.open(8, batch_size=2), await bench.open(8), torch.randn(3, 64)
            steps = [
                asyncio.create_task(bench.channel.step(odd, start, torch.zeros(shape), prompts, hypotheses)),
                asyncio.create_task(bench.step(other, 0, inputs)),
            ]
            await all_sent()
            bench.batcher.start()
            with pytest.raises(RuntimeError, match=reason):
                await steps[0]
            equal(await steps[1], modules, inputs)

    asyncio.run(scenario())


@pytest.mark.parametrize(("first", "last", "rows"), [(0, 5, 1), (3, 3, 1), (0.0, 4, 1), (0, 4, 0)])
def test_a_session_that_cannot_be_computed_is_refused(tiny_llama: Path, first: Any, last: Any, rows: int) -> None:
    blocks, _ = ragged(tiny_llama)

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            bench.batcher.start()
            handle = bench.allocate(blocks.cache_descriptor(0, 4, rows, 8))
            session = await bench.channel.open(handle, first, last)
            with pytest.raises(RuntimeError, match="blocks"):
                await bench.step(session, 0, torch.randn(1, 64))

    asyncio.run(scenario())


def test_a_wide_step_does_not_keep_others_waiting(tiny_llama: Path) -> None:
    """More sequences than a batch may have are computed some at a time; others take part in each of those batches."""
    blocks, modules = ragged(tiny_llama)
    rows = CPU_PREFILL + 3 * CPU_MIXED

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            wide, narrow = await bench.open(4, batch_size=rows), await bench.open(8)
            first, second, inputs = torch.randn(rows, 1, 64), torch.randn(rows, 1, 64), torch.randn(3, 64)
            step = asyncio.create_task(bench.channel.step(wide, 0, first, None, None))
            others = asyncio.create_task(bench.step(narrow, 0, inputs[:1]))
            await all_sent()
            bench.batcher.start()
            equal(await others, modules, inputs[:1])
            assert bench.batcher.batches.value < 4
            for position in (1, 2):
                await bench.step(narrow, position, inputs[position : position + 1])
            await step
            assert bench.batcher.batches.value >= 4
            hypotheses = list(reversed(range(rows)))
            outputs = await bench.channel.step(wide, 1, second, None, hypotheses)
            for row in (0, CPU_MIXED - 1, CPU_MIXED, CPU_PREFILL, rows - 1):
                equal(outputs[row], modules, torch.cat([first[hypotheses[row]], second[row]]))

    asyncio.run(scenario())


def test_who_has_had_a_turn_lets_others_go_first(tiny_llama: Path) -> None:
    blocks, _ = ragged(tiny_llama)

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            long, late = await bench.open(250, batch_size=30), await bench.open(250)
            steps = [
                asyncio.create_task(bench.channel.step(long, 0, torch.randn(30, 250, 64), None, None)),
                asyncio.create_task(bench.step(late, 0, torch.randn(200, 64))),
            ]
            await all_sent()
            bench.batcher.start()
            await steps[1]
            assert not steps[0].done() and bench.batcher.batches.value <= 2 + TURN_TOKENS // CPU_PREFILL * 2

    asyncio.run(scenario())


def make_step(tokens: int, rows: int = 1, **options: Any) -> Step:
    """A step by itself, of a session of 4 blocks."""
    channel: Any = None
    descriptor = CacheDescriptor((None,) * 4, rows, 256, 2, 16, torch.float32, CPU)
    session = Session(channel, 0, descriptor.make_zeros(), 0, 4)
    return Step(session, 0, torch.randn(rows, tokens, 64), **options)


def pieces(*steps: Step) -> list[tuple[int, int, int, int]]:
    """What the next batch computes, as on a CPU: which steps, and tokens, first sequence and sequences of each."""
    batch = next_batch(steps, CPU_PREFILL, CPU_MIXED)
    return [(steps.index(piece.step), piece.tokens, piece.row, piece.rows) for piece in batch]


def test_kinds_of_steps() -> None:
    assert make_step(1, rows=3).kind is StepKind.DECODE
    assert make_step(2).kind is StepKind.PREFILL
    assert make_step(200, done=199).kind is StepKind.DECODE  # the last token of a prompt
    assert make_step(4, verifies=True).kind is make_step(1, verifies=True).kind is StepKind.VERIFY
    for verifies in (True, False):  # what has to be computed for some sequences at a time
        assert make_step(1, rows=300, row=64, width=1, verifies=verifies).kind is StepKind.PREFILL


def test_which_steps_verify() -> None:
    assert not is_draft(5, 1) and not is_draft(0, 2)  # a token, the beginning of a prompt
    assert is_draft(1, 2) and is_draft(5, SIZES[-1] + 1) and not is_draft(5, SIZES[-1] + 2)


def test_verifying_takes_no_prefill_budget() -> None:
    """Guesses are computed as a whole, however long the prompts are that came before; beside them a prompt is cut as
    beside decoding."""
    prompt = make_step(300)
    assert pieces(prompt) == [(0, CPU_PREFILL, 0, 1)]
    decoding = pieces(prompt, make_step(1))
    assert decoding == [(1, 1, 0, 1), (0, CPU_MIXED, 0, 1)]
    assert pieces(prompt, make_step(4, verifies=True)) == [(1, 4, 0, 1), *decoding[1:]]
    assert pieces(prompt, make_step(4, rows=2, verifies=True), make_step(1)) == [
        (1, 4, 0, 2),
        (2, 1, 0, 1),
        (0, 64, 0, 1),
    ]
    assert pieces(prompt, make_step(4)) == [(0, CPU_PREFILL, 0, 1)]  # the same tokens as a prompt wait for their turn


def test_verifying_is_bounded_as_decoding_is() -> None:
    many = [make_step(4, verifies=True) for _ in range(CPU_PREFILL // 4 + 1)]
    assert pieces(*many, make_step(1)) == [(i, 4, 0, 1) for i in range(CPU_PREFILL // 4)]  # the last is not overtaken
    wide = make_step(4, rows=CPU_MIXED // 4 + 1, verifies=True)  # is cut, as so many sequences that decode are
    assert pieces(make_step(1), wide) == [(0, 1, 0, 1), (1, CPU_MIXED // wide.rows, 0, wide.rows)]


def test_verifying_does_not_end_waiting_for_others(tiny_llama: Path) -> None:
    batcher = Batcher(ragged(tiny_llama)[0], SharedMemoryCache(2**30), 1)
    soon = time.monotonic() + 100
    batcher._away, batcher._patience = {make_step(1).session: soon}, soon + 1
    for step, waits in ((make_step(1), True), (make_step(4, verifies=True), True), (make_step(4), False)):
        batcher._queues = {(0, 4): [step]}
        assert bool(batcher._time_to_wait()) is waits


@torch.inference_mode()
def test_verified_tokens_equal_a_prompts(tiny_llama: Path) -> None:
    """All of them have their outputs, beside a session that decodes."""
    blocks, modules = ragged(tiny_llama)
    guesses, other = make_step(4, rows=2, verifies=True), make_step(1)
    inputs, token = guesses.hidden.clone(), other.hidden.clone()
    compute_batch(blocks, next_batch([guesses, other], CPU_PREFILL, CPU_MIXED), 0, 4)
    assert not guesses.left and not other.left
    equal(other.hidden[0], modules, token[0])
    for row in range(2):
        equal(guesses.hidden[row], modules, inputs[row])


def test_a_handler_that_does_not_read_is_left_behind(tiny_llama: Path) -> None:
    blocks, modules = ragged(tiny_llama)
    timeout = 1.0

    async def scenario() -> None:
        async with Bench(blocks, channels=2, send_timeout=timeout) as bench:
            bench.batcher.start()
            stopped, channel = bench.channels
            assert stopped._writer is not None
            stopped._writer.transport.pause_reading()  # type: ignore[attr-defined]
            prompts = [await bench.open(256) for _ in range(16)]
            lost = [asyncio.create_task(bench.step(session, 0, torch.randn(256, 64))) for session in prompts]
            session, inputs = await bench.open(256, channel=channel), torch.randn(200, 64)
            began, slowest = time.monotonic(), 0.0
            for position in range(len(inputs)):
                sent = time.monotonic()
                hidden = inputs[None, position : position + 1]
                output = await channel.step(session, position, hidden, None, None)
                slowest = max(slowest, time.monotonic() - sent)
                if bench.batcher.lost is not None:
                    break
                await asyncio.sleep(0.01)
            equal(output[0], modules, inputs[: position + 1])
            assert "has read nothing for 1 s" in (bench.batcher.lost or "")
            assert time.monotonic() - began > timeout / 2 and slowest < timeout
            stopped._writer.transport.resume_reading()  # type: ignore[attr-defined]
            results = await asyncio.gather(*lost, return_exceptions=True)
            assert any("the process that computes is gone" in str(result) for result in results)
            with pytest.raises(RuntimeError, match="is gone"):
                await bench.open(8)

    asyncio.run(scenario())


@pytest.mark.parametrize("garbage", [b"abc", pickle.dumps("no message")])
def test_a_channel_with_garbage_ends_by_itself(tiny_llama: Path, garbage: bytes) -> None:
    blocks, modules = ragged(tiny_llama)

    async def scenario() -> None:
        async with Bench(blocks, channels=2) as bench:
            broken, channel = bench.channels
            ended = asyncio.Event()
            broken.on_break = ended.set
            session = await bench.open(8)
            assert broken._writer is not None
            broken._writer.write(HEADER.pack(len(garbage)) + garbage)
            step = asyncio.create_task(bench.step(session, 0, torch.randn(1, 64)))
            await all_sent()
            bench.batcher.start()
            with pytest.raises(RuntimeError, match="the process that computes is gone"):
                await step
            await asyncio.wait_for(ended.wait(), 10)
            inputs = torch.randn(3, 64)
            output = await channel.step(await bench.open(8, channel=channel), 0, inputs[None], None, None)
            equal(output[0], modules, inputs)

    asyncio.run(scenario())


def test_a_handler_that_cannot_read_a_reply_fails_all_steps(tiny_llama: Path) -> None:
    blocks, _ = ragged(tiny_llama)

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            steps = [asyncio.create_task(bench.step(await bench.open(8), 0, torch.randn(1, 64))) for _ in range(2)]
            await all_sent()
            bench.batcher._channels[0].connection.send(HEADER.pack(3) + b"abc")
            for step in steps:
                with pytest.raises(RuntimeError, match="cannot be read"):
                    await step
            with pytest.raises(RuntimeError, match="cannot be read"):
                await bench.step(0, 0, torch.randn(1, 64))
            await bench.channel.close(0)

    asyncio.run(scenario())


def test_a_fault_of_the_batcher_leaves_nobody_waiting(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, _ = ragged(tiny_llama)

    async def scenario() -> None:
        async with Bench(blocks) as bench:
            monkeypatch.setattr(bench.batcher, "_compute_next", lambda: 1 / 0)
            bench.batcher.start()
            with pytest.raises(RuntimeError, match="the process that computes is gone"):
                await bench.step(await bench.open(8), 0, torch.randn(1, 64))
            with pytest.raises(RuntimeError, match="the process that computes is gone"):
                await bench.step(0, 0, torch.randn(1, 64))
            await asyncio.to_thread(bench.batcher.join, 10)
            assert not bench.batcher.is_alive()

    asyncio.run(scenario())


def test_sixteen_sessions_equal_transformers(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Sessions of different lengths through a chain of two servers: some begin, with long prompts, while others decode,
    and some end before the others."""
    texts = (tokenizer.encode(" ".join(PROMPTS)) * 20)[:400]
    prompts = [texts[i : i + 1 + (i * 7) % 40 + (300 if i % 5 == 4 else 0)] for i in range(16)]
    expected = [greedy(reference, prompt, 10 + 3 * i) for i, prompt in enumerate(prompts)]
    results: list[list[int] | None] = [None] * len(prompts)
    before = infos(model)
    begun = [threading.Event() for _ in prompts]

    def work(i: int) -> None:
        if i % 5 == 4:
            assert begun[i - 1].wait(timeout=60)  # in the middle of the others' decoding
        with model.open_session(512) as session:
            first = int(session.step(prompts[i]).argmax())
            begun[i].set()
            rest = run_greedy(session, [first], len(expected[i]) - 1) if len(expected[i]) > 1 else []
            results[i] = [first, *rest]

    in_threads(work, len(prompts), timeout=120)
    assert results == expected
    steps = sum(map(len, expected))
    for now, then in zip(infos(model), before, strict=True):
        assert 0 < now["inference_batches"] - then["inference_batches"] < steps, "nothing was computed together"


def test_llama_through_servers(tiny_llama: Path) -> None:
    reference = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with LocalSwarm() as local:
        for blocks in ("0:2", "2:4"):
            local.start_server(tiny_server(tiny_llama, blocks))
        model = load_model(tiny_llama, local)
        for prompt in PROMPTS:
            token_ids = model.tokenizer.encode(prompt)
            expected = greedy(reference, token_ids, 30)
            with model.open_session(128) as session:
                assert run_greedy(session, token_ids, len(expected)) == expected
        assert all(info["inference_batches"] for info in infos(model))
        model.close()


def test_beside_a_stock_server(
    stock_chain: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert [info["batching"] for info in infos(stock_chain)] == [True, False]
    token_ids = tokenizer.encode(PROMPTS[1])
    expected = greedy(reference, token_ids, 30)
    with stock_chain.open_session(64) as session:
        assert run_greedy(session, token_ids, len(expected)) == expected


def test_stock_client(model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    token_ids = tokenizer.encode(PROMPTS[2])
    expected = greedy(reference, token_ids, 20)
    generated: list[int] = []
    with InferenceSession(model.state.manager, 64) as session, torch.inference_mode():
        inputs = token_ids
        while len(generated) < len(expected):
            logits = model.head.logits(session.step(model.head.embed(inputs))[:, -1])
            inputs = [int(logits[0].argmax())]
            generated += inputs
    assert generated == expected


def test_training_of_a_stock_client(
    model: SwarmModel, stock_chain: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Forward and backward passes are petals' own; they use the weights that were packed for the batches."""
    transformer = reference.transformer

    def passes(hidden_states: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = transformer.word_embeddings(token_ids).detach().requires_grad_()
        outputs = hidden_states(embeddings)
        (gradients,) = torch.autograd.grad(outputs.square().sum(), embeddings)
        return outputs, gradients

    def through(remote: RemoteSequential, embeddings: torch.Tensor) -> torch.Tensor:
        return transformer.ln_f(remote(transformer.word_embeddings_layernorm(embeddings)))

    token_ids = torch.tensor(tokenizer.encode("The quick brown fox jumps over the lazy dog"))[:8].view(2, 4)
    expected = passes(lambda embeddings: transformer(inputs_embeds=embeddings).last_hidden_state)
    for swarm_model in (model, stock_chain):
        manager = swarm_model.state.manager
        remote = RemoteSequential(manager.config, sequence_manager=manager)
        found = passes(functools.partial(through, remote))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_training_takes_no_more_than_it_needs_at_a_time(model: SwarmModel) -> None:
    """What computes for one request cannot be interrupted."""
    manager = model.state.manager
    (view, *_) = model.state.servers()
    stub = TransformerConnectionHandler.get_stub(manager.state.p2p, PeerID.from_base58(view.peer_id))
    tensors = [serialize_torch_tensor(torch.zeros(1, TRAINING_TOKENS + 1, 64)), serialize_torch_tensor(DUMMY)]
    request = runtime_pb2.ExpertRequest(uid=manager.block_uids[view.start], tensors=tensors)
    with pytest.raises(P2PHandlerError, match=f"max_batch_size .{TRAINING_TOKENS}."):
        RemoteExpertWorker.run_coroutine(stub.rpc_forward(request, timeout=10))


@torch.inference_mode()
def test_beam_search_of_a_stock_client(model: SwarmModel, stock_chain: SwarmModel) -> None:
    """Hypotheses, sequences of one session that go on from each other's past, give what stock servers give."""
    torch.manual_seed(0)
    steps = [(torch.randn(3, 5, 64), None), (torch.randn(3, 1, 64), [2, 0, 0]), (torch.randn(3, 1, 64), [1, 1, 2])]

    def outputs(manager: Any) -> list[torch.Tensor]:
        with InferenceSession(manager, 16) as session:
            return [session.step(x, hypo_ids=None if ids is None else torch.tensor(ids)) for x, ids in steps]

    for ours, theirs in zip(outputs(model.state.manager), outputs(stock_chain.state.manager), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_deep_prompts_of_a_stock_client(model: SwarmModel, stock_chain: SwarmModel) -> None:
    torch.manual_seed(0)
    hidden, more, prompts = torch.randn(2, 6, 64), torch.randn(2, 1, 64), torch.randn(4, 2, 3, 64)

    def outputs(manager: Any) -> list[torch.Tensor]:
        with InferenceSession(manager, 16) as session:
            return [session.step(hidden.clone(), prompts=prompts), session.step(more)]

    for ours, theirs in zip(outputs(model.state.manager), outputs(stock_chain.state.manager), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [0, 1, 7, 12])
def test_rewind(
    model: SwarmModel, stock_chain: SwarmModel, tokenizer: PreTrainedTokenizerBase, reference: Any, length: int
) -> None:
    """Going back costs batching servers nothing; stock servers compute the tokens again, with the same result."""
    token_ids = (tokenizer.encode(PROMPTS[0]) * 4)[:12]
    other = [9, 8, 7, 6]
    expected = greedy(reference, token_ids[:length] + other, 12)
    for swarm_model, again in ((model, [0, 0]), (stock_chain, [0, length])):
        with swarm_model.open_session(64) as session:
            run_greedy(session, token_ids, 10)
            before = infos(swarm_model)
            session.truncate(length)
            assert session.position == length
            assert run_greedy(session, other, len(expected)) == expected
            processed = len(other) + len(expected) - 1
            counts = [
                now["inference_tokens"] - then["inference_tokens"]
                for now, then in zip(infos(swarm_model), before, strict=True)
            ]
            assert counts == [processed + count for count in again]
            assert session.recoveries == 0


def test_the_last_logits_once_more(model: SwarmModel) -> None:
    with model.open_session(16) as session:
        logits = session.step([5, 6, 7])
        torch.testing.assert_close(session.step(), logits)
        assert session.position == 3


def choices(logits: torch.Tensor, rank: int) -> int:
    """The likeliest token of the first row, the second likeliest of the second, and so on: so that rows part ways."""
    return int(logits.topk(rank + 1).indices[rank])


def expected_rows(reference: BloomForCausalLM, token_ids: list[int], rows: int, count: int) -> list[list[int]]:
    """What rows that begin with different tokens go on with, greedily, each by itself."""
    first = reference(torch.tensor([token_ids])).logits[0, -1]
    texts = [[*token_ids, choices(first, row)] for row in range(rows)]
    for text in texts:
        for _ in range(count - 1):
            text.append(int(reference(torch.tensor([text])).logits[0, -1].argmax()))
    return [text[len(token_ids) :] for text in texts]


@pytest.mark.parametrize("swarm_kind", ["batching", "beside stock"])
@pytest.mark.parametrize("lost", [False, True])
@torch.inference_mode()
def test_rows_over_one_prefill(
    model: SwarmModel,
    stock_chain: SwarmModel,
    reference: BloomForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    swarm_kind: str,
    lost: bool,
) -> None:
    """Rows equal sequences by themselves, also when a server is lost on the way; servers that can compute the prompt
    once."""
    swarm_model = model if swarm_kind == "batching" else stock_chain
    token_ids = (tokenizer.encode(PROMPTS[1]) * 300)[:600]  # in two pieces
    expected = expected_rows(reference, token_ids, 3, 8)
    before = infos(swarm_model)
    with swarm_model.open_session(700, rows=3) as session:
        logits = session.step(token_ids)
        tokens = [choices(logits, row) for row in range(3)]
        generated = [[token] for token in tokens]
        for i in range(7):
            if lost and i == 4:
                for span in range(2):
                    lose(session, span)
            tokens = step_rows(session, tokens).argmax(dim=-1).tolist()
            for row, token in zip(generated, tokens, strict=True):
                row.append(token)
        assert generated == expected
        if not lost:
            seen = [
                now["inference_tokens"] - then["inference_tokens"]
                for now, then in zip(infos(swarm_model), before, strict=True)
            ]
            assert seen == [600 * (1 if info["batching"] else 3) + 7 * 3 for info in before]


def step_rows(session: SwarmSession, token_ids: list[int]) -> torch.Tensor:
    """Return the logits of the rows' next tokens: [rows, vocabulary]."""
    rows = session.step_rows_bounded(token_ids)
    return torch.stack([row for row in rows if isinstance(row, torch.Tensor)])


@torch.inference_mode()
def test_rows_restored_from_their_tokens(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """When the inputs of the spans are not held any more."""
    token_ids = tokenizer.encode(PROMPTS[2])
    expected = expected_rows(reference, token_ids, 2, 6)
    with SwarmSession(model.head, SessionTerms(model.state, model.limits, HistoryBudget(0), 64, rows=2)) as session:
        logits = session.step(token_ids)
        generated = [[choices(logits, row)] for row in range(2)]
        for i in range(5):
            if i == 3:
                lose(session, 1)
            tokens = step_rows(session, [row[-1] for row in generated]).argmax(dim=-1).tolist()
            for row, token in zip(generated, tokens, strict=True):
                row.append(token)
    assert generated == expected


@torch.inference_mode()
def test_rows_set_back(model: SwarmModel, reference: BloomForCausalLM) -> None:
    token_ids = [5, 6, 7, 8]
    expected = expected_rows(reference, token_ids, 2, 3)
    with model.open_session(16, rows=2) as session:
        logits = session.step(token_ids)
        first = [choices(logits, row) for row in range(2)]
        step_rows(session, [9, 9])
        step_rows(session, [9, 9])
        session.truncate(len(token_ids))
        assert session.branches == [[], []]
        second = step_rows(session, first).argmax(dim=-1).tolist()
        third = step_rows(session, second).argmax(dim=-1).tolist()
        assert [list(row) for row in zip(first, second, third, strict=True)] == expected
        with pytest.raises(SessionLengthExceeded):
            for _ in range(11):
                step_rows(session, [9, 9])


@torch.inference_mode()
def test_logits_of_every_position(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    token_ids = (tokenizer.encode(PROMPTS[2]) * 300)[:530]
    expected = reference(torch.tensor([token_ids])).logits[0]
    with model.open_session(530) as session:
        pieces = list(session.step_each(token_ids[:200]))
        lose(session, 0)
        pieces += session.step_each(token_ids[200:])
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-3, rtol=1e-3)


def test_rewind_then_lose_the_server(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """What was forgotten is not restored by failover."""
    token_ids = tokenizer.encode(PROMPTS[3])
    expected = greedy(reference, [*token_ids, 9], 20)
    with model.open_session(64) as session:
        run_greedy(session, token_ids, 12)
        session.truncate(len(token_ids))
        generated = run_greedy(session, [9], 5)
        lose(session, 1)
        assert generated + run_greedy(session, generated[-1:], len(expected) - 5) == expected
        assert session.recoveries == 1


@pytest.mark.parametrize(
    ("hidden", "options", "reason"),
    [
        (torch.zeros(1, 1, 32), {}, r"\[1, 1, 32\] are not \[1, tokens, 64\]"),
        (torch.zeros(2, 1, 64), {}, r"\[2, 1, 64\] are not \[1, tokens, 64\]"),
        (torch.zeros(1, 9, 64), {}, "exceed the session's 8"),
        (torch.zeros(1, 1, 64), {"prompts": torch.zeros(4, 1, 2, 32)}, "deep prompts of shape"),
        (torch.zeros(1, 1, 64), {"hypo_ids": torch.tensor([1])}, "hypotheses must be 1 numbers"),
        (torch.zeros(1, 1, 64), {"start": 5}, "cannot start from position 5"),
    ],
)
def test_what_does_not_fit_a_session_is_refused(hidden: Any, options: Any, reason: str) -> None:
    """Before it gets into a batch: there it would be the failure of all sessions in it."""
    prompts, hypotheses = options.get("prompts", DUMMY), options.get("hypo_ids", DUMMY_INT64)
    with pytest.raises(ValueError, match=reason):
        check_inputs(hidden, prompts, hypotheses, (4, 1, 64))
        check_room(rewound(0, options.get("start")), hidden.shape[1], 8)
