"""How long a matrix product takes with weights in each format, here or on a processor with fewer instructions.

    python -m benchmarks.products        or        ... --size 4096 4096 --rows 1 4 16

The formats take turns, and the median of their times counts. There are as many matrices of each as a model has, so that
they come from memory. Without AVX512, as many processors are, that is

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 NUMBA_CPU_NAME=haswell \\
      NUMBA_CPU_FEATURES=+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse4.2 python -m benchmarks.products
"""

import argparse
import statistics
import time

import swarm.compat  # noqa: F401

import torch

from swarm.products import choice, formats, loops
from swarm.products.linear import LoopedProduct, OrderedProduct, PlainProduct, Product

VALUES = 60_000_000  # of all matrices of a format
REPETITIONS = 15


def main() -> None:
    """Measure; print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", type=int, nargs=2, default=(1536, 1536), metavar=("OUTPUTS", "INPUTS"))
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 4, 16, 192))
    args = parser.parse_args()
    outputs, inputs = args.size
    count = max(1, VALUES // (outputs * inputs))
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    print(f"{capability}, {loops.VECTOR} values in a vector, {threads} threads")
    products = make_products([torch.randn(outputs, inputs) / inputs**0.5 for _ in range(count)])
    for rows in args.rows:
        values = torch.randn(rows, inputs)
        times: dict[str, list[float]] = {name: [] for name in products}
        for _ in range(REPETITIONS):
            for name, matrices in products.items():
                rounded = values.bfloat16() if name.startswith("bfloat16,") else values
                times[name].append(seconds(matrices, rounded))
        figures = "; ".join(f"{name} {1000 * statistics.median(taken):.3f}" for name, taken in times.items())
        print(f"{rows} rows, ms: {figures}", flush=True)


def make_products(weights: list[torch.Tensor]) -> dict[str, list[Product]]:
    """Return all ways of computing with these weights, by what they are called."""
    products: dict[str, list[Product]] = {"float32": [OrderedProduct(weight, None) for weight in weights]}
    if choice.onednn_has_bfloat16():
        products["bfloat16, oneDNN"] = [OrderedProduct(weight.bfloat16(), None) for weight in weights]
    else:
        products["bfloat16, PyTorch"] = [PlainProduct(weight.bfloat16(), None) for weight in weights]
    for format_ in formats.CODES:
        products[format_] = [LoopedProduct(formats.rounded(weight, format_), None) for weight in weights]
    return products


@torch.inference_mode()
def seconds(products: list[Product], inputs: torch.Tensor) -> float:
    """Return how long one product takes."""
    started = time.perf_counter()
    for product in products:
        product(inputs)
    return (time.perf_counter() - started) / len(products)


if __name__ == "__main__":
    main()
