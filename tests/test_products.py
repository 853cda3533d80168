"""Products with weights in fewer bits, and servers whose weights are rounded to them."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import swarm.compat  # noqa: F401

import gguf
import pytest
import torch
from petals.utils.convert_block import QuantType
from torch import nn

from swarm.errors import ModelUnavailable
from swarm.local import LocalSwarm
from swarm.options import ServerOptions
from swarm.products import choice, formats, linear
from swarm.products.linear import LoopedProduct, PackedLinear, fuse, rounded_layers, separate
from swarm.server import quantising
from swarm.server.families import make_ragged_blocks
from swarm.server.families.llama import FusedLayerBlocks
from swarm.server.serve import server_arguments
from tests.conftest import READY_TIMEOUT, load_model, tiny_server
from tests.support.falcon import make_tiny_falcon
from tests.support.families import (
    VARIANTS,
    assert_close,
    in_batches,
    load_blocks,
    made_once,
    make_tiny_family,
    reference_states,
)
from tests.support.layers import Layers
from tests.support.processes import ROOT
from tests.test_session import PROMPTS, run_greedy

# The largest rounding error, relative to the largest weight of the output (int8) or of its group.
ERRORS = {"bfloat16": 2**-8, "float16": 2**-11, "int8": 0.5 / 127, "int8 in groups": 0.51 / 127, "int4": 0.51 * 2 / 15}


def matrix(outputs: int = 40, inputs: int = 96) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs + inputs)) / 8


# Formats


@pytest.mark.parametrize("format_", formats.CODES)
@pytest.mark.parametrize("size", [(4, 32), (7, 103), (130, 576)])
def test_weights_are_rounded_to_the_nearest(format_: str, size: tuple[int, int]) -> None:
    weight = matrix(*size)
    dense = formats.rounded(weight, format_).dense()
    assert dense.shape == weight.shape and dense.dtype == torch.float32
    assert (dense - weight).abs().max() <= ERRORS[format_] * weight.abs().max()
    assert torch.equal(formats.rounded(dense, format_).dense(), dense)


@pytest.mark.parametrize("format_", formats.CODES)
def test_weights_that_are_all_the_same(format_: str) -> None:
    for value in (0.0, -0.5):
        dense = formats.rounded(torch.full((4, 32), value), format_).dense()
        torch.testing.assert_close(dense, torch.full((4, 32), value), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("kind", "format_"), [("Q4_0", "int4"), ("Q4_1", "int4"), ("Q8_0", "int8 in groups"), ("BF16", "bfloat16")]
)
def test_the_bits_of_gguf_are_found_again(kind: str, format_: str) -> None:
    quantised = gguf.GGMLQuantizationType[kind]
    data = gguf.quantize(matrix(64, 256).numpy(), quantised)
    weights = formats.exactly(torch.from_numpy(gguf.dequantize(data, quantised)))
    assert weights is not None and weights.format == format_
    if kind in ("Q4_1", "Q8_0"):  # whose layout is the same
        assert torch.equal(weights.rows, torch.from_numpy(data))


def test_what_loses_nothing_is_the_smallest() -> None:
    weight = matrix()
    assert formats.exactly(weight) is None
    assert linear.rounding(weight, "auto").format == "float16"
    assert linear.rounding(weight.bfloat16(), "auto").format == "bfloat16"
    assert linear.rounding(weight.half(), "auto").format == "float16"
    assert linear.rounding(weight * 1e6, "auto").format == "bfloat16"


# Products


@pytest.mark.parametrize("format_", formats.CODES)
@pytest.mark.parametrize("size", [(4, 32), (7, 103), (130, 96)])
def test_products_equal_those_with_dense_weights(format_: str, size: tuple[int, int]) -> None:
    outputs, inputs = size
    weights, bias = formats.rounded(matrix(*size), format_), torch.randn(outputs)
    for product, added in ((LoopedProduct(weights, None), 0), (LoopedProduct(weights, bias), bias)):
        for rows in (0, 1, 2, 3, 4, 5, 16, 18, 70):
            values = torch.randn(rows, inputs)
            expected = values.double() @ weights.dense().double().T + added
            torch.testing.assert_close(product(values), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("widening", [True, False])
def test_many_rows(widening: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By loops, or with weights made float32 first, in several pieces."""
    monkeypatch.setattr(choice, "widening_pays", lambda: widening)
    monkeypatch.setattr(linear, "WIDE_VALUES", 96 * 16)
    weights, bias, inputs = formats.rounded(matrix(), "int8"), torch.randn(40), torch.randn(3, 50, 96)
    outputs = LoopedProduct(weights, bias)(inputs)
    torch.testing.assert_close(outputs, nn.functional.linear(inputs, weights.dense(), bias), rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what others in a batch compute, a session's results know nothing, to the last bit: in the loops, that is.

    Many rows may be computed by PyTorch, as a measurement says, which rounds in another order.
    """
    monkeypatch.setattr(choice, "widening_pays", lambda: False)
    product, inputs = LoopedProduct(formats.rounded(matrix(), "int4"), None), torch.randn(70, 96)
    together = product(inputs)[:8]
    for rows in (1, 3, 8):
        assert torch.equal(product(inputs[:rows]), together[:rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_loops", [True, False])
def test_weights_of_16_bits(dtype: torch.dtype, by_loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every processor, whoever computes them."""
    monkeypatch.setattr(choice, "loops_beat_onednn", lambda: by_loops)
    layer = nn.Linear(96, 40, dtype=dtype).requires_grad_(False)
    inputs = torch.randn(2, 3, 96, dtype=dtype)
    outputs = PackedLinear(layer)(inputs)
    assert outputs.dtype == dtype
    expected = nn.functional.linear(inputs.double(), layer.weight.double(), layer.bias.double())
    torch.testing.assert_close(outputs.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("quant", ["int8", "int4", "auto"])
def test_rounded_layers_go_on_working(quant: str) -> None:
    """Fused, separated again, and where petals wants gradients."""
    layers, plain, inputs = Layers(32), Layers(32), torch.randn(2, 3, 32)
    for layer in plain.children():
        assert isinstance(layer, nn.Linear)
        layer.weight.data = linear.rounding(layer.weight.data, quant).dense()
    rounded_layers(layers, quant)
    assert all(isinstance(layer, PackedLinear) for layer in layers.children())
    both, alone = fuse(layers, "first", "second"), fuse(layers, "alone")
    assert alone is layers.alone
    torch.testing.assert_close(both(inputs), torch.cat([plain.first(inputs), plain.second(inputs)], dim=-1))
    gradients = []
    for module in (layers, plain):
        x = inputs.clone().requires_grad_()
        (module.first(x).square().sum() + module.second(x).sum() + module.alone(x).square().sum()).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    separate(layers)
    for name, layer in plain.named_children():
        torch.testing.assert_close(getattr(layers, name)(inputs), layer(inputs))


def test_layers_in_different_formats_are_fused() -> None:
    """As of a GGUF file that has some matrices in 4 bits, and others in more."""
    layers, inputs = Layers(32), torch.randn(5, 32)
    layers.first.weight.data = formats.rounded(layers.first.weight.data, "int4").dense()
    expected = torch.cat([layers.first(inputs), layers.second(inputs)], dim=-1)
    rounded_layers(layers, "auto")
    torch.testing.assert_close(fuse(layers, "first", "second")(inputs), expected, rtol=1e-3, atol=1e-3)


# Instruction sets

FORCED: Mapping[str, Mapping[str, str]] = {
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse4.2",
    },
    "SSE4.1": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "NUMBA_CPU_NAME": "penryn",
        "NUMBA_CPU_FEATURES": "+sse4.1,+ssse3,+sse3,+sse2",
    },
}
COMPUTE = """
import threading
import swarm.compat
import torch
from swarm import hardware
from swarm.products import choice, formats, loops
from swarm.products.linear import LoopedProduct, PackedLinear

assert loops.VECTOR == 8 and loops.SOFT_HALF == (not loops.has("f16c"))
assert hardware.pick_dtype("cpu") == "float32"
assert not choice.onednn_has_bfloat16() and choice.loops_beat_onednn()
torch.manual_seed(0)
for dtype in (torch.bfloat16, torch.float16):
    layer = torch.nn.Linear(96, 40, dtype=dtype).requires_grad_(False)
    packed, inputs = PackedLinear(layer), torch.randn(5, 96, dtype=dtype)
    assert isinstance(packed.product, LoopedProduct)
    expected = torch.nn.functional.linear(inputs.float(), layer.weight.float(), layer.bias.float())
    torch.testing.assert_close(packed(inputs).float(), expected, rtol=1e-2, atol=1e-2)
for name in ("int8", "int8 in groups", "int4"):
    weights, inputs = formats.rounded(torch.randn(40, 96), name), torch.randn(20, 96)
    torch.testing.assert_close(LoopedProduct(weights, None)(inputs), inputs @ weights.dense().T, rtol=1e-5, atol=1e-4)
weight = torch.randn(64, 256).half()
assert torch.equal(formats.rounded(weight, "float16").dense(), weight.float())
assert torch.equal(formats.rounded(weight * 1e-5, "float16").dense(), (weight * 1e-5).float())

# While loops compute, other threads allocate memory from the same heap; each writes to its own only.
weights, inputs = formats.rounded(torch.randn(64, 576), "int4"), torch.randn(16, 576)
product, done = formats.product(weights, None), threading.Event()
def compute():
    while not done.is_set():
        product(inputs)
thread = threading.Thread(target=compute)
thread.start()
for _ in range(300):
    ours = torch.ones(loops.OUTPUTS * 576)
    done.wait(0.0002)
    assert (ours == 1).all()
done.set()
thread.join()
"""


@pytest.mark.parametrize("name", FORCED)
def test_other_processors(name: str) -> None:
    """Those without AVX512, whose loops are compiled otherwise: 16 bits on all of them, and fewer."""
    environment = {**os.environ, **FORCED[name], "MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPUTE], cwd=ROOT, env=environment, capture_output=True, timeout=120
    )
    assert result.returncode == 0, result.stderr.decode()


# Blocks


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_bloom: Path) -> Any:
    def make(directory: Path, variant: str) -> Path:
        if variant == "bloom":
            return tiny_bloom
        return make_tiny_falcon(directory) if variant == "falcon" else make_tiny_family(directory, variant)

    return made_once(lambda: tmp_path_factory.mktemp("rounded"), make)


ROUNDED = ["bloom", "falcon", *VARIANTS]


@pytest.mark.parametrize(
    ("variant", "quant"),
    [*((name, quant) for name in ROUNDED for quant in ("int8", "int4")), ("llama", "auto"), ("mixtral", "auto")],
)
def test_families_compute_with_rounded_weights(variant: str, quant: str, checkpoints: Any) -> None:
    """They are as close to plain Transformers with these weights as without rounding to Transformers with its own."""
    path = checkpoints(variant)
    inputs, outputs = reference_states(path, quant=quant)
    config, blocks = load_blocks(path, quant)
    modules: Any = [SimpleNamespace(module_shards=[block]) for block in blocks]
    served = make_ragged_blocks(modules, config, torch.float32, 128)
    assert served is not None
    for computed in in_batches(served, inputs):
        assert_close(computed, outputs)
    if variant == "llama":
        assert isinstance(served, FusedLayerBlocks)
    packed = [layer for block in blocks for layer in block.modules() if isinstance(layer, PackedLinear)]
    assert packed and all(layer.weights is not None for layer in packed)


def test_experts_are_rounded(checkpoints: Any) -> None:
    """Nothing is left of their own weights."""
    _, (block, *_) = load_blocks(checkpoints("mixtral"), "int8")
    assert not any(parameter.dim() > 2 for parameter in block.parameters())
    layers = [*block.mlp.experts.gate_up, *block.mlp.experts.down]
    assert len(layers) == 8 and all(layer.weights.format == formats.INT8 for layer in layers)


@pytest.mark.parametrize("options", [{"quant": "nf4"}, {"quant": "int8", "batching": False}])
def test_bitsandbytes_quantises_no_experts(options: dict[str, Any], checkpoints: Any) -> None:
    path = str(checkpoints("mixtral"))
    load_blocks(Path(path))
    with pytest.raises(ModelUnavailable, match="is not supported for models with experts"):
        server_arguments(ServerOptions(path, device="cpu", **options), path)


# Servers


@pytest.mark.parametrize(
    ("options", "loops", "petals"),
    [
        ({"quant": "int8"}, "int8", QuantType.NONE),
        ({"quant": "int4"}, "int4", QuantType.NONE),
        ({"quant": "auto", "dtype": "float32"}, "auto", QuantType.NONE),
        ({"dtype": "float32"}, None, QuantType.NONE),
        ({"dtype": "bfloat16"}, None, QuantType.NONE),
        ({"quant": "none"}, None, QuantType.NONE),
        ({"quant": "nf4"}, None, QuantType.NF4),
        ({"quant": "int8", "batching": False}, None, QuantType.INT8),
        ({"batching": False}, None, QuantType.NONE),
        ({"quant": "int8", "device": "cuda"}, None, QuantType.INT8),
        ({"quant": "auto", "device": "cuda"}, None, QuantType.NONE),
    ],
)
def test_who_quantises(options: dict[str, Any], loops: str | None, petals: QuantType) -> None:
    server = ServerOptions("some/model", **{"device": "cpu", **options})
    assert (quantising.by_loops(server), quantising.by_petals(server)) == (loops, petals)


@pytest.mark.parametrize(("dtype", "quant"), [("float32", "auto"), ("bfloat16", None)])
def test_the_default_follows_the_processor(dtype: str, quant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.hardware.pick_dtype", lambda device: dtype)
    assert quantising.by_loops(ServerOptions("some/model", device="cpu")) == quant


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"device": "cpu", "batching": False}])
def test_int4_is_refused_where_loops_do_not_compute(options: dict[str, Any], tiny_bloom: Path) -> None:
    server = ServerOptions(str(tiny_bloom), quant="int4", **options)
    assert quantising.refusal(server, SimpleNamespace()) == (
        "is only for a CPU, and not for --no-batching; --quant nf4 takes as many bits"
    )


def test_a_mixed_chain_and_its_failover(tiny_bloom: Path) -> None:
    """Servers with rounded and other weights follow and replace each other. A session goes on, whatever it says."""
    with LocalSwarm() as local:
        rounded = dataclasses.replace(tiny_server(tiny_bloom, "0:2"), quant="int8")
        first = local.start_server(rounded)
        local.start_server(tiny_server(tiny_bloom, "2:4"))
        model = load_model(tiny_bloom, local)
        blocks = model.state.manager.state.sequence_info.block_infos
        assert [[info.quant_type for info in block.servers.values()] for block in blocks] == [
            ["int8"],
            ["int8"],
            ["none"],
            ["none"],
        ]
        token_ids = model.tokenizer.encode(PROMPTS[0])
        with model.open_session(128) as session:
            generated = run_greedy(session, token_ids, 10)
            other = local.start_server(tiny_server(tiny_bloom, "0:2"))
            assert model.state.wait(lambda: len(model.state.servers()) == 3, READY_TIMEOUT)
            first.stop()
            assert other.process.poll() is None
            generated += run_greedy(session, generated[-1:], 10)
            assert len(generated) == 20 and session.recoveries == 1
        model.close()
