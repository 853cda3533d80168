"""Writes the weights of a checkpoint, in as many files as it takes to hold only one of them in memory."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

FILE_SIZE = 2**31  # bytes, in float32


class WeightFiles:
    """The files of a checkpoint's weights. The index is written at the end."""

    def __init__(self, directory: Path, dtype: str) -> None:
        """:param dtype: ``"float32"`` or ``"bfloat16"``

        float32 holds a 4-bit file's values exactly; float16 rounds 48% of them, bfloat16 82%. With float32 compute that
        changed 2 and 1 of 12 greedy answers of 64 tokens, but the perplexity of a 2,048-token text by at most 0.006 of
        19.715. So half the size does little harm where it matters. 538 MB of float32 load in 0.5 s, faster than float16
        (0.7-0.8 s), since they need no conversion.
        """
        self._directory = directory
        self._dtype = dtype
        self._waiting: dict[str, Array] = {}
        self._written: list[list[str]] = []  # names of the weights in each file

    def add(self, name: str, weight: "Array") -> None:
        """Add a weight, float32, or rows of bytes, which stay as they are."""
        if self._waiting and sum(array.nbytes for array in self._waiting.values()) + weight.nbytes > FILE_SIZE:
            self._write()
        self._waiting[name] = weight

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        self._write()
        if len(self._written) == 1:
            os.rename(self._file(0), self._directory / "model.safetensors")
            return
        weight_map = {name: self._file(number).name for number, names in enumerate(self._written) for name in names}
        index = {"metadata": {}, "weight_map": weight_map}
        (self._directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    def _file(self, number: int) -> Path:
        return self._directory / f"model-{number + 1:05}.safetensors"

    def _write(self) -> None:
        file = self._file(len(self._written))
        save = save_float32 if self._dtype == "float32" else save_bfloat16
        save(self._waiting, file)
        shutil.copymode(self._directory / "config.json", file)  # safetensors makes it readable only by the owner
        self._written.append(list(self._waiting))
        self._waiting.clear()


def save_float32(weights: "Mapping[str, Array]", file: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(weight) for name, weight in weights.items()}, file, metadata={"format": "pt"})


def save_bfloat16(weights: "Mapping[str, Array]", file: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    rounded = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in rounded.items()}, file, metadata={"format": "pt"})
