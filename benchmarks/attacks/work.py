"""Attacks by work: prompts that are given up, texts and lists that cost more than they weigh."""

import contextlib
import http.client
import random
import string
import threading
from typing import Any

from benchmarks.attacks.client import Client
from benchmarks.attacks.target import Target, attack

HANG_UPS = 300
FEW, MANY = 50, 1000  # requests of a kind, after which memory is compared
# What a Python program with a hundred threads moves by, without leaking: allocators keep what they may need again.
MEMORY_TOLERANCE = 0.05


@attack(f"{HANG_UPS} clients who hang up during long prompts", answer_limit=30.0)
def hang_ups(target: Target) -> str | None:
    """Three clients keep the batches long; others ask, and are gone before they are answered."""
    ending = threading.Event()
    rng = random.Random(0)
    statuses: set[Any] = set()

    def busy() -> None:
        number = 0
        while not ending.is_set():
            number += 1
            prompt = f"{threading.get_ident()} {number} " + "A long story about bees and their swarm. " * 120
            statuses.add(target.client.status("/api/v1/generate", {"inputs": prompt, "max_new_tokens": 2}))

    def hang_up() -> None:
        for number in range(HANG_UPS):
            sock = target.client.send("/api/v1/generate", {"inputs": f"{number} hello " * 3, "max_new_tokens": 50})
            target.wait(rng.uniform(0.02, 0.3))
            sock.close()
        ending.set()

    target.together([busy] * 3 + [hang_up], timeout=600)
    return None if statuses <= {200, 429} else f"long prompts were answered with {statuses}"


@attack("300 and 1,500 entries of logit_bias")
def biased(target: Target) -> str | None:
    for count, wanted in ((300, 200), (1500, 400)):
        bias = {str(token): 0.0 for token in range(count)}
        status, body = target.client.post("/v1/completions", {"prompt": "x", "max_tokens": 4, "logit_bias": bias})
        if status != wanted:
            return f"{count} entries: {status} {str(body)[:200]}"
    return None


@attack("8 times a million digits to tokenize", answer_limit=30.0)
def digits(target: Target) -> str | None:
    statuses: list[Any] = []

    def tokenize() -> None:
        statuses.append(target.client.status("/tokenize", {"content": "7" * 1_000_000}))

    before = target.memory()
    target.together([tokenize] * 8)
    grown = target.memory() - before
    if not set(statuses) <= {200, 400, 413, 422, 429}:
        return f"{statuses}"
    return f"{grown} MiB more" if grown > 500 else None


def word(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=length))


def tokenize(client: Client, rng: random.Random) -> None:
    client.post("/tokenize", {"content": word(rng, 20_000)})


def tokenize_pieces(client: Client, rng: random.Random) -> None:
    client.post("/tokenize", {"content": " ".join(word(rng, 9) for _ in range(500)), "with_pieces": True})


def complete(client: Client, rng: random.Random) -> None:
    body = {"prompt": word(rng, 40), "max_tokens": 2, "logprobs": 20, "echo": True, "n": 2}
    client.post("/v1/completions", body)


def chat(client: Client, rng: random.Random) -> None:
    client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": word(rng, 40)}], "max_tokens": 1})


def open_and_leave(client: Client, rng: random.Random) -> None:
    websocket = client.websocket()
    websocket.ask({"type": "open_inference_session", "max_length": 64})
    websocket.send({"type": "generate", "inputs": word(rng, 20), "max_new_tokens": 30})
    websocket.close()


def too_large(client: Client, rng: random.Random) -> None:
    client.post("/api/v1/generate", {"inputs": word(rng, 10) * 110_000, "max_new_tokens": 1})


def rubbish(client: Client, rng: random.Random) -> None:
    sock = client.connect()
    with sock, contextlib.suppress(OSError):  # it may be closed before all is sent
        sock.sendall(rng.randbytes(2000) + b"\r\n\r\n")
        sock.recv(1000)


def unknown_session(client: Client, rng: random.Random) -> None:
    client.post("/api/v1/generate", {"inputs": "x", "max_new_tokens": 1, "session_id": word(rng, 1000)})


KINDS = (tokenize, tokenize_pieces, complete, chat, open_and_leave, too_large, rubbish, unknown_session)


@attack(f"memory after {MANY} requests of each of {len(KINDS)} kinds, and after {FEW}", answer_limit=30.0)
def memory(target: Target) -> str | None:
    rng = random.Random(1)
    grown = []
    for kind in KINDS:
        repeat(kind, target.client, rng, FEW)
        before = target.memory()
        repeat(kind, target.client, rng, MANY - FEW)
        after = target.memory()
        print(f"    {kind.__name__}: {before} MiB after {FEW}, {after} MiB after {MANY}", flush=True)
        if after > before * (1 + MEMORY_TOLERANCE):
            grown.append(f"{kind.__name__}: from {before} to {after} MiB")
    return "; ".join(grown) or None


def repeat(kind: Any, client: Client, rng: random.Random, count: int) -> None:
    for _ in range(count):
        with contextlib.suppress(OSError, http.client.HTTPException):  # a refusal is as good as an answer
            kind(client, rng)
