"""Threads for requests, and the requests that wait for one."""

from collections import deque
from concurrent.futures import Executor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Lane(Generic[Item]):
    """Clients take turns, however many requests each of them has waiting. Not for use from several threads."""

    def __init__(self, pool: Executor, threads: int) -> None:
        """Make a lane.

        :param threads: how many of its requests may be computed at a time
        """
        self.pool = pool
        self.threads = threads
        self.running = 0
        self._waiting: dict[str, deque[Item]] = {}  # in the order of the clients' turns

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, client: str, item: Item) -> None:
        self._waiting.setdefault(client, deque()).append(item)

    def take(self) -> Item | None:
        """Return what is to be computed next, and count it as running; None if nothing waits, or no thread is free."""
        if self.running >= self.threads or not self._waiting:
            return None
        client = next(iter(self._waiting))
        queue = self._waiting.pop(client)
        item = queue.popleft()
        if queue:
            self._waiting[client] = queue  # behind the others
        self.running += 1
        return item

    def remove(self, item: Item) -> None:
        """Remove one that waits."""
        client = next(client for client, queue in self._waiting.items() if item in queue)
        self._waiting[client].remove(item)
        if not self._waiting[client]:
            del self._waiting[client]

    def newest_of_heaviest(self) -> Item:
        """Return the last one of the client that has most waiting."""
        return max(self._waiting.values(), key=len)[-1]
