"""Computing for all threads that wait at the same time."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")


class Together(Generic[Result]):
    """Computes something of a few rows for each of many threads, and of the rows of all that wait together.

    Reading large weights takes most of the time: 32 rows at once take hardly longer than one. The thread that finds
    nobody computing computes for all waiting threads (flat combining, Hendler et al., SPAA 2010); no thread waits for
    a batch to fill.
    """

    def __init__(self, compute: Callable[[torch.Tensor], Sequence[Result]]) -> None:
        """:param compute: takes rows, [n, ...], and returns a result for each"""
        self._compute = compute
        self.waiting: deque[tuple[torch.Tensor, Future[Result]]] = deque()
        self.computing = threading.Lock()

    def __call__(self, row: torch.Tensor) -> Result:
        """Return the result of a row. Thread-safe. All rows have the same shape."""
        return self.each([row])[0]

    def each(self, rows: Iterable[torch.Tensor]) -> list[Result]:
        """Return the results of several rows. Thread-safe."""
        mine = [(row, Future[Result]()) for row in rows]
        self.waiting.extend(mine)
        with self.computing:
            if not all(future.done() for _, future in mine):
                self._compute_waiting()
        return [future.result() for _, future in mine]

    def _compute_waiting(self) -> None:
        waiting = [self.waiting.popleft() for _ in range(len(self.waiting))]
        try:
            results = self._compute(torch.stack([row for row, _ in waiting]))
        except Exception:  # out of memory, or one of them cannot be computed; computing each alone shows which
            for row, future in waiting:
                self._compute_alone(row, future)
        except BaseException as error:
            for _, future in waiting:
                future.set_exception(error)
            raise
        else:
            for (_, future), result in zip(waiting, results, strict=True):
                future.set_result(result)

    def _compute_alone(self, row: torch.Tensor, future: "Future[Result]") -> None:
        try:
            future.set_result(self._compute(row[None])[0])
        except BaseException as error:  # raised in the thread that waits for it
            future.set_exception(error)
