"""The settings in a GGUF file, each of which has to be taken by somebody."""

from collections.abc import Mapping
from typing import Any


class Settings:
    """What a GGUF file says beside its tensors' values."""

    def __init__(self, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """:param tensors: the file's tensors by their names"""
        self.architecture: str = metadata["general.architecture"]
        prefix = f"{self.architecture}."
        self._left = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        tokens = "tokenizer.ggml."
        # Of the tokenizer: tokens, merges, special tokens. It is read by ``swarm.weights.gguf.tokens``.
        self.tokenizer = {key.removeprefix(tokens): value for key, value in metadata.items() if key.startswith(tokens)}
        self.chat_template: str | None = metadata.get("tokenizer.chat_template")
        self.tensors = tensors
        if metadata.get("split.count", 1) > 1:
            raise ValueError("it is a part of a model in several files: merge them with llama-gguf-split --merge")

    def take(self, key: str) -> Any:
        """Return a setting that has to be there.

        :param key: without the architecture's name at its beginning
        :raises KeyError: if it is missing
        """
        if key not in self._left:
            raise KeyError(f"{self.architecture}.{key}")
        return exact(self._left.pop(key))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a setting that may be missing."""
        return exact(self._left.pop(key, default))

    def check(self, key: str, expected: Any) -> None:
        """Refuse the file if it has a setting that is not as Transformers always has it.

        :raises ValueError: if so
        """
        if (found := self.get(key, expected)) != expected:
            raise ValueError(f"{self.architecture}.{key} is {found}, where only {expected} is supported")

    def check_all_taken(self) -> None:
        """:raises ValueError: if settings are left that nobody took"""
        if self._left:
            left = ", ".join(f"{self.architecture}.{key}" for key in sorted(self._left))
            raise ValueError(f"it has settings that are not understood: {left}")


def exact(value: Any) -> Any:
    """Undo the file's rounding of fractions to float32: 9.999999747378752e-06 was written as 1e-05."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value
