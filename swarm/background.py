"""Loops that go on whatever happens in one of their turns: expiring sessions, reading the swarm, watching processes."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger(__name__)

# What has just failed may work the next moment; what keeps failing is tried twice a minute, which costs nothing.
FIRST_DELAY, LAST_DELAY = 0.5, 30.0  # seconds


def growing_delays(first: float, last: float) -> Iterator[float]:
    """Yield seconds to wait between tries: each twice the one before, up to ``last``."""
    delay = min(first, last)
    while True:
        yield delay
        delay = min(2 * delay, last)


class Loop:
    """A step that a thread of its own does again and again. A step that fails is logged, and tried again more slowly.

    ``name``, ``age`` and ``retry_in`` may be read from any thread, and never wait.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], object],
        period: float,
        *,
        first_delay: float = FIRST_DELAY,
        last_delay: float = LAST_DELAY,
        expected: tuple[type[Exception], ...] = (),
        wake: threading.Event | None = None,
    ) -> None:
        """Make a loop that is not started yet.

        :param period: seconds between two steps
        :param first_delay, last_delay: seconds between two steps that fail: at first, and at most
        :param expected: failures whose message says enough, so that they are logged without their traceback
        :param wake: set by whoever wants the next step at once
        """
        self.name = name
        self._step = step
        self._period = period
        self._delays = (first_delay, last_delay)
        self._expected = expected
        self._wake = wake or threading.Event()
        self._stopped = threading.Event()
        self._failures = 0  # in a row
        self._done_at = time.monotonic()
        self._next_at: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._starting = threading.Lock()

    @property
    def age(self) -> float:
        """Seconds since a step last ended well, or since the beginning."""
        return time.monotonic() - self._done_at

    @property
    def retry_in(self) -> float | None:
        """Seconds until what has failed is tried again; None while it is being tried, or if nothing has failed."""
        next_at = self._next_at
        return None if next_at is None else max(0.0, next_at - time.monotonic())

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def start(self) -> "Loop":
        """Begin, if it has not begun yet."""
        with self._starting:
            if self._thread.ident is None:
                self._thread.start()
        return self

    def stop(self) -> None:
        """Do no further step. Does not wait for the running one."""
        self._stopped.set()
        self._wake.set()

    def join(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds until the thread has ended; at once if it never began, or is this one."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        delays = growing_delays(*self._delays)
        while not self.stopped:
            try:
                self._step()
            except Exception as error:  # of whatever kind: those who depend on this loop must not be left alone
                delay = next(delays)
                self._failures += 1
                self._tell(error, delay)
                self._next_at = time.monotonic() + delay
            else:
                delay, delays = self._period, growing_delays(*self._delays)
                self._failures, self._done_at = 0, time.monotonic()
            self._wake.wait(delay)
            self._wake.clear()
            self._next_at = None

    def _tell(self, error: Exception, delay: float) -> None:
        """Log a failure: the first of a row, the second, the fourth, the eighth ..., for a row may be long."""
        if self.stopped or self._failures & (self._failures - 1):
            return
        known = isinstance(error, self._expected) or self._failures > 1
        log.error(
            "%s failed%s, again in %.1f s: %s",
            self.name,
            f" {self._failures} times" if self._failures > 1 else "",
            delay,
            str(error) or type(error).__name__,
            exc_info=None if known else error,
        )


def forever(name: str, step: Callable[[], object], period: float, **options: Any) -> Loop:
    """Start a ``Loop``, which takes the same arguments, and return it."""
    return Loop(name, step, period, **options).start()
