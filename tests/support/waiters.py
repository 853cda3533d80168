"""Those who wait, as tests need them."""

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
    """Somebody who waits until something is so."""

    def __init__(self, ended: Callable[[], bool]) -> None:
        self._is_over = ended

    def look(self) -> None:
        if self._is_over():
            raise Cancelled("nobody waits any more")


class Told(Ends):
    """Somebody who passes on what place they are told, and may stop to wait."""

    def __init__(self, tell: Callable[[int], None], ended: Callable[[], bool] = lambda: False) -> None:
        super().__init__(ended)
        self._tell = tell

    def position(self, place: int) -> None:
        self._tell(place)
