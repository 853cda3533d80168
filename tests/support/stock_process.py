"""Released petals, on the packages it was released with, in a process of its own."""

import contextlib
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.support.processes import ROOT

PYTHON = ROOT / ".venv-stock" / "bin" / "python"
SCRIPT = ROOT / "tests" / "support" / "stock.py"
ANSWER_TIMEOUT = 120.0  # seconds


class Stock:
    """A process of released petals; its messages go to a file."""

    def __init__(self, command: str, log: Path) -> None:
        with log.open("wb") as messages:
            self.process = subprocess.Popen(
                [PYTHON, "-I", "-W", "ignore", SCRIPT, command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                cwd=log.parent,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                text=True,
                start_new_session=True,
            )

    def tell(self, tasks: list[dict[str, Any]]) -> None:
        """Give the process its tasks: a line, for processes forked from this one may hold the pipe open."""
        assert self.process.stdin is not None
        print(json.dumps(tasks), file=self.process.stdin, flush=True)

    def answer(self) -> Any:
        """Return the line that it writes. Its end is not awaited: ``p2pd`` may outlive it, and hold the pipe open."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], ANSWER_TIMEOUT)[0], "it does not answer"
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        """End the process and all below it: released petals leaves some behind when it is asked to end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
