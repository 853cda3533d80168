"""The two ends of a very large BLOOM with random weights, at true shape: its embeddings, which are its head, and norms.

Its blocks are there in name only: a file with nothing in it, which takes no room on the disk and is never read.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import AutoTokenizer, BloomConfig

from benchmarks.memory_limit import free_disk
from config import Settings
from swarm import weights
from swarm.families.checkpoint import empty_block
from swarm.families.petals_blocks import restore_blocks

PIECE = 1024  # rows that are made at a time
ENDS, BLOCKS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
# Rows are random directions. Their lengths differ by a fifth and the scales of columns by a third, as in trained
# models. A length of 2 makes logits of an input whose norm is the square root of the hidden size differ by 2.
LENGTH, LENGTHS_DIFFER, COLUMNS_DIFFER = 2.0, 0.2, 0.3
# As of SmolLM2-135M on the text of the GPL: the standard deviation of logits, how much probability falls with rank, and
# the share of the words after the first LIKELY ones. A tenth of positions have less than the first number, another
# tenth more than the second.
SPREAD, STEEP, LIKELY = 3.4, (1.1, 2.0), 128
USUAL, HARD = (0.002, 0.2), (0.2, 0.9)


def model_ends(settings: Settings, rows: int, columns: int, layers: int) -> Path:
    """Return the model's directory, below the cache directory; it is written there once, in bfloat16.

    :param columns: the hidden size; the heads are of 128
    """
    directory = settings.cache_dir.absolute() / f"random-ends-{rows}x{columns}"
    if not directory.exists():
        # Beside the weights, their copy in 8 bits.
        if free_disk(directory) < (needed := 3.2 * rows * columns + 2**30):
            raise SystemExit(f"{directory} needs {needed / 2**30:.0f} GiB of disk")
        unfinished = directory.with_name(f"{directory.name}.part")
        unfinished.mkdir(parents=True, exist_ok=True)
        tokenizer = weights.locate(settings.default_model, cache_dir=settings.cache_dir)
        write(unfinished, tokenizer, rows, columns, layers)
        unfinished.rename(directory)
    return directory


def write(directory: Path, tokenizer: str, rows: int, columns: int, layers: int) -> None:
    """Write a model with another one's tokenizer."""
    config = BloomConfig(
        vocab_size=rows, hidden_size=columns, n_layer=layers, n_head=max(1, columns // 128), dtype=torch.bfloat16
    )
    config.architectures = ["BloomForCausalLM"]
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    norms = [f"{name}.{kind}" for name in ("word_embeddings_layernorm", "ln_f") for kind in ("weight", "bias")]
    ends = {"word_embeddings.weight": (rows, columns), **{name: (columns,) for name in norms}}
    with (directory / ENDS).open("wb") as file:
        write_header(file, ends)
        for piece in random_rows(rows, columns):
            file.write(piece.view(torch.int16).numpy().tobytes())
        for name in norms:
            value = torch.full((columns,), float(name.endswith("weight")), dtype=torch.bfloat16)
            file.write(value.view(torch.int16).numpy().tobytes())
    blocks = block_shapes(directory, layers)
    with (directory / BLOCKS).open("wb") as file:
        size = write_header(file, blocks)
        file.truncate(file.tell() + size)
    index = {**dict.fromkeys(ends, ENDS), **dict.fromkeys(blocks, BLOCKS)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def block_shapes(directory: Path, layers: int) -> dict[str, tuple[int, ...]]:
    restore_blocks()
    from petals import AutoDistributedConfig

    block = empty_block(AutoDistributedConfig.from_pretrained(directory), 0)
    shapes = {name: tuple(value.shape) for name, value in block.state_dict().items()}
    return {f"h.{number}.{name}": shape for number in range(layers) for name, shape in shapes.items()}


def write_header(file: BinaryIO, shapes: dict[str, tuple[int, ...]]) -> int:
    """Write the header of a safetensors file of bfloat16, and return how many bytes of tensors follow it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)  # so that tensors begin where vectors like to
    file.write(len(text).to_bytes(8, "little") + text)
    return offset


def random_rows(rows: int, columns: int) -> Iterator[torch.Tensor]:
    """Yield a random head piece by piece, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    scales = (COLUMNS_DIFFER * torch.randn(columns, generator=generator)).exp()
    scales *= LENGTH / scales.norm()
    for first in range(0, rows, PIECE):
        count = min(PIECE, rows - first)
        lengths = (LENGTHS_DIFFER * torch.randn(count, 1, generator=generator)).exp()
        yield (torch.randn(count, columns, generator=generator) * scales * lengths).bfloat16()


def hidden_states(embeddings: torch.Tensor, count: int, unsure: tuple[float, float], seed: int = 0) -> torch.Tensor:
    """Return random outputs of a last block, from which the head makes logits as those of language models.

    All words get a random logit, of a normal distribution as wide as SmolLM2's. Some are likely: the logarithms of
    their probabilities fall with the logarithm of their rank, by Zipf's law, as fast as SmolLM2's.

    :param embeddings: the head's weights
    :param unsure: which share of the probability is with all other words: evenly distributed, on a logarithmic scale
    :returns: [count, hidden size], float32
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = embeddings.shape
    states = torch.empty(count, columns)
    ranks = torch.arange(1, LIKELY + 1).log()
    for position in range(count):
        noise = torch.randn(columns, generator=generator)
        words = torch.randint(rows, (LIKELY,), generator=generator)
        directions = embeddings[words].float()
        lengths = directions.norm(dim=1, keepdim=True)
        chance, steep = torch.rand(2, generator=generator)
        others = (chance * math.log(unsure[1] / unsure[0])).exp() * unsure[0]
        logits = -(STEEP[0] + steep * (STEEP[1] - STEEP[0])) * ranks
        # What all random logits have together, and what the likely ones need to have beside it.
        rest = math.log(rows) + SPREAD**2 / 2
        logits += rest + ((1 - others) / others).log() - logits.logsumexp(dim=0)
        # A row's logit is its length times its share of the input, whose spread the norm before the head sets.
        states[position] = noise + (logits[:, None] / SPREAD * LENGTH * directions / lengths**2).sum(dim=0)
    return states
