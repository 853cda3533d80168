"""How long a token takes when the servers are far from one another, by the number of servers and the round trip.

    python -m benchmarks.distance                                   (a few minutes)
    python -m benchmarks.distance --all --simulate --plot docs/pictures/distance.svg

The servers hold a tiny BLOOM and stand behind proxies that delay what passes (``benchmarks.delaying``), so that the
distance takes most of the time. Three ways are compared: this project's servers that pass their outputs on to one
another, the same servers with the client between them, and released petals, its own client included, if its packages
are in ``.venv-stock``. ``--simulate`` draws on to 80 servers: that is a model, fitted to what was measured.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import swarm.compat  # noqa: F401

import numpy as np
import torch

from benchmarks.delaying import HOST, Links, behind, far_apart, free_port
from swarm import weights
from swarm.client.model import SwarmModel
from swarm.hardware import cpu_count
from swarm.local import LocalSwarm
from swarm.options import ServerOptions
from tests.support.stock_process import PYTHON, Stock
from tests.support.swarms import all_answer
from tests.support.tiny import make_tiny_bloom

BLOCKS, WIDTH = 8, 64  # of the model
PROMPT = 1000  # tokens
SESSIONS, SHORT = 16, 10  # at a time, and their tokens each
READY_TIMEOUT = 180.0  # seconds
SECONDS = 4.0  # that one figure may take, about
PUSHED, RELAYED, STOCK = "this project", "this project, by way of the client", "released petals"
SIMULATED = 80  # servers


@dataclasses.dataclass(frozen=True)
class Times:
    """The steps of some sessions at a time."""

    seconds: float  # of all
    steps: list[list[float]]  # seconds of each step: of the prompt, and of each token


# What runs sessions at a time: (how many, tokens of the prompt, tokens after it)
Run = Callable[[int, int, int], Times]


def main() -> None:
    """Measure; print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--servers", type=int, nargs="+", choices=(1, 2, 4, 8), default=[1, 2, 4])
    parser.add_argument("--round-trips", type=float, nargs="+", default=[0, 50], help="ms (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="1 to 8 servers, 0 to 200 ms")
    parser.add_argument("--bandwidth", type=float, default=0.0, help="Mbit/s of each server; default: no limit")
    parser.add_argument("--simulate", action="store_true", help=f"draw on to {SIMULATED} servers, by a model")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="draw the results here (SVG)")
    args = parser.parse_args()
    if args.all:
        args.servers, args.round_trips = [1, 2, 4, 8], [0, 5, 20, 50, 100, 200]
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        path = make_tiny_bloom(Path(directory) / "tiny-bloom", n_layer=BLOCKS, hidden_size=WIDTH)
        for servers in args.servers:
            for measured in measure(path, servers, args.round_trips, args.bandwidth * 1e6 / 8):
                runs.append(measured)
                print(row(measured), file=sys.stderr, flush=True)
    results: dict[str, Any] = {"cores": cpu_count(), "bandwidth_mbit": args.bandwidth or None, "runs": runs}
    print(f"tiny BLOOM of {BLOCKS} blocks, {cpu_count()} cores\n{TITLE}")
    for run in sorted(runs, key=lambda run: (run["round_trip_ms"], run["servers"])):
        print(row(run))
    if args.simulate:
        results["model"] = {kind: fit(runs, kind) for kind in kinds(runs)}
        for kind, costs in results["model"].items():
            print(f"a model of {kind}: {costs[0]:.1f} ms and {costs[1]:.1f} ms per server, beside the bound")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        draw(results, args.plot)


TITLE = f"{'':36}{'servers':>8}{'round trip':>12}{'ms/token':>10}{'TTFT ms':>9}{'tokens/s of 16':>16}"


def row(run: dict[str, Any]) -> str:
    """Return a row of the table."""
    figures = f"{run['token_ms']:10.1f}{run['ttft_ms']:9.0f}{run['tokens_per_s']:16.1f}"
    return f"{run['kind']:36}{run['servers']:8}{run['round_trip_ms']:12g}{figures}"


def measure(path: Path, servers: int, round_trips: Sequence[float], bandwidth: float) -> Iterator[dict[str, Any]]:
    """Yield the figures of each kind at each distance; the kinds take turns."""
    with contextlib.ExitStack() as stack:
        ours, links = stack.enter_context(our_runs(path, servers, bandwidth))
        sides: dict[str, tuple[Run, Links]] = {kind: (run, links) for kind, run in ours.items()}
        if PYTHON.exists():
            sides[STOCK] = stack.enter_context(stock_run(path, servers, bandwidth))
        for milliseconds in round_trips:
            for kind, (run, between) in sides.items():
                between.one_way = milliseconds / 2000
                figures = figures_of(run, servers * milliseconds / 1000)
                yield {"kind": kind, "servers": servers, "round_trip_ms": milliseconds, **figures}


def figures_of(run: Run, slowest: float) -> dict[str, float]:
    """Return what one kind takes at one distance.

    :param slowest: seconds that a token takes at most, beside the computing
    """
    run(1, 4, 3)  # connections are made
    tokens = max(5, min(30, int(SECONDS / (slowest + 0.01))))
    one = run(1, 4, tokens)
    firsts = [run(1, PROMPT, 0).steps[0][0] for _ in range(3)]
    many = run(SESSIONS, 4, SHORT)
    return {
        "token_ms": 1000 * statistics.median(one.steps[0][1:]),
        "ttft_ms": 1000 * statistics.median(firsts),
        "tokens_per_s": SESSIONS * (1 + SHORT) / many.seconds,
    }


def options(path: Path, servers: int) -> list[ServerOptions]:
    """Return the servers, each with as many blocks."""
    each = BLOCKS // servers
    return [
        ServerOptions(
            str(path), blocks=f"{n * each}:{n * each + each}", dtype="float32", threads=1, attn_cache_tokens=2**16
        )
        for n in range(servers)
    ]


@contextlib.contextmanager
def our_runs(path: Path, servers: int, bandwidth: float) -> Iterator[tuple[dict[str, Run], Links]]:
    """Serve the model; offer what runs our sessions, with servers that pass on and with the client between them."""
    with LocalSwarm() as local, far_apart(local, options(path, servers), bandwidth=bandwidth) as links:
        model = SwarmModel.load(str(path), local.swarm, cache_dir=path.parent, device="cpu", torch_dtype="float32")
        model.state.start(READY_TIMEOUT)
        await_servers(model, servers)
        usual = model.limits
        limits = {
            PUSHED: dataclasses.replace(usual, push_from=0.0),
            RELAYED: dataclasses.replace(usual, push_from=math.inf, pipelining=False),
        }

        def run(kind: str, sessions: int, prompt: int, tokens: int) -> Times:
            # Pings are from before the distance changed, so which way to go is not left to them.
            model.limits = limits[kind]
            return timed(lambda: our_session(model, prompt, tokens), sessions)

        yield {kind: lambda *load, kind=kind: run(kind, *load) for kind in limits}, links
        model.close()


def await_servers(model: SwarmModel, count: int) -> None:
    """Wait until all servers answer."""
    if not model.state.wait(lambda: all_answer(model, count), READY_TIMEOUT):
        raise SystemExit("the servers did not come up")


def our_session(model: SwarmModel, prompt: int, tokens: int) -> list[float]:
    """Return the seconds of each step of one session."""
    times, ids = [], prompt_of(prompt)
    with model.open_session(prompt + tokens + 1) as session:
        for _ in range(1 + tokens):
            began = time.perf_counter()
            ids = [int(session.step(ids).argmax())]
            times.append(time.perf_counter() - began)
    return times


def prompt_of(tokens: int) -> list[int]:
    return [5 + number % 200 for number in range(tokens)]


def timed(session: Callable[[], list[float]], sessions: int) -> Times:
    """Run sessions at a time."""
    with concurrent.futures.ThreadPoolExecutor(sessions) as pool:
        began = time.perf_counter()
        runs = [pool.submit(session) for _ in range(sessions)]
        steps = [run.result() for run in runs]
        return Times(time.perf_counter() - began, steps)


@contextlib.contextmanager
def stock_run(path: Path, servers: int, bandwidth: float) -> Iterator[tuple[Run, Links]]:
    """Serve the model by released petals; offer what runs sessions of its client."""
    with LocalSwarm() as local, Links(bandwidth=bandwidth) as links, contextlib.ExitStack() as stack:
        first = [behind(links, peer) for peer in local.swarm.initial_peers if f"/{HOST}/" in peer]
        tasks = []
        for server in options(path, servers):
            port = free_port()
            tasks.append(
                {
                    "model": str(path),
                    "block_indices": server.blocks,
                    "dht_prefix": weights.dht_prefix(str(path)),
                    "initial_peers": first,
                    "host_maddrs": [f"/ip4/{HOST}/tcp/{port}"],
                    "announce_maddrs": [f"/ip4/{HOST}/tcp/{links.add(port)}"],
                    "attn_cache_tokens": 2**16,
                }
            )
        processes = {}
        for command in ("serve", "measure"):
            processes[command] = Stock(command, path.parent / f"stock-{command}.log")
            stack.callback(processes[command].kill)
        processes["serve"].tell(tasks)
        model = SwarmModel.load(str(path), local.swarm, cache_dir=path.parent, device="cpu", torch_dtype="float32")
        model.state.start(READY_TIMEOUT)
        await_servers(model, servers)
        model.close()
        client = {key: tasks[0][key] for key in ("model", "dht_prefix")} | {"initial_peers": local.swarm.initial_peers}
        processes["measure"].tell([client])

        def run(sessions: int, prompt: int, tokens: int) -> Times:
            load: Any = {"sessions": sessions, "prompt": prompt_of(prompt), "tokens": tokens}
            processes["measure"].tell(load)
            answer = processes["measure"].answer()
            return Times(answer["seconds"], answer["times"])

        yield run, links


def kinds(runs: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(run["kind"] for run in runs))


def bound(kind: str, servers: Any, round_trip: float) -> Any:
    """Return what the distance alone takes of a token: half a round trip per server and one more, or a whole each.

    :param servers: how many, or several numbers
    """
    return (servers + 1) / 2 * round_trip if kind == PUSHED else servers * round_trip


def fit(runs: Sequence[dict[str, Any]], kind: str) -> tuple[float, float]:
    """Return what a token takes beside the bound, in ms: once, and for each server (least squares)."""
    mine = [run for run in runs if run["kind"] == kind]
    counts = np.array([[1.0, run["servers"]] for run in mine])
    rest = np.array([run["token_ms"] - bound(kind, run["servers"], run["round_trip_ms"]) for run in mine])
    (once, each), *_ = np.linalg.lstsq(counts, rest, rcond=None)
    return float(once), float(each)


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot the time of a token over the number of servers, a panel for each distance, and the bounds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    runs = results["runs"]
    distances = sorted({run["round_trip_ms"] for run in runs if run["round_trip_ms"]})
    figure, panels = pyplot.subplots(
        1, len(distances), figsize=(1.2 + 3.2 * len(distances), 3.8), layout="constrained", squeeze=False
    )
    counts = np.array(sorted({run["servers"] for run in runs}))
    for axes, distance in zip(panels[0], distances, strict=True):
        for number, kind in enumerate(kinds(runs)):
            mine = sorted(
                (run["servers"], run["token_ms"])
                for run in runs
                if run["kind"] == kind and run["round_trip_ms"] == distance
            )
            axes.plot(*zip(*mine, strict=True), marker="o", color=f"C{number}", label=kind)
            if "model" in results:
                once, each = results["model"][kind]
                further = np.geomspace(counts[-1], SIMULATED)
                expected = once + each * further + bound(kind, further, distance)
                axes.plot(further, expected, ":", color=f"C{number}", label=f"{kind}: a model")
        axes.plot(counts, counts * distance, "--", color="grey", linewidth=1, label="bound: n r")
        axes.plot(counts, (counts + 1) / 2 * distance, "-.", color="grey", linewidth=1, label="bound: (n + 1) / 2 r")
        axes.set(title=f"round trip r = {distance:g} ms", xlabel="servers n", ylabel="ms per token", ylim=(0, None))
        if "model" in results:
            axes.set(xscale="log", yscale="log", ylim=(distance / 2, None))
        axes.grid(which="both", alpha=0.3)
    panels[0][0].legend(fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    main()
    # Library threads may keep the interpreter alive; everything we started has ended.
    sys.stdout.flush()
    os._exit(0)
