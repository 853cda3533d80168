"""Those who wait for the swarm, as tests need them."""

import threading

from swarm.errors import Cancelled
from swarm.waiter import Waiter


class Canceller(Waiter):
    """Waits until somebody calls ``cancel``, from any thread."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def look(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("the step was cancelled")
