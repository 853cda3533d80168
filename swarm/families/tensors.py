"""Does a checkpoint have the tensors that its configuration asks for, no more and no fewer? Their headers tell."""

import os
from pathlib import Path
from typing import Any

import swarm.compat  # noqa: F401

import torch
from petals import AutoDistributedConfig

from swarm.errors import ModelUnavailable
from swarm.families.checkpoint import differences, empty_block, ignored, sentence
from swarm.families.packed import unpacked
from swarm.weights.checks import weight_files
from swarm.weights.fingerprint import read_header, sample_tensor

HEAD = "lm_head.weight"

Shape = tuple[int, ...]


def check_tensors(path: str) -> None:
    """Compare the tensors of a directory's safetensors with those of the model, which petals knows by now.

    Weights of the hub are compared when they are loaded, as are those in PyTorch's format: and the same goes for
    quantised ones, whose tensors are not the model's.

    :raises ModelUnavailable: if there are others; the message is one sentence that names some
    """
    if not os.path.isdir(path):
        return
    files = weight_files(path, Path(path))
    config = AutoDistributedConfig.from_pretrained(path)
    if any(file.suffix != ".safetensors" for file in files) or getattr(config, "quantisation", None):
        return
    found: dict[str, Shape] = {}
    places: dict[str, Path] = {}
    for file in files:
        tensors = {name: tuple(it["shape"]) for name, it in read_header(file)[0].items() if not ignored(name)}
        shapes = dict(unpacked(name, shape) for name, shape in tensors.items())
        found |= shapes
        places |= dict.fromkeys(shapes, file)
    if config.tie_word_embeddings and HEAD in found:
        embeddings = next(iter(end_shapes(config)))
        if embeddings in places and not is_same(places, HEAD, embeddings):
            raise ModelUnavailable(f"{path}: its {HEAD} is not its embeddings, with which its configuration ties it")
        del found[HEAD]
    if reason := difference(found, config):
        raise ModelUnavailable(f"{path}: {reason}")


def is_same(places: dict[str, Path], one: str, other: str) -> bool:
    """Whether two tensors have the same values, as far as a look at some of them tells."""
    return sample_tensor(places[one], one) == sample_tensor(places[other], other)


def difference(found: dict[str, Shape], config: Any) -> str | None:
    """Return what is wrong with the names and shapes of tensors, or None.

    :param config: petals' configuration of the model
    """
    wanted = end_shapes(config)
    rest = dict(found)
    fitting: list[dict[str, Shape]] = []  # of blocks, which are mostly alike: making one takes milliseconds
    for number in range(config.num_hidden_layers):
        prefix = f"{config.block_prefix}.{number}."
        mine = {name.removeprefix(prefix): rest.pop(name) for name in found if name.startswith(prefix)}
        if mine in fitting:
            continue
        state = {name: torch.empty(shape, device="meta") for name, shape in mine.items()}
        if reason := differences(state, empty_block(config, number), prefix):
            return reason
        fitting.append(mine)
    misfits = [name for name, shape in wanted.items() if name in rest and rest[name] != shape]
    return sentence(
        [name for name in wanted if name not in rest], [name for name in rest if name not in wanted], misfits
    )


def end_shapes(config: Any) -> dict[str, Shape]:
    """Return the names and shapes of the tensors that are in no block, the embeddings first."""
    vocabulary, size = config.vocab_size, config.hidden_size
    if config.model_type == "bloom":
        norms = [f"{name}.{kind}" for name in ("word_embeddings_layernorm", "ln_f") for kind in ("weight", "bias")]
        return {"word_embeddings.weight": (vocabulary, size), **{name: (size,) for name in norms}}
    if config.model_type == "falcon":
        shapes: dict[str, Shape] = {
            "transformer.word_embeddings.weight": (vocabulary, size),
            "transformer.ln_f.weight": (size,),
            "transformer.ln_f.bias": (size,),
        }
    else:
        shapes = {"model.embed_tokens.weight": (vocabulary, size), "model.norm.weight": (size,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (vocabulary, size)
    return shapes
