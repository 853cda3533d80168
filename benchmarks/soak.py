"""Hours of use in minutes: clients of every kind use the app while its servers are killed and stopped.

    make soak MINUTES=30

A swarm of four servers, two for each half of a tiny BLOOM, and the app under gunicorn. Clients generate over HTTP and
WebSockets, continue sessions, stop, hang up, vanish and send rubbish. Others send long prompts, whose batches take a
fifth of a second, and hang up meanwhile; one sends the servers requests they must refuse. Every greedy answer that
finishes is compared with plain Transformers. At the end nothing may be left: no session, no process, no growth of
threads, descriptors or memory.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import swarm.compat  # noqa: F401

import psutil
import torch
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, P2PDaemonError, P2PHandlerError
from petals.utils.dht import get_remote_module_infos
from transformers import AutoTokenizer
from websockets.exceptions import ConnectionClosed

from benchmarks.attacks.client import Client
from benchmarks.throttled_server import ThrottledServer
from swarm import weights
from swarm.local import LocalServer, LocalSwarm
from swarm.options import ServerOptions
from tests.support.client import call, websocket
from tests.support.evil import EvilServer, ask, bad_requests
from tests.support.processes import GUNICORN, Program, running, survivors
from tests.support.tiny import load_reference, make_tiny_bloom

PROMPTS = [
    "The quick brown fox",
    "Ein Schwarm von Servern",
    "分散された大規模",
    "блоки модели",
    "a b c",
    "Nobody, said",
]
LONG_PROMPT = "The quick brown fox jumps over the lazy dog. " * 30  # some hundred tokens
LONGEST = 60  # tokens of an answer
CLIENTS = 6  # at a time; two cores compute for all of them
# Refusals allowed while servers are being killed: a later retry would have worked.
REFUSALS = {"blocks_missing", "cache_full", "swarm_timeout", "too_many_sessions", "too_many_requests"}
NEVER = "no such text is ever generated"
# The memory of a Python program with a hundred threads varies by some percent; a leak continues to grow.
MEMORY_TOLERANCE = 0.15


class Soak:
    """The state of a run: what was done and what went wrong."""

    def __init__(self, program: Program, path: Path, seed: int) -> None:
        self.program = program
        self.rng = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.ending = threading.Event()
        self.texts = expected_texts(path)
        self._lock = threading.Lock()

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def fault(self, what: str) -> None:
        """Record something that must not happen."""
        with self._lock:
            self.faults.append(what)
        print(f"FAULT: {what}", flush=True)

    def check(self, prompt: str, length: int, text: str) -> None:
        """Compare a finished answer with the reference."""
        if text != self.texts[prompt][length]:
            self.fault(f"{prompt!r}, {length} tokens: {text!r} instead of {self.texts[prompt][length]!r}")
        self.count("equal answers")

    def refused(self, status: int, body: Any) -> None:
        """Check that the swarm's faults explain a refusal."""
        code = body["error"]["code"] if isinstance(body, dict) else str(body)[:100]
        if code not in REFUSALS:
            self.fault(f"status {status}: {body}")
        self.count(f"refused: {code}")


def expected_texts(path: Path) -> dict[str, list[str]]:
    """Return the reference's text of each prompt for each length, without an incomplete character at the end."""
    tokenizer, reference = AutoTokenizer.from_pretrained(path), load_reference(path)
    texts = {}
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        output = reference.generate(torch.tensor([ids]), max_new_tokens=LONGEST, do_sample=False)[0, len(ids) :]
        texts[prompt] = [whole_text(tokenizer, output[:length].tolist()) for length in range(LONGEST + 1)]
    return texts


def whole_text(tokenizer: Any, token_ids: list[int]) -> str:
    """Decode, leaving out an incomplete character that the next token may finish."""
    from generation.text import Detokenizer
    from swarm.tokenization import TextTokenizer

    detokenizer = Detokenizer(TextTokenizer(tokenizer))
    text = ""
    for token_id in token_ids:
        text += detokenizer.flush() if token_id == tokenizer.eos_token_id else detokenizer.add(token_id)
    return text


def http_answer(soak: Soak, rng: random.Random) -> None:
    """Send one request."""
    prompt, length = rng.choice(PROMPTS), rng.randint(1, LONGEST)
    params = {"inputs": prompt, "max_new_tokens": length}
    status, _, body = call(soak.program.url, "/api/v1/generate", body=params)
    if status == 200:
        soak.check(prompt, length, body["outputs"])
    else:
        soak.refused(status, body)


def http_session(soak: Soak, rng: random.Random) -> None:
    """Use a session in several requests; leave every second one open."""
    prompt, step, times = rng.choice(PROMPTS), rng.randint(2, 10), rng.randint(2, 6)
    url = soak.program.url
    status, _, body = call(url, "/api/v1/open_inference_session", body={"max_length": 160})
    if status != 200:
        return soak.refused(status, body)
    session_id, text, done = body["session_id"], "", 0
    while done < times:
        params = {"session_id": session_id, "max_new_tokens": step, **({"inputs": prompt} if done == 0 else {})}
        status, _, body = call(url, "/api/v1/generate", body=params)
        if status == 200:
            text, done = text + body["outputs"], done + 1
        else:
            soak.refused(status, body)  # then retry the same: the refusal lost nothing
            if soak.ending.is_set():
                return None
    soak.check(prompt, step * times, text)
    if rng.random() < 0.5:
        call(url, "/api/v1/close_inference_session", body={"session_id": session_id})
    return None


def stream(soak: Soak, rng: random.Random) -> None:
    """Read a WebSocket stream to the end, stop it, or leave it in the middle."""
    prompt, end = rng.choice(PROMPTS), rng.choice(["finish", "stop", "close", "vanish"])
    with websocket(soak.program.url.replace("http", "ws") + "/api/v2/generate") as ws:
        reply = ws.ask({"type": "open_inference_session", "max_length": 160})
        if not reply["ok"]:
            return soak.refused(0, reply)
        length = rng.randint(1, LONGEST)
        if end == "finish":
            reply = ws.ask({"type": "generate", "inputs": prompt, "max_new_tokens": length})
            if not reply["ok"]:
                return soak.refused(0, reply)
            return soak.check(prompt, length, reply["outputs"])
        ws.send({"type": "generate", "inputs": prompt, "max_new_tokens": 1, "stop_sequence": NEVER})
        text, tokens = "", 0
        while tokens < length:
            reply = ws.receive()
            if not reply["ok"]:
                return soak.refused(0, reply)
            if reply["stop"]:
                return None  # the text has ended
            text, tokens = text + reply["outputs"], tokens + reply["token_count"]
        soak.check(prompt, tokens, text)
        if end == "stop":
            ws.send({"type": "stop"})
            while not reply.get("stop") and reply["ok"]:
                reply = ws.receive()
        elif end == "vanish":
            ws.connection.socket.close()
        soak.count(f"streams left by {end}")
    return None


def rubbish(soak: Soak, rng: random.Random) -> None:
    """Send bad requests: they need clear answers, and no status above 499."""
    bodies: list[Any] = [
        {},
        {"inputs": "a"},
        {"inputs": "a", "max_new_tokens": -1},
        {"inputs": "word " * 3000, "max_new_tokens": 1},
        {"inputs": "a", "max_new_tokens": 1, "session_id": "nobody's"},
        [],
    ]
    status, _, body = call(soak.program.url, "/api/v1/generate", body=rng.choice(bodies))
    if not 400 <= status < 500 or body["ok"] is not False:
        soak.fault(f"rubbish was answered with {status}: {body}")
    soak.count("bad requests")


def hang_up(soak: Soak, rng: random.Random) -> None:
    """Send a long prompt and hang up while it is computed."""
    params = {"inputs": f"{rng.random()} " + LONG_PROMPT, "max_new_tokens": rng.randint(1, LONGEST)}
    with Client(soak.program.url).send("/api/v1/generate", params):
        soak.ending.wait(rng.uniform(0.02, 0.5))
    soak.count("prompts given up")


def harass(soak: Soak, local: LocalSwarm, path: Path) -> None:
    """Keep sending the servers requests they must refuse."""
    uids = [f"{weights.dht_prefix(str(path))}.{block}" for block in range(4)]
    hidden_size = json.loads((path / "config.json").read_text())["hidden_size"]
    with contextlib.closing(EvilServer(local.swarm.initial_peers, uids)) as enemy:
        while not soak.ending.wait(1.0):
            for blocks in (uids[:2], uids[2:]):
                infos = get_remote_module_infos(enemy.dht, blocks, latest=True)
                for peer_id in {peer for info in infos for peer in info.servers if peer != enemy.peer_id}:
                    harass_one(soak, enemy, peer_id, bad_requests(blocks, hidden_size))


def harass_one(soak: Soak, enemy: EvilServer, peer_id: PeerID, requests: Mapping[str, tuple[list[bytes], str]]) -> None:
    name = soak.rng.choice(list(requests))
    messages, answer = requests[name]
    try:
        got = RemoteExpertWorker.run_coroutine(ask(enemy.p2p, peer_id, messages))
    except (OSError, EOFError, TimeoutError, P2PDaemonError, P2PHandlerError, ControlFailure):
        soak.count("evil requests to servers that were gone")
        return
    # A server that is killed or stopped meanwhile also closes the stream.
    if answer not in got and got != "closed":
        soak.fault(f"{name} was answered with {got}")
    soak.count("evil requests")


def client(soak: Soak, seed: int) -> None:
    """Do one thing after another until the end."""
    rng = random.Random(seed)
    kinds: list[Callable[[Soak, random.Random], None]] = [http_answer, http_session, stream, stream, rubbish, hang_up]
    while not soak.ending.is_set():
        kind = rng.choice(kinds)
        try:
            kind(soak, rng)
        except ConnectionClosed as error:
            soak.fault(f"{kind.__name__}: the connection was closed: {error}")
        except (OSError, TimeoutError) as error:
            soak.fault(f"{kind.__name__}: {type(error).__name__}: {error}")
        except Exception as error:  # any error is a finding
            soak.fault(f"{kind.__name__}: {type(error).__name__}: {error}")


def trouble(soak: Soak, servers: Sequence[LocalServer], period: float) -> None:
    """Kill or stop a server every now and then."""
    while not soak.ending.wait(soak.rng.uniform(0.5, 1.5) * period):
        server = soak.rng.choice(servers)
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(server.process.pid)
            if soak.rng.random() < 0.7:
                main.kill()
                soak.count("servers killed")
            else:
                family = [main, *main.children(recursive=True)]
                for process in family:
                    process.suspend()
                soak.count("servers stopped")
                soak.ending.wait(6)
                for process in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.resume()


def sample(program: Program) -> dict[str, int]:
    """Return threads, descriptors and memory of the app's worker, and its open sessions."""
    (worker,) = psutil.Process(program.process.pid).children()
    return {
        "threads": worker.num_threads(),
        "descriptors": worker.num_fds(),
        "memory_mib": worker.memory_info().rss >> 20,
        "sessions": call(program.url, "/healthz")[2]["sessions"]["open"],
    }


def run(minutes: float, *, period: float = 8.0, seed: int = 0) -> dict[str, Any]:
    """Run a soak test and return its results; ``faults`` must be empty.

    :param minutes: how long clients and trouble continue
    :param period: mean seconds between two troubles
    """
    with tempfile.TemporaryDirectory() as directory:
        path = make_tiny_bloom(Path(directory) / "tiny-bloom")
        with LocalSwarm() as local:
            options = ServerOptions(str(path), dtype="float32", threads=1, attn_cache_tokens=65536)
            parts = [dataclasses.replace(options, blocks=blocks) for blocks in ("0:2", "2:4") * 2]
            servers = [ThrottledServer(part, local.swarm.initial_peers) for part in parts]
            local.servers += servers
            environment = {
                "MODELS": str(path),
                "INITIAL_PEERS": ",".join(local.swarm.initial_peers),
                "TORCH_DTYPE": "float32",
                "CACHE_DIR": directory,
                "SESSION_TIMEOUT": "5",
                "LOG_LEVEL": "WARNING",
                "UPDATE_PERIOD": "2",
                # If some blocks lose all servers, the app's clear refusal must come before the clients give up.
                "RECOVERY_TIMEOUT": "30",
            }
            with running(GUNICORN, Path(directory) / "log", **environment) as program:
                program.wait_ready()
                soak = Soak(program, path, seed)
                enemy = threading.Thread(target=harass, args=(soak, local, path), daemon=True)
                enemy.start()
                report = soak_program(soak, servers, minutes, period)
                enemy.join(timeout=60)
                family = program.family()
                program.end()
                left = survivors(family)
                report["faults"] += [f"left running: {name}" for name in left]
                report["tracebacks"] = program.output.count("Traceback (most recent call last)")
    return report


def soak_program(soak: Soak, servers: Sequence[LocalServer], minutes: float, period: float) -> dict[str, Any]:
    """Start clients and trouble, wait, and check what is left."""
    threads = [threading.Thread(target=client, args=(soak, seed), daemon=True) for seed in range(CLIENTS)]
    threads.append(threading.Thread(target=trouble, args=(soak, servers, period), daemon=True))
    for thread in threads:
        thread.start()
    began, samples, end = time.monotonic(), [], time.monotonic() + minutes * 60
    while (left := end - time.monotonic()) > 0:
        # The last sample is compared with the first, taken when everything has been used once.
        soak.ending.wait(min(left, max(10.0, minutes * 60 / 10)))
        samples.append(sample(soak.program))
        print(f"{(time.monotonic() - began) / 60:5.1f} min {samples[-1]} {dict(soak.counts)}", flush=True)
    soak.ending.set()
    for thread in threads:
        thread.join(timeout=180)
        if thread.is_alive():
            soak.fault("a client hangs")
    await_rest(soak)
    samples.append(sample(soak.program))
    judge(soak, samples)
    return {"counts": dict(soak.counts), "first": samples[0], "last": samples[-1], "faults": soak.faults}


def await_rest(soak: Soak) -> None:
    """Wait until the dropped sessions have expired."""
    waiting = threading.Event()
    for _ in range(120):
        if sample(soak.program)["sessions"] == 0:
            return
        waiting.wait(0.5)
    soak.fault("sessions are left")


def judge(soak: Soak, samples: list[dict[str, int]]) -> None:
    first, last = samples[0], samples[-1]
    if last["threads"] > first["threads"] + CLIENTS:  # gunicorn's pool grows with the most requests at once
        soak.fault(f"threads: {first['threads']}, in the end {last['threads']}")
    if last["descriptors"] > first["descriptors"]:
        soak.fault(f"descriptors: {first['descriptors']}, in the end {last['descriptors']}")
    if last["memory_mib"] > first["memory_mib"] * (1 + MEMORY_TOLERANCE):
        soak.fault(f"memory: {first['memory_mib']} MiB, in the end {last['memory_mib']} MiB")


def main() -> int:
    """Run from the command line; the exit status is 1 if there were faults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--period", type=float, default=8.0, help="mean seconds between two troubles")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = run(args.minutes, period=args.period, seed=args.seed)
    print(json.dumps(report, ensure_ascii=False))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Library threads may keep the interpreter alive; everything we started has ended.
    os._exit(status)
