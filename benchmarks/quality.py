"""What fewer bits cost: perplexity, and how often the likeliest token is the one of float32.

    python -m benchmarks.quality        or        ... --formats float32 float32:int8 float32:int4 --tokens 4096

The texts come with numpy: its licences, and the documentation of its functions. A server's own blocks compute them, in
windows of ``WINDOW`` tokens; embeddings, last norm and head are plain Transformers' in float32. One line for each
format and text goes to standard output.
"""

import argparse
import gc
import importlib.metadata
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import swarm.compat  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from petals import AutoDistributedConfig
from petals.utils.convert_block import QuantType, convert_block
from transformers import AutoModelForCausalLM, AutoTokenizer

from config import Settings
from swarm import weights
from swarm.families.adopt import adopt
from swarm.families.checkpoint import load_block
from swarm.server.blocks import Part, RaggedBlocks
from swarm.server.families import make_ragged_blocks

WINDOW = 512  # tokens
CPU = torch.device("cpu")
FORMATS = ("float32", "float32:auto", "float32:bfloat16", "bfloat16", "float32:int8", "float32:int4")


@dataclass
class Outcome:
    """What a format makes of a text."""

    loss: float  # nats for each token
    likeliest: torch.Tensor  # [tokens]


def main() -> None:
    """Measure; print a line for each format and text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", help="default: the app's")
    parser.add_argument(
        "--formats", nargs="+", default=FORMATS, metavar="DTYPE[:QUANT]", help="the first: compared with"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of each text (default: %(default)s)")
    args = parser.parse_args()
    settings = Settings.from_environment()
    path = weights.locate(args.model or settings.default_model, cache_dir=settings.cache_dir)
    adopt(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ends = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    texts = {name: tokenizer(text)["input_ids"][: args.tokens] for name, text in all_texts()}
    first: dict[str, Outcome] = {}
    for name in args.formats:
        dtype, _, quant = name.partition(":")
        blocks = load_blocks(path, getattr(torch, dtype), quant or None)
        for text, token_ids in texts.items():
            outcome = computed(ends, blocks, token_ids)
            base = first.setdefault(text, outcome)
            same = float((outcome.likeliest == base.likeliest).float().mean())
            change = math.exp(outcome.loss - base.loss) - 1
            print(
                f"{name:18} {text:14} perplexity {math.exp(outcome.loss):.4f} ({100 * change:+.3f} %), "
                f"likeliest token the same: {100 * same:.2f} % of {len(token_ids)}",
                flush=True,
            )
        del blocks
        gc.collect()


def all_texts() -> Iterator[tuple[str, str]]:
    """Yield the texts and their names."""
    licences = [file for file in importlib.metadata.files("numpy") or () if file.name == "LICENSE.txt"]
    yield "licences", "\n".join(file.read_text() for file in licences)
    functions = [getattr(np, name) for name in sorted(np.__all__)]
    yield "documentation", "\n\n".join(inspect.getdoc(it) or "" for it in functions if inspect.isroutine(it))


def load_blocks(path: str, dtype: torch.dtype, quant: str | None) -> RaggedBlocks:
    """Load all blocks as a server does."""
    config = AutoDistributedConfig.from_pretrained(path)
    modules = [
        convert_block(
            load_block(path, number, config=config, torch_dtype=dtype, quant=quant),
            number,
            config,
            (CPU,),
            CPU,
            QuantType.NONE,
        )
        for number in range(config.num_hidden_layers)
    ]
    blocks = make_ragged_blocks(modules, config, dtype, WINDOW)
    if blocks is None:
        raise SystemExit(f"{path}: its blocks cannot be computed in batches")
    return blocks


@torch.inference_mode()
def computed(ends: Any, blocks: RaggedBlocks, token_ids: Sequence[int]) -> Outcome:
    """Compute a text, window by window."""
    losses, likeliest, count = [], [], len(blocks.blocks)
    for first in range(0, len(token_ids) - 1, WINDOW):
        window = torch.tensor(token_ids[first : first + WINDOW])
        cache = blocks.cache_descriptor(0, count, 1, WINDOW).make_zeros().sequences[0]
        hidden = ends.get_input_embeddings()(window).to(blocks.dtype)
        hidden = blocks.forward(hidden, [Part(cache, 0, len(window))], 0, count)
        logits = ends.lm_head(ends.model.norm(hidden.float()))
        losses.append(F.cross_entropy(logits[:-1], window[1:], reduction="none"))
        likeliest.append(logits.argmax(-1))
    return Outcome(float(torch.cat(losses).mean()), torch.cat(likeliest))


if __name__ == "__main__":
    main()
