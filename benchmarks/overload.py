"""Two hundred clients against room for sixteen: what happens to each, and how fast the admitted ones are.

    python -m benchmarks.overload --clients 200 --room 16

First as many clients arrive as there is room for, then all at once, in one run against one app with a tiny BLOOM. Each
opens a session over a WebSocket and streams an answer. Prints the waits, the refusals, the speeds and their ratio.
"""

import argparse
import collections
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.client import websocket
from tests.support.processes import GUNICORN, Program, running
from tests.support.tiny import make_tiny_bloom

TOKENS = 60  # of each answer
NEVER = "no such text is ever generated"


@dataclass
class Outcome:
    """The outcome for one client."""

    result: str  # "answered", or the code of the refusal
    waited: float  # seconds from asking for a session until it is granted or refused
    speed: float = 0.0  # tokens/s of the answer


def main() -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--room", type=int, default=16, help="sessions that the app takes (default: %(default)s)")
    parser.add_argument("--queue", type=int, default=32, help="clients that may wait (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds each may wait (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = make_tiny_bloom(Path(directory) / "tiny-bloom")
        environment = {
            "MODELS": str(path),
            "TORCH_DTYPE": "float32",
            "SERVER_THREADS": "1",
            "CACHE_DIR": directory,
            "MAX_SESSIONS": str(args.room),
            "MAX_QUEUE": str(args.queue),
            "QUEUE_TIMEOUT": str(args.limit),
            "LOG_LEVEL": "WARNING",
        }
        with running(GUNICORN, Path(directory) / "log", **environment) as program:
            program.wait_ready()
            crowd(program, args.room)  # warms everything up
            report(crowd(program, args.room), crowd(program, args.clients), args.limit)


def crowd(program: Program, size: int) -> list[Outcome]:
    """Let ``size`` clients arrive at the same moment."""
    outcomes: list[Outcome] = []
    barrier = threading.Barrier(size)

    def run() -> None:
        barrier.wait(timeout=60)
        outcomes.append(client(program))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    hanging = sum(thread.is_alive() for thread in threads)
    if hanging:
        raise SystemExit(f"{hanging} of {size} clients got no answer at all")
    return outcomes


def client(program: Program) -> Outcome:
    """Open a session and stream an answer."""
    began = time.monotonic()
    with websocket(program.url.replace("http", "ws") + "/api/v2/generate") as ws:
        reply = ws.ask({"type": "open_inference_session", "max_length": 128})
        waited = time.monotonic() - began
        if not reply["ok"]:
            return Outcome(reply["error"]["code"], waited)
        ws.send({"type": "generate", "inputs": "The quick brown fox", "max_new_tokens": 1, "stop_sequence": NEVER})
        times: list[float] = []
        while len(times) < TOKENS:
            reply = ws.receive()
            if not reply["ok"]:
                return Outcome(reply["error"]["code"], waited)
            times.append(time.monotonic())
            if reply["stop"]:
                break
        return Outcome("answered", waited, (len(times) - 1) / (times[-1] - times[0]))


def report(alone: list[Outcome], together: list[Outcome], limit: float) -> None:
    """Print waits, refusals and speeds."""
    speeds = [[o.speed for o in outcomes if o.result == "answered"] for outcomes in (alone, together)]
    medians = [statistics.median(values) for values in speeds]
    waits = sorted(outcome.waited for outcome in together)
    print(f"{len(alone)} alone: {len(speeds[0])} answered at a median of {medians[0]:.1f} tokens/s each")
    print(f"{len(together)} at once: {dict(collections.Counter(outcome.result for outcome in together))}")
    print(f"  those let in: {medians[1]:.1f} tokens/s each, {medians[1] / medians[0]:.2f} times the speed alone")
    median = statistics.median(waits)
    print(f"  yes or no came after a median of {median:.2f} s, at most {waits[-1]:.2f} s; the limit is {limit} s")
    print(
        json.dumps(
            {
                "results": dict(collections.Counter(outcome.result for outcome in together)),
                "speed_ratio": round(medians[1] / medians[0], 3),
                "longest_wait_s": round(waits[-1], 2),
                "limit_s": limit,
            }
        )
    )


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
