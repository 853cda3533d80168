"""What clients have used in the last minute, and whether they may use more: a sliding window for each."""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MINUTE = 60  # seconds
# Clients remembered at a time. Beyond it, those that have used nothing for longest are forgotten.
MAX_CLIENTS = 10_000


class Exceeded(Exception):
    """There is no room left this minute."""

    def __init__(self, wait: float) -> None:
        """:param wait: seconds until there is"""
        super().__init__()
        self.wait = wait


@dataclass(frozen=True)
class Taken:
    """What was taken, and in which second."""

    second: int
    amount: int


@dataclass
class Use:
    """What was used in one second, and until when it counts."""

    amount: int
    end: float


class Window:
    """What one client has used of one kind, by the second: so it holds few numbers, however often it is used.

    What is used counts for a minute; what exceeds a minute's worth, for this many minutes more.
    """

    def __init__(self, limit: int) -> None:
        """:param limit: what may be used in a minute; at least 1"""
        self.limit = limit
        self._uses: dict[int, Use] = {}

    @property
    def used(self) -> int:
        return sum(use.amount for use in self._uses.values())

    def take(self, amount: int, least: int, now: float) -> Taken:
        """Use this much or, where that is too much, what is left, if that is at least ``least``.

        A client that has used nothing may take any amount: else some requests could never be made.

        :raises Exceeded: if not even ``least`` is left
        """
        if wait := self.wait(least, now):
            raise Exceeded(wait)
        left = self.limit - self.used
        return self.add(amount if amount <= left or not self._uses else left, now)

    def wait(self, amount: int, now: float) -> float:
        """Return after how many seconds there is room for this much; 0: now."""
        self.forget(now)
        used, wait = self.used, 0.0
        for use in sorted(self._uses.values(), key=lambda use: use.end):
            if used + amount <= self.limit:
                break
            used, wait = used - use.amount, use.end - now
        return wait

    def add(self, amount: int, now: float) -> Taken:
        """Use this much, whether there is room or not."""
        taken = Taken(int(now), amount)
        self._change(taken.second, amount)
        return taken

    def give_back(self, taken: Taken, amount: int) -> None:
        """Give back what was taken and not used. Once it no longer counts, that changes nothing."""
        if taken.second in self._uses:
            self._change(taken.second, -amount)

    def forget(self, now: float) -> bool:
        """Forget what no longer counts. Returns whether nothing is left."""
        self._uses = {second: use for second, use in self._uses.items() if use.end > now}
        return not self._uses

    def _change(self, second: int, amount: int) -> None:
        use = self._uses.setdefault(second, Use(0, second))
        use.amount += amount
        use.end = second + MINUTE * max(1.0, self.used / self.limit)
        if use.amount <= 0:
            del self._uses[second]


class Rates:
    """The windows of all clients. For any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_clients: int = MAX_CLIENTS) -> None:
        self._clock = clock
        self._max_clients = max_clients
        self._lock = threading.Lock()
        self._windows: OrderedDict[tuple[str, str], Window] = OrderedDict()  # most recently used last

    def __len__(self) -> int:
        """How many windows are kept."""
        return len(self._windows)

    def take(self, client: str, kind: str, limit: int, amount: int = 1, least: int | None = None) -> Taken:
        """Use this much of a kind; see ``Window.take``.

        :param least: the least that is of use; default: ``amount``
        :raises Exceeded: if there is not that much left
        """
        with self._lock:
            least = amount if least is None else min(least, amount)
            return self._window(client, kind, limit).take(amount, least, self._clock())

    def settle(self, client: str, kind: str, limit: int, taken: Taken, amount: int) -> None:
        """Correct what was taken to what was used in the end, which may be more."""
        with self._lock:
            window = self._window(client, kind, limit)
            if amount <= taken.amount:
                window.give_back(taken, taken.amount - amount)
            else:
                window.add(amount - taken.amount, self._clock())

    def wait(self, client: str, kind: str) -> float:
        """Return after how many seconds a client may use one more; 0: now."""
        with self._lock:
            window = self._windows.get((client, kind))
            return window.wait(1, self._clock()) if window is not None else 0

    def _window(self, client: str, kind: str, limit: int) -> Window:
        if (client, kind) not in self._windows:
            self._make_room()
            self._windows[client, kind] = Window(limit)
        self._windows.move_to_end((client, kind))
        return self._windows[client, kind]

    def _make_room(self) -> None:
        """Forget clients that have used nothing for a minute and, if that is not enough, the least recent ones."""
        now = self._clock()
        while self._windows:
            oldest, window = next(iter(self._windows.items()))
            if not window.forget(now) and len(self._windows) < self._max_clients:
                break
            del self._windows[oldest]


def whole_seconds(wait: float) -> int:
    """Return a wait as Retry-After has it."""
    return max(1, math.ceil(wait))
