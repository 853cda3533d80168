"""How far the preparation of a model is, for whoever waits for it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Whom to tell. By default nobody."""

    say: Callable[[str], None] = lambda line: None  # what is being done: "SmolLM2-135M-Instruct: block 12 of 30"
    done: Callable[[float], None] = lambda share: None  # how much of it is done, 0 to 1, where that is known

    def of(self, name: str) -> "Progress":
        """Return one whose lines begin with a name."""
        return Progress(lambda line: self.say(f"{name}: {line}"), self.done)
