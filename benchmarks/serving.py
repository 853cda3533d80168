"""How fast many users are served: this project's batching servers compared with stock Petals servers, in one run.

    make bench        or        python -m benchmarks.serving --clients 1 4 16 64

For each number of clients, each a WebSocket that streams token by token as the chat page does, two copies of the app
get the same load: one in front of a batching server, one in front of a server that computes as stock Petals does. If
the model is a GGUF file, so do two of llama.cpp's servers, one with that file, one with the same weights in bfloat16.
For comparison there are two loops without app and transport, petals' own client on the stock server and this project's
on the batching one; and plain Transformers in one process, all clients' prompts in one batch. Only one of them computes
at a time. The results go to standard output, to ``--json`` and, as a plot, to ``--plot``.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import swarm.compat  # noqa: F401

import psutil
import torch
from petals.client.inference_session import InferenceSession
from transformers import AutoModelForCausalLM, AutoTokenizer
from websockets.asyncio.client import connect

from benchmarks.llama_cpp import servers as llama_servers
from benchmarks.loads import ROOM, Answer, Load, prompt
from benchmarks.random_models import RANDOM, random_model
from config import Settings
from swarm import weights
from swarm.client.model import SwarmModel
from swarm.hardware import attn_cache_tokens, cpu_count
from swarm.local import LocalServer, LocalSwarm
from swarm.options import ServerOptions
from swarm.process import set_threads
from tests.support.processes import GUNICORN, Program, running
from tests.support.swarms import server_info

NEVER = "no such text is ever generated"  # this and rounds of one token stream an answer
ANSWER_TIMEOUT = 600  # seconds for one message; stock servers make 64 clients wait a long time
ARRIVALS = 3  # times that all clients arrive at once, besides the load itself, for the time to the first token
CLOSING_TIMEOUT = 60  # seconds; servers close sessions within one step
STOCK, BATCHING = "stock Petals server", "batching server"


def main() -> None:
    """Measure; print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=100, help="longest answer (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=25, help="longest load (default: %(default)s)")
    parser.add_argument("--sample", action="store_true", help="as the chat page does; default: greedily")
    parser.add_argument("--model", help="default: the app's")
    parser.add_argument("--random", choices=RANDOM, help="a model of random weights instead")
    parser.add_argument("--device", help="default: the app's")
    parser.add_argument("--dtype", help="default: the app's")
    parser.add_argument("--quant", help="of the batching server's weights; default: the app's")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="draw the results here (PNG)")
    args = parser.parse_args()
    settings = Settings.from_environment()
    name = random_model(args.random, settings) if args.random else args.model or settings.default_model
    device, dtype = args.device or settings.device(), args.dtype or settings.torch_dtype()
    results: dict[str, Any] = {
        "model": Path(name).name if args.random else name,
        "device": device,
        "dtype": dtype,
        "quant": args.quant,
        "cores": cpu_count(),
        "sampled": args.sample,
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        sides = {
            kind: stack.enter_context(Side.started(kind, name, device, dtype, settings, Path(directory), options))
            for kind, options in ((BATCHING, {"dtype": args.dtype, "quant": args.quant}), (STOCK, {"batching": False}))
        }
        greedy_on_cpu = device == "cpu" and not args.sample
        llamas = llama_servers(name, max(args.clients), args.tokens, Path(directory), stack) if greedy_on_cpu else []
        for clients in args.clients:
            for kind, side in sides.items():
                url, sample = side.program.url, args.sample
                arrivals = [asyncio.run(load(url, clients, 2, 60, sample)) for _ in range(1 + ARRIVALS)]
                measured = asyncio.run(load(url, clients, args.tokens, args.seconds, sample))
                # The first arrival warms up: this side's memory may have gone cold while the other was measured.
                for arrival in arrivals[1:]:
                    measured.first += arrival.first
                memory = {"server_mib": side.memory(clients, args.tokens)}
                note(results, f"app, {kind}", clients, measured.summary() | memory)
            for llama in llamas:
                arrivals = [asyncio.run(llama.load(clients, 2, 60)) for _ in range(1 + ARRIVALS)]
                measured = asyncio.run(llama.load(clients, args.tokens, args.seconds))
                for arrival in arrivals[1:]:
                    measured.first += arrival.first
                note(results, llama.name, clients, measured.summary() | {"server_mib": llama.memory()})
        for kind, loop in ((BATCHING, own_loop), (STOCK, bare_loop)):
            loops = [loop(sides[kind].model, args.tokens) for _ in range(2)]  # the first warms up
            note(results, f"bare loop, {kind}", 1, loops[-1].summary())
        model = plain_model(name, device, dtype, settings)
        for clients in args.clients:
            note(results, "plain Transformers, one batch", clients, plain(*model, clients, args.tokens).summary())
    report(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        draw(results, args.plot)


@dataclass
class Side:
    """A server, the app in front of it, and our own client."""

    server: LocalServer
    program: Program
    model: SwarmModel
    free_cache: int  # tokens times blocks, while the server is idle

    @classmethod
    @contextlib.contextmanager
    def started(
        cls,
        kind: str,
        name: str,
        device: str,
        dtype: str,
        settings: Settings,
        directory: Path,
        options: Mapping[str, Any],
    ) -> Iterator["Side"]:
        """Start everything, and end it after the ``with`` block.

        :param options: of the server, where they differ from the usual ones
        """
        set_threads(settings.CLIENT_THREADS)
        with LocalSwarm() as local:
            model, server = serve_model(local, settings, name, device, dtype, share=0.1, **options)
            environment = {
                "INITIAL_PEERS": ",".join(local.swarm.initial_peers),
                "MODELS": name,
                "DEVICE": device,
                "TORCH_DTYPE": dtype,
                "MAX_SESSIONS": "96",
                "MAX_CONCURRENT_GENERATIONS": "96",
                "WARM_SESSIONS": "0",  # the prompts repeat
                "LOG_LEVEL": "WARNING",
            }
            log = directory / f"{kind.split()[0]}.log"
            with running(GUNICORN, log, **environment) as program:
                program.wait_ready()
                yield cls(server, program, model, free_cache(model))
            model.close()

    def memory(self, sessions: int, tokens: int) -> int:
        """Return the server's memory in MiB while it holds full sessions; its processes' shared memory counts once."""
        process = psutil.Process(self.server.process.pid)
        deadline = time.monotonic() + CLOSING_TIMEOUT
        while free_cache(self.model) < self.free_cache:  # the previous load's sessions are still being closed
            if time.monotonic() > deadline:
                raise SystemExit("the server still holds sessions that were closed")
        with contextlib.ExitStack() as stack:
            for _ in range(sessions):
                stack.enter_context(self.model.open_session(tokens)).step([1] * tokens)
            return sum(p.memory_full_info().pss for p in (process, *process.children(recursive=True))) >> 20


def free_cache(model: SwarmModel) -> int:
    """Ask the only server for its free attention cache."""
    info = server_info(model, model.state.servers()[0])
    return info["cache_tokens_available"] if info else 0


def serve_model(
    local: LocalSwarm, settings: Settings, name: str, device: str, client_dtype: str, *, share: float, **options: Any
) -> tuple[SwarmModel, LocalServer]:
    """Serve a model, load the client's part of it, and wait until all its blocks are served.

    :param client_dtype: the client's, and the server's unless ``options`` have another
    :param share: share of the free memory for the server's attention cache
    :param options: others of the server
    """
    model = SwarmModel.load(name, local.swarm, cache_dir=settings.cache_dir, device=device, torch_dtype=client_dtype)
    server = local.start_server(
        ServerOptions(
            name,
            device=device,
            attn_cache_tokens=attn_cache_tokens(model.config, client_dtype, share, device),
            threads=settings.SERVER_THREADS or None,
            cache_dir=settings.cache_dir,
            **{"dtype": client_dtype, **options},
        )
    )
    model.state.start(timeout=60)
    if not model.state.wait(lambda: not model.state.missing_blocks(), timeout=120):
        raise SystemExit("the server did not come up")
    return model, server


async def load(url: str, clients: int, tokens: int, seconds: float, sample: bool) -> Load:
    """Let clients stream at the same time; cut off those that are not done after ``seconds``."""
    result = Load()
    start = time.perf_counter()
    await asyncio.gather(*(client(url, i, tokens, start + seconds, sample, result) for i in range(clients)))
    result.seconds = time.perf_counter() - start
    return result


async def client(url: str, number: int, tokens: int, end: float, sample: bool, result: Load) -> None:
    """Stream one answer."""
    async with connect(url.replace("http", "ws") + "/api/v2/generate") as ws:

        async def receive() -> dict[str, Any]:
            reply = json.loads(await asyncio.wait_for(ws.recv(), ANSWER_TIMEOUT))
            if not reply["ok"]:
                raise SystemExit(reply["error"]["message"])
            return reply

        await ws.send(json.dumps({"type": "open_inference_session", "max_length": ROOM + tokens}))
        await receive()
        answer = Answer(result, end)
        request = {"type": "generate", "inputs": prompt(number), "max_new_tokens": 1, "stop_sequence": NEVER}
        await ws.send(json.dumps(request | {"model_defaults": sample}))
        for _ in range(tokens):
            if (await receive())["stop"] or not answer.token():
                break


def timed(step: Callable[[list[int]], int], token_ids: list[int], tokens: int) -> Load:
    """Run a loop that makes one token from the last, and measure its times."""
    result = Load()
    start = last = time.perf_counter()
    for i in range(tokens):
        token_ids = [step(token_ids)]
        now = time.perf_counter()
        (result.gaps if i else result.first).append(now - last)
        last = now
    result.seconds, result.tokens = last - start, tokens
    return result


def own_loop(model: SwarmModel, tokens: int) -> Load:
    """Run this project's session, without text and transport."""
    token_ids = model.tokenizer.encode(prompt(0))
    with model.open_session(len(token_ids) + tokens) as session:
        return timed(lambda ids: int(session.step(ids).argmax()), token_ids, tokens)


@torch.inference_mode()
def bare_loop(model: SwarmModel, tokens: int) -> Load:
    """Run petals' own session directly: embed, step, final norm, head, pick the likeliest."""
    token_ids = model.tokenizer.encode(prompt(0))
    with InferenceSession(model.state.manager, len(token_ids) + tokens) as session:

        def step(ids: list[int]) -> int:
            return int(model.head.logits(session.step(model.head.embed(ids))[:, -1])[0].argmax())

        return timed(step, token_ids, tokens)


def plain_model(name: str, device: str, dtype: str, settings: Settings) -> tuple[Any, Any]:
    """Load the whole model into this process."""
    set_threads(cpu_count())
    path = weights.locate(name, cache_dir=settings.cache_dir)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def plain(model: Any, tokenizer: Any, clients: int, tokens: int) -> Load:
    """Decode greedily in one batch that begins and ends for all at once."""
    texts = [prompt(i) for i in range(clients)]
    inputs = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
    ids, mask, past = inputs["input_ids"], inputs["attention_mask"], None
    result = Load()
    start = last = time.perf_counter()
    for i in range(tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        extra = {} if model.config.model_type == "bloom" else {"position_ids": positions}
        output = model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True, **extra)
        past, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        ids.tolist()  # as a sender of the tokens would; waits for a GPU
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        now = time.perf_counter()
        (result.gaps if i else result.first).extend([now - last] * clients)
        last = now
    result.seconds, result.tokens = last - start, tokens * clients
    return result


def note(results: dict[str, Any], kind: str, clients: int, measured: dict[str, float]) -> None:
    results["runs"].append({"kind": kind, "clients": clients, **measured})
    print(f"{clients:4} {kind}: {measured['tokens_per_s']:.1f} tokens/s", file=sys.stderr, flush=True)


COLUMNS = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "server_mib")


def report(results: dict[str, Any]) -> None:
    """Print a table and the gains of batching."""
    print(f"{results['model']}, {results['dtype']} on {results['device']}, {results['cores']} cores")
    print(f"{'':34}{'clients':>8}" + "".join(f"{name:>14}" for name in COLUMNS))
    runs = sorted(results["runs"], key=lambda run: run["clients"])
    for run in runs:
        values = "".join(f"{run[name]:14.1f}" if name in run else " " * 14 for name in COLUMNS)
        print(f"{run['kind']:34}{run['clients']:8}{values}")
    by_kind = {(run["kind"], run["clients"]): run for run in runs}
    results["ratios"] = {}
    for clients in sorted({run["clients"] for run in runs}):
        ours, stock = (by_kind[f"app, {kind}", clients] for kind in (BATCHING, STOCK))
        ratio = {name: ours[name] / stock[name] for name in ("tokens_per_s", "ttft_p50_ms", "itl_p50_ms")}
        results["ratios"][clients] = ratio
        print(f"{clients} clients: {ratio['tokens_per_s']:.2f} times the tokens/s of the stock server, ", end="")
        print(f"{ratio['ttft_p50_ms']:.2f} times its TTFT p50, {ratio['itl_p50_ms']:.2f} times its ITL p50")


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot tokens/s over the number of clients."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for kind in dict.fromkeys(run["kind"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["kind"] == kind]
        axes.plot(*zip(*((run["clients"], run["tokens_per_s"]) for run in runs), strict=True), marker="o", label=kind)
    axes.set(xscale="log", yscale="log", xlabel="clients at a time", ylabel="tokens/s, all clients together")
    clients = sorted({run["clients"] for run in results["runs"]})
    axes.set_xticks(clients, [str(count) for count in clients])
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_title(
        f"{results['model']}, {results['dtype']}, {results['device']}, {results['cores']} cores", fontsize=10
    )
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
    # Library threads may keep the interpreter alive; everything we started has ended.
    sys.stdout.flush()
    os._exit(0)
