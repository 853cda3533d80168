"""Threads for requests, and the requests that wait for one."""

from collections import Counter, deque
from concurrent.futures import Executor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Lane(Generic[Item]):
    """Clients take turns, however many requests each has waiting. Not for use from several threads.

    One client alone does not get the last tenth of the threads, so that the first request of another one need not wait
    until something ends; 64 clients behind one address, as in the benchmarks, still have all that they can use.
    """

    def __init__(self, pool: Executor, threads: int) -> None:
        """Make a lane.

        :param threads: how many of its requests may be computed at a time
        """
        self.pool = pool
        self._threads = threads
        self._share = threads - threads // 10  # of one client
        self._waiting: dict[str, deque[Item]] = {}  # in the order of the clients' turns
        self._running: dict[Item, str] = {}
        self._counts: Counter[str] = Counter()  # of those that run, by client

    def __len__(self) -> int:
        """Return how many wait."""
        return sum(map(len, self._waiting.values()))

    def add(self, client: str, item: Item) -> None:
        self._waiting.setdefault(client, deque()).append(item)

    def take(self) -> Item | None:
        """Return what is to be computed next; None if nothing waits, or nothing that there is a thread for.

        Call :meth:`done` with it when it has been computed.
        """
        if len(self._running) >= self._threads:
            return None
        client = next((client for client in self._waiting if self._counts[client] < self._share), None)
        if client is None:
            return None
        queue = self._waiting.pop(client)
        item = queue.popleft()
        if queue:
            self._waiting[client] = queue  # behind the others
        self._running[item] = client
        self._counts[client] += 1
        return item

    def done(self, item: Item) -> None:
        client = self._running.pop(item)
        self._counts[client] -= 1
        if not self._counts[client]:
            del self._counts[client]

    def remove(self, item: Item) -> None:
        """Remove one that waits."""
        client = next(client for client, queue in self._waiting.items() if item in queue)
        self._waiting[client].remove(item)
        if not self._waiting[client]:
            del self._waiting[client]

    def newest_of_heaviest(self) -> Item:
        """Return the last one of the client that has most waiting."""
        return max(self._waiting.values(), key=len)[-1]
