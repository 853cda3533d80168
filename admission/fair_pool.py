"""A bounded number of threads for the jobs of many parties, which take turns. Knows nothing of the jobs."""

import logging
import threading
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)

# A thread without a job ends after this time: starting one costs less than a tenth of a millisecond.
PATIENCE = 10.0  # seconds


class FairPool:
    """Threads that are started when they are needed. Jobs that find none wait: one job of each party by turns."""

    def __init__(self, name: str, size: int) -> None:
        """Make a pool without threads.

        :param size: threads at most
        """
        self.size = size
        self._name = name
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[Callable[[], None]]] = {}  # by party, the next one first
        self._jobs = 0  # that wait
        self._threads = 0
        self._idle = 0  # threads that wait

    @property
    def working(self) -> int:
        """How many threads have a job."""
        return self._threads - self._idle

    def submit(self, party: str, job: Callable[[], None]) -> None:
        """Have a job done. Does not wait."""
        with self._changed:
            self._waiting.setdefault(party, deque()).append(job)
            self._jobs += 1
            if self._jobs <= self._idle or self._threads == self.size:
                self._changed.notify()
                return
            self._threads += 1
        try:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        except RuntimeError:  # the system has no more
            with self._changed:
                self._threads -= 1
                if not self._threads:
                    raise

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except Exception:
                log.exception("a job failed")

    def _next(self) -> Callable[[], None] | None:
        """Wait for a job, of the party whose turn it is; None: the thread is no longer needed."""
        with self._changed:
            self._idle += 1
            found = self._changed.wait_for(lambda: self._jobs, PATIENCE)
            self._idle -= 1
            if not found:
                self._threads -= 1
                return None
            party = next(iter(self._waiting))
            jobs = self._waiting.pop(party)
            job = jobs.popleft()
            if jobs:
                self._waiting[party] = jobs  # behind the others
            self._jobs -= 1
            return job
