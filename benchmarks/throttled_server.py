"""A server of the swarm that is slow at prompts: ``python -m benchmarks.throttled_server MODEL ...``

A tiny model computes a batch in a millisecond, in which nothing else happens. A large model's batch takes a fifth of a
second, in which users come and go; so does this server's.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import swarm.compat  # noqa: F401

import torch

from swarm.local import LocalServer
from swarm.server.blocks import Part, RaggedBlocks
from swarm.server.serve import main

ROWS = 48  # batches of this many tokens contain a part of a prompt
DELAY = 0.2  # seconds


class ThrottledServer(LocalServer):
    """A throttled server in the embedded swarm."""

    def command(self) -> list[str]:
        return [part.replace("swarm.server", "benchmarks.throttled_server") for part in super().command()]


def throttle() -> None:
    """Slow down batches that contain prompts."""
    forward = RaggedBlocks.forward

    def throttled(self: Any, hidden: torch.Tensor, parts: Sequence[Part], first: int, last: int) -> torch.Tensor:
        if len(hidden) >= ROWS:
            time.sleep(DELAY)
        return forward(self, hidden, parts, first, last)

    RaggedBlocks.forward = throttled  # type: ignore[method-assign]


if __name__ == "__main__":
    throttle()
    sys.exit(main())
