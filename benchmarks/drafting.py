"""What drafts are worth: answers with and without them, over three servers that are near or far.

    python -m benchmarks.drafting                    or        ... --round-trips 0 100 --prompts 20 --tokens 96

SmolLM2's blocks are on three servers behind proxies (``benchmarks.delaying``). Of the prompts in ``repeating.txt``,
which ask for edits and quotations, each is answered with and without drafts, one right after the other. Many users
answer prompts at once, without and with drafts in turn. And 200 answers, greedy and drawn, are compared, with drafts at
every opportunity, whether they pay or not. Tokens per second are those after an answer's first token.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.delaying import Links, far_apart
from config import Settings
from generation.drafting import Drafting
from generation.loop import generate
from generation.parameters import GenerationParams
from generation.text import Detokenizer
from swarm import weights
from swarm.client.model import SwarmModel
from swarm.local import LocalSwarm
from swarm.options import ServerOptions
from swarm.process import set_threads
from tests.support.drafts import eager

SPANS = ("0:10", "10:20", "20:30")
REPEATING = Path(__file__).with_name("repeating.txt")
FREE = (
    "What is the capital of France, and what should I see there?",
    "Write a short story about a lighthouse keeper.",
    "Give me three reasons to learn to play the piano.",
    "How does a bicycle stay upright?",
)
# For the comparison of answers: greedy, and drawn with these seeds.
SEEDS: tuple[int | None, ...] = (None, *range(1, 10))
AT_ONCE = 8  # answers, when they are compared
READY_TIMEOUT = 300.0  # seconds


@dataclass
class Tally:
    """What some answers took."""

    tokens: int = 0
    seconds: float = 0.0
    texts: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Bench:
    """A model, and prompts as it reads them."""

    def __init__(self, model: SwarmModel, path: str, tokens: int) -> None:
        self.model = model
        self.tokens = tokens
        self._template: Any = AutoTokenizer.from_pretrained(path)
        self.repeating = [self._encode(text.strip()) for text in REPEATING.read_text().split("\n====\n")]
        self.free = [self._encode(text) for text in FREE]

    def _encode(self, text: str) -> list[int]:
        told = [{"role": "user", "content": text}]
        rendered = self._template.apply_chat_template(told, add_generation_prompt=True, tokenize=False)
        ids: list[int] = self._template(rendered, add_special_tokens=False)["input_ids"]
        return ids

    def answer(self, prompt: Sequence[int], drafting: Drafting | None, tally: Tally, seed: int | None = None) -> None:
        """Answer a prompt, and count it."""
        params = GenerationParams(
            max_new_tokens=self.tokens, do_sample=seed is not None, temperature=0.7, top_p=0.9, top_k=0, seed=seed
        )
        text, count, began = "", 0, 0.0
        with self.model.open_session(len(prompt) + self.tokens) as session:
            for _, chunk in generate(
                session,
                prompt,
                params,
                budget=self.tokens,
                detokenizers=[Detokenizer(self.model.tokenizer)],
                defaults=self.model.generation_config,
                drafting=drafting,
            ):
                began = began or time.perf_counter()
                text += chunk.text
                count += 1
        tally.tokens += count - 1
        tally.seconds += time.perf_counter() - began
        tally.texts.append(text)


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--round-trips", type=float, nargs="*", default=[0, 100], help="ms (default: 0 100)")
    parser.add_argument("--prompts", type=int, default=20, help="of the set (default: %(default)s)")
    parser.add_argument("--free", type=int, default=4, help="prompts that repeat nothing (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer, at most (default: %(default)s)")
    parser.add_argument("--compare", type=int, default=200, help="answers to compare (default: %(default)s)")
    parser.add_argument("--users", type=int, default=16, help="at once (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=4, help="with and without drafts each (default: %(default)s)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quant", default="auto")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    set_threads(1)
    with contextlib.ExitStack() as stack:
        local = stack.enter_context(LocalSwarm())
        bench, links = begin(stack, local, args)
        results: dict[str, Any] = {"processor": processor(), "dtype": args.dtype, "quant": args.quant}
        results["near_and_far"] = []
        for round_trip in args.round_trips:
            links.one_way = round_trip / 2000
            for name, prompts in (("repeating", bench.repeating[: args.prompts]), ("free", bench.free[: args.free])):
                if prompts:
                    results["near_and_far"].append(in_turn(bench, name, prompts, round_trip))
        links.one_way = 0.0
        if args.users:
            results["users"] = crowd(bench, args.users, args.turns)
        if args.compare:
            results["compared"] = compare(bench, args.compare)
        if args.json:
            args.json.write_text(json.dumps(results, indent=2) + "\n")
        local.close()


def begin(stack: contextlib.ExitStack, local: LocalSwarm, args: argparse.Namespace) -> tuple[Bench, Links]:
    """Start the servers and the model, and answer once."""
    settings = Settings.from_environment()
    common = ServerOptions(
        settings.default_model,
        dtype=args.dtype,
        quant=args.quant,
        threads=1,
        cache_dir=settings.cache_dir,
        attn_cache_tokens=65536,
    )
    path = weights.locate(settings.default_model, cache_dir=settings.cache_dir)
    links = stack.enter_context(far_apart(local, [dataclasses.replace(common, blocks=blocks) for blocks in SPANS]))
    model = SwarmModel.load(
        settings.default_model, local.swarm, cache_dir=settings.cache_dir, device="cpu", torch_dtype=args.dtype
    )
    stack.callback(model.close)
    state = model.state
    if not (state.start(READY_TIMEOUT) and state.wait(lambda: not state.missing_blocks(), READY_TIMEOUT)):
        raise SystemExit("the servers did not come up")
    bench = Bench(model, path, args.tokens)
    bench.answer(bench.free[0], None, Tally())
    return bench, links


def in_turn(bench: Bench, name: str, prompts: Sequence[Sequence[int]], round_trip: float) -> dict[str, Any]:
    """Answer prompts with and without drafts, one right after the other; report."""
    drafting, drafted, plain, ratios = Drafting(), Tally(), Tally(), []
    for number, prompt in enumerate(prompts):
        pair = Tally(), Tally()
        turns = [(pair[0], drafting), (pair[1], None)]
        for tally, one in turns if number % 2 else reversed(turns):
            bench.answer(prompt, one, tally)
        for whole, part in zip((drafted, plain), pair, strict=True):
            whole.tokens, whole.seconds = whole.tokens + part.tokens, whole.seconds + part.seconds
            whole.texts += part.texts
        ratios.append(pair[0].rate / pair[1].rate)
        print(f"{name} {number}: {pair[1].rate:.2f} tokens/s without drafts, {pair[0].rate:.2f} with", flush=True)
    found = {
        "prompts": name,
        "round_trip_ms": round_trip,
        "plain_tokens_per_s": round(plain.rate, 2),
        "drafted_tokens_per_s": round(drafted.rate, 2),
        "ratio": round(drafted.rate / plain.rate, 3),
        "median_ratio": round(statistics.median(ratios), 3),
        "steps_with_drafts": drafting.steps,
        "drafted": drafting.drafted,
        "taken": drafting.taken,
        "equal_texts": sum(one == other for one, other in zip(drafted.texts, plain.texts, strict=True)),
        "texts": len(plain.texts),
    }
    print(json.dumps(found), flush=True)
    return found


def crowd(bench: Bench, users: int, turns: int) -> dict[str, Any]:
    """Let many users answer prompts at once, in turns without and with drafts; report."""
    drafting, ratios, equal = Drafting(), [], 0
    for _ in range(turns):
        rates, texts = [], []
        for one in (None, drafting):
            tallies, started = [Tally() for _ in range(users)], time.perf_counter()
            threads = [
                threading.Thread(target=bench.answer, args=(bench.repeating[i % len(bench.repeating)], one, tally))
                for i, tally in enumerate(tallies)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rates.append(sum(tally.tokens for tally in tallies) / (time.perf_counter() - started))
            texts.append([tally.texts for tally in tallies])
        ratios.append(rates[1] / rates[0])
        equal += sum(one == other for one, other in zip(*texts, strict=True))
        print(f"{users} users: {rates[0]:.1f} tokens/s without drafts, {rates[1]:.1f} with", flush=True)
    found = {
        "users": users,
        "median_ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "drafted": drafting.drafted,
        "taken": drafting.taken,
        "equal_texts": equal,
        "texts": users * turns,
    }
    print(json.dumps(found), flush=True)
    return found


def compare(bench: Bench, count: int) -> dict[str, Any]:
    """Compare answers without drafts and with as many as there can be; report."""
    tasks = [(prompt, seed) for seed in SEEDS for prompt in bench.repeating][:count]
    drafting, equal = eager((1, 3, 7, 15)), [0, 0]

    def both(task: tuple[Sequence[int], int | None]) -> bool:
        tally = Tally()
        for one in (None, drafting):
            bench.answer(task[0], one, tally, task[1])
        return tally.texts[0] == tally.texts[1]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for task, same in zip(tasks, pool.map(both, tasks), strict=True):
            equal[task[1] is not None] += same
    greedy = sum(seed is None for _, seed in tasks)
    found = {
        "greedy": greedy,
        "greedy_equal": equal[0],
        "drawn": len(tasks) - greedy,
        "drawn_equal": equal[1],
        "drafted": drafting.drafted,
        "taken": drafting.taken,
    }
    print(json.dumps(found), flush=True)
    return found


def processor() -> str:
    """Return the processor's name, as Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Library threads may keep the interpreter alive; everything we started has ended.
    os._exit(0)
