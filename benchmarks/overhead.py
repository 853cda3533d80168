"""What a WebSocket stream costs per token, compared with the bare Petals client loop on the same swarm, in one run.

    make bench        or        python -m benchmarks.overhead --tokens 100 --rounds 5

The two take turns, so that a temporarily slow machine slows both. The bare loop is petals' own inference session:
embed, step, final norm, head, pick the likeliest; the stream is a WebSocket client of the app under gunicorn.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

from benchmarks.loads import prompt
from benchmarks.serving import bare_loop, own_loop, serve_model
from config import Settings
from swarm.client.model import SwarmModel
from swarm.local import LocalSwarm
from swarm.process import set_threads
from tests.support.processes import GUNICORN, Program, running


def main() -> None:
    """Measure; print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=60, help="tokens per turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: %(default)s)")
    args = parser.parse_args()
    settings = Settings.from_environment()
    set_threads(settings.CLIENT_THREADS)
    with LocalSwarm() as local, tempfile.TemporaryDirectory() as directory:
        places = settings.default_model, settings.device(), settings.torch_dtype()
        model, _ = serve_model(local, settings, *places, share=0.25)
        peers = ",".join(local.swarm.initial_peers)
        with running(GUNICORN, Path(directory) / "log", INITIAL_PEERS=peers) as program:
            program.wait_ready()
            report(measure(model, program, args.tokens, args.rounds))
        model.close()


def measure(model: SwarmModel, program: Program, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Return each turn's median milliseconds between tokens, by kind."""
    kinds = {
        "bare Petals client loop": lambda: bare_loop(model, tokens).gaps,
        "this client's loop": lambda: own_loop(model, tokens).gaps,
        "WebSocket stream": lambda: stream(program, tokens),
    }
    results: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(rounds + 1):
        for name, run in kinds.items():
            latency = statistics.median(run()) * 1000
            if turn > 0:  # the first turn warms up
                results[name].append(latency)
    return results


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def stream(program: Program, tokens: int) -> list[float]:
    """Stream token by token from a WebSocket client, as the chat page does."""
    times: list[float] = []
    with connect(program.url.replace("http", "ws") + "/api/v2/generate") as ws:
        ask(ws, {"type": "open_inference_session", "max_length": 1024})
        ws.send(
            json.dumps(
                {
                    "type": "generate",
                    "inputs": prompt(0),
                    "max_new_tokens": 1,
                    "stop_sequence": "no such text in a story",
                }
            )
        )
        while len(times) < tokens and not receive(ws)["stop"]:
            times.append(time.perf_counter())
    return gaps(times)


def ask(ws: Any, message: dict[str, Any]) -> dict[str, Any]:
    ws.send(json.dumps(message))
    return receive(ws)


def receive(ws: Any) -> dict[str, Any]:
    reply = json.loads(ws.recv(timeout=120))
    if not reply["ok"]:
        raise SystemExit(reply["error"]["message"])
    return reply


def report(results: dict[str, list[float]]) -> None:
    """Print medians, and each kind compared with the bare loop of the same turn."""
    base = results["bare Petals client loop"]
    print(f"{'':28}{'ms/token':>10}{'min':>8}{'max':>8}{'tokens/s':>10}{'over bare':>12}{'ratio':>8}")
    summary = {}
    for name, values in results.items():
        over = statistics.median(value - bare for value, bare in zip(values, base, strict=True))
        ratio = statistics.median(value / bare for value, bare in zip(values, base, strict=True))
        median = statistics.median(values)
        summary[name] = {"ms_per_token": median, "over_bare_ms": over, "ratio": ratio}
        spread = f"{median:10.2f}{min(values):8.2f}{max(values):8.2f}"
        print(f"{name:28}{spread}{1000 / median:10.1f}{over:+9.2f} ms{ratio:8.3f}")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
    # Library threads may keep the interpreter alive; everything we started has ended.
    sys.stdout.flush()
    os._exit(0)
