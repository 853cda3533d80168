"""What the clients of ``benchmarks.serving`` ask, and the times that they measure."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

TOPICS = [
    "a river",
    "two brothers",
    "the first ship to Mars",
    "a lighthouse keeper",
    "bread",
    "a lost letter",
    "winter",
]
PROMPT = "<|im_start|>user\nWrite a long story about {topic}.<|im_end|>\n<|im_start|>assistant\n"
ROOM = 64  # tokens that a prompt has at most


def prompt(number: int) -> str:
    """Return what a client asks, by its number."""
    return PROMPT.format(topic=TOPICS[number % len(TOPICS)])


@dataclass
class Load:
    """The times that one load of clients measured."""

    seconds: float = 0.0  # from the first request to the last token
    first: list[float] = field(default_factory=list)  # seconds to the first token, per client
    gaps: list[float] = field(default_factory=list)  # seconds between tokens
    tokens: int = 0

    def summary(self) -> dict[str, float]:
        """Return the reported figures: tokens/s, and milliseconds."""
        result = {"tokens_per_s": self.tokens / self.seconds}
        for name, values in (("ttft", self.first), ("itl", self.gaps)):
            if values:
                result[f"{name}_p50_ms"] = 1000 * percentile(values, 50)
                result[f"{name}_p99_ms"] = 1000 * percentile(values, 99)
        return result


class Answer:
    """One client's answer as it comes, token by token."""

    def __init__(self, load: Load, end: float) -> None:
        """:param end: when tokens no longer count, on ``time.perf_counter``"""
        self._load = load
        self._end = end
        self._started = self._last = time.perf_counter()
        self._count = 0

    def token(self) -> bool:
        """Note a token; return whether the client goes on: until the end, but for two tokens at least."""
        now = time.perf_counter()
        if self._count == 0:
            self._load.first.append(now - self._started)
        else:
            self._load.gaps.append(now - self._last)
        self._load.tokens += now < self._end
        self._count += 1
        self._last = now
        return now < self._end or self._count == 1


def percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
