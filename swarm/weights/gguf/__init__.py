"""Converts a GGUF file to a Transformers checkpoint: configuration, tokenizer and weights.

Everything comes from the file. A setting, tensor or tokenizer that is unknown here is refused by its name; none is
ignored. Transformers reads GGUF files too, but it leaves out what it does not know, such as the rotation of Llama 3.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swarm.weights.gguf.architectures import ARCHITECTURES
from swarm.weights.gguf.files import WeightFiles
from swarm.weights.gguf.settings import Settings
from swarm.weights.gguf.tensors import convert_tensors
from swarm.weights.gguf.tokens import eos_token_ids, write_tokenizer
from swarm.weights.progress import Progress

# Models with more parameters are written in bfloat16, as their originals mostly are. Matrices in few bits that can be
# computed with stay in these: rounded to bfloat16, their bits could not be found again.
FLOAT32_PARAMETERS = 2**30


def convert(gguf_file: Path, directory: Path, progress: Progress) -> None:
    """Write the model in a GGUF file as a Transformers checkpoint with its tokenizer.

    :raises ValueError: if something in the file is not understood
    :raises KeyError: if something is missing
    """
    from gguf import GGUFReader

    progress.say(f"reading {gguf_file.name}")
    reader = GGUFReader(gguf_file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    settings = Settings({key: field.contents() for key, field in reader.fields.items()}, tensors)
    architecture = ARCHITECTURES.get(settings.architecture)
    if architecture is None:
        raise ValueError(f"its architecture is {settings.architecture!r}; these are known: {', '.join(ARCHITECTURES)}")
    config = architecture.config(settings)
    small = sum(int(tensor.n_elements) for tensor in reader.tensors) <= FLOAT32_PARAMETERS
    config["torch_dtype"] = "float32" if small else "bfloat16"
    settings.check_all_taken()
    write_tokenizer(settings, config, directory)
    write_json(directory / "config.json", config)
    token_ids = {"bos_token_id": config["bos_token_id"], "eos_token_id": eos_token_ids(settings.tokenizer)}
    write_json(directory / "generation_config.json", {**token_ids, "pad_token_id": config["pad_token_id"]})
    with WeightFiles(directory, config["torch_dtype"]) as files:
        convert_tensors(tensors, config, architecture, files.add, progress, keep_bits=not small)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
