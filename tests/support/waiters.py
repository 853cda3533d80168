"""Those who wait, as tests need them."""

from collections.abc import Callable

from swarm.errors import Cancelled
from swarm.waiter import Waiter


class Ends(Waiter):
    """Somebody who waits until something is so."""

    def __init__(self, ended: Callable[[], bool]) -> None:
        self._ended = ended

    def look(self) -> None:
        if self._ended():
            raise Cancelled("nobody waits any more")


class Told(Ends):
    """Somebody who passes on what place they are told, and may stop to wait."""

    def __init__(self, tell: Callable[[int], None], ended: Callable[[], bool] = lambda: False) -> None:
        super().__init__(ended)
        self.position = tell  # type: ignore[method-assign]
