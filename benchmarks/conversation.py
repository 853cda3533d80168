"""What keeping sessions warm saves: the time to the first token of each turn of a chat, with it and without.

    python -m benchmarks.conversation --turns 20

Two copies of the app run in front of one server; one keeps the sessions of finished answers, the other does not. One
run holds the same conversation with both through the OpenAI API, turn by turn; each turn sends the whole history. For
each turn it prints the prompt's tokens, how many of them the first app did not have to compute, and both times.
"""

import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import openai

from benchmarks.serving import serve_model
from config import Settings
from swarm.local import LocalSwarm
from swarm.process import set_threads
from tests.support.processes import GUNICORN, running

QUESTIONS = ["Tell me about bees.", "Why is that so?", "Give me an example.", "And what do others think of it?"]
KINDS = {"with": "32", "without": "0"}  # WARM_SESSIONS


def main() -> None:
    """Hold the conversation; print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=40, help="longest answer (default: %(default)s)")
    args = parser.parse_args()
    settings = Settings.from_environment()
    set_threads(settings.CLIENT_THREADS)
    name, device, dtype = settings.default_model, settings.device(), settings.torch_dtype()
    with LocalSwarm() as local, tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        model, _ = serve_model(local, settings, name, device, dtype, share=0.1)
        clients = {}
        for kind, sessions in KINDS.items():
            environment = {"INITIAL_PEERS": ",".join(local.swarm.initial_peers), "WARM_SESSIONS": sessions}
            program = stack.enter_context(running(GUNICORN, Path(directory) / f"{kind}.log", **environment))
            program.wait_ready()
            clients[kind] = openai.OpenAI(base_url=f"{program.url}/v1", api_key="none", timeout=600)
        for client in clients.values():
            ask(client, name, [{"role": "user", "content": "Warm up."}], args.tokens)
        messages: list[dict[str, str]] = []
        turns = []
        print(f"{'turn':>4}{'prompt':>8}{'cached':>8}{'with, ms':>11}{'without, ms':>13}{'ratio':>7}")
        for turn in range(args.turns):
            messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
            found = {kind: ask(client, name, messages, args.tokens) for kind, client in clients.items()}
            first, usage, text = found["with"]
            row = {
                "turn": turn + 1,
                "prompt": usage.prompt_tokens,
                "cached": usage.prompt_tokens_details.cached_tokens,
                "with_ms": 1000 * first,
                "without_ms": 1000 * found["without"][0],
            }
            turns.append(row | {"ratio": row["with_ms"] / row["without_ms"]})
            print("{turn:4}{prompt:8}{cached:8}{with_ms:11.1f}{without_ms:13.1f}{ratio:7.2f}".format(**turns[-1]))
            messages.append({"role": "assistant", "content": text})
        print(json.dumps(turns))
        model.close()


def ask(client: openai.OpenAI, model: str, messages: Any, tokens: int) -> tuple[float, Any, str]:
    """Stream an answer; return (seconds to the first token, usage, text)."""
    started = time.perf_counter()
    first, text, usage = None, "", None
    for chunk in client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            text += chunk.choices[0].delta.content
    return first or time.perf_counter() - started, usage, text


if __name__ == "__main__":
    main()
