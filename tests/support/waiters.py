"""Waiters for tests."""

import threading
from collections.abc import Callable

from swarm.errors import Cancelled
from swarm.waiter import Until, Waiter


class Canceller(Until):
    """Waits until somebody calls ``cancel``, from any thread."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()
        super().__init__(self._cancelled)

    def cancel(self) -> None:
        self._cancelled.set()


class Ends(Waiter):
    """A waiter that waits until a condition holds."""

    def __init__(self, ended: Callable[[], bool]) -> None:
        self._is_over = ended

    def look(self) -> None:
        if self._is_over():
            raise Cancelled("nobody waits any more")


class CallbackWaiter(Ends):
    """A waiter that passes its place in the queue on, and may stop waiting."""

    def __init__(self, on_position: Callable[[int], None], ended: Callable[[], bool] = lambda: False) -> None:
        super().__init__(ended)
        self._on_position = on_position

    def position(self, place: int) -> None:
        self._on_position(place)
