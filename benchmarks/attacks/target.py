"""The program that is attacked, and the list of attacks."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from benchmarks.attacks.client import Client
from tests.support.processes import Program

KEY = "a secret of the tests"
# Settings under which an attack is tried; the defaults, but in float32: there the answer to a question does not depend
# on who else asks at the same time.
OPEN: Mapping[str, str] = {"TORCH_DTYPE": "float32"}
WITH_KEY: Mapping[str, str] = {**OPEN, "API_KEYS": KEY}


@dataclass
class Target:
    """A running program."""

    program: Program
    key: str = ""
    _never: threading.Event = field(default_factory=threading.Event)

    @property
    def client(self) -> Client:
        return Client(self.program.url, key=self.key)

    @property
    def stranger(self) -> Client:
        """Somebody without a key."""
        return Client(self.program.url)

    @property
    def worker(self) -> psutil.Process:
        """The app's process."""
        return psutil.Process(self.program.process.pid).children()[0]

    def memory(self) -> int:
        """Return the app's resident memory, in MiB."""
        return self.worker.memory_info().rss >> 20

    def wait(self, seconds: float) -> None:
        """Let time pass, while the bystanders ask."""
        self._never.wait(seconds)

    def together(self, runs: Sequence[Callable[[], None]], timeout: float = 180.0) -> None:
        """Run functions at the same time."""
        threads = [threading.Thread(target=run, daemon=True) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=timeout)


@dataclass(frozen=True)
class Attack:
    """Something that is done to the program."""

    name: str
    run: Callable[[Target], str | None]  # returns what is wrong, beside what the bystanders see; None if nothing
    settings: Mapping[str, str]
    answer_limit: float | None  # seconds that a bystander's answer may take; None: as always


ATTACKS: list[Attack] = []


def attack(
    name: str, settings: Mapping[str, str] = OPEN, *, answer_limit: float | None = None
) -> Callable[[Callable[[Target], str | None]], Callable[[Target], str | None]]:
    """Add a function to the attacks."""

    def add(run: Callable[[Target], str | None]) -> Callable[[Target], str | None]:
        ATTACKS.append(Attack(name, run, settings, answer_limit))
        return run

    return add
