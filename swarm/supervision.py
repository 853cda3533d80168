"""Watching the parts of a process that others depend on, and starting the process again when one of them has died.

A part that died may have held a lock that others share, or a half of what they know: no part is started again by
itself. The process replaces its own program, keeps its number, its parent and its standard streams, and begins as it
began.
"""

import itertools
import logging
import multiprocessing.connection
import os
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from swarm.background import growing_delays

log = logging.getLogger(__name__)

# How often parts are looked at whose end wakes nobody.
PERIOD = 0.25  # seconds
# What dies at once again and again waits longer and longer. What has lived as long as a start takes is started again at
# once: its own start slows the repetition down, and while it is gone its users wait.
FIRST_BACKOFF, LAST_BACKOFF, HEALTHY_AFTER = 0.5, 30.0, 10.0  # seconds


def backoff(early_deaths: int) -> float:
    """Return for how many seconds to wait before the next start, after this many early deaths in a row."""
    delays = itertools.chain([0.0], growing_delays(FIRST_BACKOFF, LAST_BACKOFF))
    return next(itertools.islice(delays, early_deaths, None))


@dataclass(frozen=True)
class Part:
    """Something that others depend on."""

    name: str
    alive: Callable[[], bool]
    sentinel: int | None = None  # a file descriptor that becomes readable when it ends


class Watcher(threading.Thread):
    """Looks at all parts again and again, until one of them has died."""

    def __init__(self, parts: Callable[[], Iterable[Part]], beat: Callable[[], None]) -> None:
        """Make a watcher; it watches once it is started.

        :param parts: what there is to be watched at present
        :param beat: called after each look at which all were alive
        """
        super().__init__(name="watch-parts", daemon=True)
        self._parts = parts
        self._beat = beat
        self._stopping = threading.Event()
        self._on_death: Callable[[str], None] = log.error

    def watch(self, on_death: Callable[[str], None]) -> None:
        """Begin.

        :param on_death: called once, with the name of the part, from the watcher's thread
        """
        self._on_death = on_death
        self.start()

    def stop(self) -> None:
        """From now on parts may end. Does not wait."""
        self._stopping.set()

    def run(self) -> None:
        try:
            name = self._find_dead()
        except Exception:
            log.exception("the parts of this process cannot be watched")
            name = "the watcher"
        if name is not None and not self._stopping.is_set():
            self._on_death(name)

    def _find_dead(self) -> str | None:
        while not self._stopping.is_set():
            parts = list(self._parts())
            for part in parts:
                if not part.alive():
                    return part.name
            self._beat()
            sentinels = [part.sentinel for part in parts if part.sentinel is not None]
            multiprocessing.connection.wait(sentinels, timeout=PERIOD)
        return None


def replace_process(arguments: Iterable[str] = (), **environment: str) -> None:
    """Begin anew: run this program once more, in this process. Returns only if that fails.

    :param arguments: to add to its command line
    :param environment: variables to set
    :raises OSError: if it fails
    """
    for name in os.listdir("/dev/fd"):
        # Python's own are closed by the new program; what libraries have opened without a word would be kept.
        if (descriptor := int(name)) > sys.stderr.fileno():
            try:
                os.set_inheritable(descriptor, False)
            except OSError:
                continue  # the one that the folder was listed by
    command = [sys.executable, *sys.orig_argv[1:], *arguments]
    os.execve(sys.executable, command, {**os.environ, **environment})
