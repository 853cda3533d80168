"""The app's client of a very large model in little memory: embeddings, head and sampling of BLOOM-176B at true shape.

    python -m benchmarks.big_model --memory 8
    python -m benchmarks.big_model --memory 5 --shape 128256x8192

The weights are random, and made once, below the cache directory (11 GiB for BLOOM-176B with their copy in 8 bits). A
program of its own loads the model as the app does, and chooses tokens as the app's answers do, for one session and for
16 at a time, in a control group with so much memory for itself, its DHT, p2pd and the pages of files that it reads.
Another one, without a limit, computes the same positions with the whole head, and compares.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors import safe_open
from transformers import GenerationConfig

from benchmarks.memory_limit import NoLimit, forget, limited_group, peak, run_in
from benchmarks.model_ends import ENDS, HARD, LENGTH, SPREAD, USUAL, hidden_states, model_ends
from config import Settings
from generation.parameters import GenerationParams
from generation.sampling import Sampler
from swarm.client import head
from swarm.client.bounds import Logits
from swarm.client.membership import Swarm
from swarm.client.model import SwarmModel
from swarm.client.quantised_weights import KEPT
from swarm.hardware import cpu_count
from swarm.process import set_threads

GIB = 2**30
SESSIONS = 16
ALONE = 20  # steps of one session whose time is taken
POSITIONS = "positions.npy"
RULES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top_k 50": {"do_sample": True, "top_k": 50},
    "top_p 0.9": {"do_sample": True, "top_k": 0, "top_p": 0.9},
}


def main() -> None:
    """Measure; print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--memory", type=float, help="GiB that the client may have (default: no limit)")
    parser.add_argument("--shape", default="250880x14336", help="rows x hidden size (default: %(default)s)")
    parser.add_argument("--positions", type=int, default=1000, help="to compare for each rule (default: %(default)s)")
    parser.add_argument("--hard", action="store_true", help="positions at which no word is likely")
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--as", dest="part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows, columns = map(int, args.shape.split("x"))
    logging.disable(logging.WARNING)
    path = model_ends(Settings.from_environment(), rows, columns, layers=70)
    if args.part:
        set_threads(args.threads)
        with loaded(path) as (model, seconds):
            model.head._transformer.ln_f.weight.data.fill_(SPREAD / LENGTH)
            found = PARTS[args.part](model, args)
        args.results.write_text(json.dumps({"load_s": round(seconds, 1), **found}))
        sys.stdout.flush()
        os._exit(0)  # library threads may keep the interpreter alive
    with tempfile.TemporaryDirectory() as directory:
        write_positions(path, args, Path(directory) / POSITIONS)
        print(json.dumps(report(args.memory, Path(directory))))


def report(memory: float | None, directory: Path) -> dict[str, Any]:
    """Run the parts, all but the comparison under the limit."""
    prepared = run_part("prepare", directory, memory)  # only the first time, the weights are quantised
    found = run_part("choose", directory, memory)
    whole = run_part("whole", directory, memory)
    checked = run_part("compare", directory, None)
    return {
        "memory_gib": memory,
        "peak_gib": found.pop("peak_gib", None),
        "prepare_s": prepared["load_s"],
        **{name: value for name, value in found.items() if name != "tokens"},
        **{name: value for name, value in whole.items() if name.endswith("per_token")},
        **{name: value for name, value in checked.items() if name != "load_s"},
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def run_part(part: str, directory: Path, memory: float | None) -> dict[str, Any]:
    """Run a part in a program of its own, and return what it found."""
    results = directory / f"{part}.json"
    command = ["-m", "benchmarks.big_model", *sys.argv[1:], "--as", part, "--results", str(results)]
    found: dict[str, Any] = {}
    if memory is None:
        subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)
    else:
        cache_dir = Settings.from_environment().cache_dir
        try:
            for place in (*cache_dir.glob("random-ends-*"), cache_dir / KEPT):
                forget(place)
            with limited_group(int(memory * GIB)) as group:
                run_in(group, command)
                found["peak_gib"] = round(peak(group) / GIB, 2)
        except NoLimit as error:
            raise SystemExit(f"cannot limit memory: {error}; see systemd-run --user --scope -p MemoryMax=") from error
    return {**found, **json.loads(results.read_text())}


@contextlib.contextmanager
def loaded(path: Path) -> Iterator[tuple[SwarmModel, float]]:
    """Load a model in a swarm of its own, as the app does; yield it, and the seconds that it took."""
    settings = Settings.from_environment()
    head.BOUNDED_FROM = head.BOUNDED_FROM_WITH_AVX512 = 0  # whatever the shape
    swarm = Swarm.found(["/ip4/127.0.0.1/tcp/0"])
    begin = time.perf_counter()
    model = SwarmModel.load(
        str(path), swarm, cache_dir=settings.cache_dir, device="cpu", torch_dtype=settings.torch_dtype()
    )
    try:
        yield model, time.perf_counter() - begin
    finally:
        model.close()
        swarm.close()


def write_positions(path: Path, args: argparse.Namespace, to: Path) -> None:
    """Write random hidden states; whoever measures has no part in that."""
    with safe_open(path / ENDS, "pt") as file:
        embeddings = file.get_tensor("word_embeddings.weight")
        np.save(to, hidden_states(embeddings, args.positions, HARD if args.hard else USUAL).numpy())


def positions(args: argparse.Namespace, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield pieces of hidden states, and the number of the first of each."""
    states = torch.from_numpy(np.load(args.results.parent / POSITIONS))
    for number, piece in enumerate(states.split(count)):
        yield number * count, piece


def sampler(rule: str, position: int) -> Sampler:
    """Return one that draws the same for the same position."""
    made = Sampler(GenerationParams(**RULES[rule]), GenerationConfig())
    made._random = random.Random(position)
    return made


def prepare(model: SwarmModel, args: argparse.Namespace) -> dict[str, Any]:
    return {}


def choose(model: SwarmModel, args: argparse.Namespace) -> dict[str, Any]:
    """Choose tokens for one session and for several at a time, and take the time of each step."""
    pool = ThreadPoolExecutor(SESSIONS)
    tokens: dict[str, list[int]] = {rule: [] for rule in RULES}
    times: dict[str, dict[int, list[float]]] = {rule: {1: [], SESSIONS: []} for rule in RULES}
    computed: dict[str, list[int]] = {rule: [] for rule in RULES}

    def step(rule: str, position: int, hidden: torch.Tensor) -> int:
        model.head.embed([position % model.head.vocab_size])
        logits: Logits = model.head.next_bounds(hidden)
        token_id = sampler(rule, position).choose(logits, [])
        assert not isinstance(logits, torch.Tensor), "the model is so small that its head is not bounded"
        computed[rule].append(len(logits.lower) if logits._all is not None else int(logits._known.sum()))
        return token_id

    for first, hidden in positions(args, SESSIONS):
        for rule in RULES:
            alone = None
            if first < ALONE * SESSIONS:
                begin = time.perf_counter()
                alone = step(rule, first, hidden[0])
                times[rule][1].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            waited = [pool.submit(step, rule, first + i, row) for i, row in enumerate(hidden)]
            chosen = [future.result() for future in waited]
            if len(chosen) == SESSIONS:
                times[rule][SESSIONS].append(time.perf_counter() - begin)
            assert alone in (None, chosen[0])
            tokens[rule] += chosen
    medians = {
        rule: {str(count): round(statistics.median(seconds), 3) for count, seconds in by_count.items() if seconds}
        for rule, by_count in times.items()
    }
    return {
        "anonymous_gib": round(anonymous() / GIB, 2),
        # Of the rule that takes longest.
        "s_per_token": {count: max(it[count] for it in medians.values()) for count in medians["greedy"]},
        "s_per_token_by_rule": medians,
        "rows_computed": {rule: quantiles(counts) for rule, counts in computed.items()},
        "all_rows_computed": {
            rule: round(sum(it == model.head.vocab_size for it in counts) / len(counts), 3)
            for rule, counts in computed.items()
        },
        "tokens": tokens,
    }


def quantiles(counts: list[int]) -> dict[str, int]:
    return {name: int(np.quantile(counts, share)) for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))}


def anonymous() -> int:
    """Return the bytes of this process and its children that are in memory and in no file, each counted once."""
    own = psutil.Process()
    rows = [
        line.split()
        for process in (own, *own.children(recursive=True))
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    ]
    return 1024 * sum(int(row[1]) for row in rows if row[0] == "Pss_Anon:")


def whole(model: SwarmModel, args: argparse.Namespace) -> dict[str, Any]:
    """Take the time of the whole head: ours, and petals' for processors without AVX512."""
    from petals.client.lm_head import LMHead

    with torch.device("meta"):
        lm_head = LMHead(model.config)
    lm_head.weight = model.head._transformer.word_embeddings.weight
    lm_head.use_chunked_forward = True
    hidden = next(positions(args, 1))[1]
    return {
        "unquantised_s_per_token": median_time(lambda: model.head.next_logits(hidden[0])),
        "petals_s_per_token": median_time(lambda: lm_head(model.head._normed(hidden))),
    }


def median_time(compute: Callable[[], object], count: int = 3) -> float:
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        with torch.inference_mode():
            compute()
        times.append(time.perf_counter() - begin)
    return round(statistics.median(times), 3)


def read_all(model: SwarmModel) -> None:
    """Read the weights in 8 bits as fast as memory is."""
    assert model.head._bounded is not None
    codes = model.head._bounded._kept.codes.view(np.int64)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda piece: piece.max(), np.array_split(codes, 64)))


def score_times(model: SwarmModel, args: argparse.Namespace) -> dict[str, float]:
    """Take the time of bounds, for one session and for several, beside that of reading their weights."""
    hidden = next(positions(args, SESSIONS))[1]
    return {
        "1": median_time(lambda: model.head.bounds(hidden[:1]), 5),
        str(SESSIONS): median_time(lambda: model.head.bounds(hidden), 5),
        "reading": median_time(lambda: read_all(model), 5),
    }


def compare(model: SwarmModel, args: argparse.Namespace) -> dict[str, Any]:
    """Choose the same tokens from all logits."""
    given = json.loads((args.results.parent / "choose.json").read_text())["tokens"]
    equal = dict.fromkeys(RULES, 0)
    for first, hidden in positions(args, SESSIONS):
        everything = model.head.logits(hidden)
        for rule in RULES:
            for i, logits in enumerate(everything):
                equal[rule] += sampler(rule, first + i).choose(logits, []) == given[rule][first + i]
    return {
        "in_memory": {**whole(model, args), "scores": score_times(model, args)},
        "equal_to_exact_head": all(count == args.positions for count in equal.values()),
        "positions": args.positions,
    }


PARTS: dict[str, Callable[[SwarmModel, argparse.Namespace], dict[str, Any]]] = {
    "prepare": prepare,
    "choose": choose,
    "whole": whole,
    "compare": compare,
}


if __name__ == "__main__":
    main()
