"""Reports the progress of a model's preparation."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The functions to report progress to. By default they do nothing."""

    say: Callable[[str], None] = lambda line: None  # the current activity: "SmolLM2-135M-Instruct: block 12 of 30"
    done: Callable[[float], None] = lambda share: None  # the share that is done, 0 to 1, where known

    def of(self, name: str) -> "Progress":
        """Return a Progress whose lines begin with a name."""
        return Progress(lambda line: self.say(f"{name}: {line}"), self.done)
