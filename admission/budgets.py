"""Memory that requests share: each states how much it may need before it begins, and waits until that much is free."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator

from admission.fair_queue import POLL
from swarm.waiter import PATIENT, Waiter


class Exhausted(Exception):
    """Not enough became free in time."""


class Budget:
    """An amount of something that is held and given back. First come, first served."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = total
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, amount: int, timeout: float, waiter: Waiter = PATIENT) -> Iterator[None]:
        """Hold an amount for the time of the block.

        :param timeout: seconds to wait for it
        :param waiter: who waits for it
        :raises Exhausted: if it is not free in time
        :raises Cancelled: if the wait was ended
        """
        if amount > self.total:
            raise ValueError(f"{amount} are more than the {self.total} that there are")
        self._take(amount, timeout, waiter)
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()

    def _take(self, amount: int, timeout: float, waiter: Waiter) -> None:
        ticket, deadline = object(), time.monotonic() + timeout
        with self._changed:
            self._waiting.append(ticket)
        try:
            while not self._taken(ticket, amount):
                waiter.look()  # without the lock: it may take its time
                if time.monotonic() > deadline:
                    raise Exhausted(f"{amount} of {self.total} did not become free within {timeout:.0f} s")
                with self._changed:
                    self._changed.wait_for(lambda: self._is_next(ticket, amount), POLL)
        finally:
            with self._changed:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _taken(self, ticket: object, amount: int) -> bool:
        """Take the amount if its turn has come; return whether it had."""
        with self._changed:
            if not self._is_next(ticket, amount):
                return False
            self._free -= amount
            return True

    def _is_next(self, ticket: object, amount: int) -> bool:
        return self._waiting[0] is ticket and self._free >= amount
