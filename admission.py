"""A bounded number of places, and a bounded, fair queue before them. Knows nothing of what the places are for."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from swarm.errors import Cancelled

# How often somebody who waits looks whether they still want to: hanging up is noticed within this time.
POLL = 0.1  # seconds


class QueueFull(Exception):
    """Too many wait already."""


class WaitedTooLong(Exception):
    """No place became free in time."""


@dataclass(eq=False)
class _Ticket:
    """Somebody who waits."""

    present: Callable[[], bool]  # whether they are still there to be served


class FairQueue:
    """Places for a bounded number of users: who comes first is served first."""

    def __init__(self, places: int, *, max_waiting: int, timeout: float) -> None:
        """Make a queue with all places free.

        :param places: users at a time
        :param max_waiting: how many may wait
        :param timeout: seconds that each may wait
        """
        self.places = places
        self.max_waiting = max_waiting
        self.timeout = timeout
        self._taken = 0
        self._waiting: deque[_Ticket] = deque()
        self._changed = threading.Condition()

    def take(
        self,
        *,
        patient: bool = False,
        cancelled: Callable[[], bool] | None = None,
        on_position: Callable[[int], None] | None = None,
        make_room: Callable[[], None] | None = None,
        present: Callable[[], bool] = lambda: True,
    ) -> None:
        """Take a place, waiting for one if need be; it must be given back.

        :param patient: wait even if too many do already
        :param cancelled: looked at while waiting; ends it when it returns true
        :param on_position: told the place in the queue, 1 for the next one, whenever it changes
        :param present: whether who waits is still there; see ``awaited``. Called under the queue's lock
        :param make_room: called, without any lock, while no place is free; may give places back
        :raises QueueFull, WaitedTooLong, Cancelled: if there is no place
        """
        ticket, deadline, told = _Ticket(present), time.monotonic() + self.timeout, 0
        if self._full() and make_room is not None:
            make_room()
        with self._changed:
            if not self._waiting and self._taken < self.places:
                self._taken += 1
                return
            if len(self._waiting) >= self.max_waiting and not patient:
                raise QueueFull(f"{len(self._waiting)} wait already")
            self._waiting.append(ticket)
        try:
            while not self._try_take(ticket):
                if cancelled is not None and cancelled():
                    raise Cancelled("the wait for a place was given up")
                if time.monotonic() > deadline:
                    raise WaitedTooLong(f"none became free within {self.timeout:.0f} s")
                if make_room is not None:
                    make_room()
                position = self._position(ticket)
                if on_position is not None and position != told:
                    on_position(position)
                    told = position
                with self._changed:
                    if self._waiting[0] is not ticket or self._taken >= self.places:
                        self._changed.wait(POLL)
        except BaseException:
            with self._changed:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                self._changed.notify_all()
            raise

    @property
    def awaited(self) -> bool:
        """Whether somebody waits who is there."""
        with self._changed:
            return any(ticket.present() for ticket in self._waiting)

    def _full(self) -> bool:
        with self._changed:
            return self._taken >= self.places

    def _try_take(self, ticket: _Ticket) -> bool:
        with self._changed:
            if self._waiting[0] is not ticket or self._taken >= self.places:
                return False
            self._waiting.popleft()
            self._taken += 1
            self._changed.notify_all()
            return True

    def _position(self, ticket: _Ticket) -> int:
        with self._changed:
            return self._waiting.index(ticket) + 1

    def give_back(self) -> None:
        """Free a place."""
        with self._changed:
            self._taken -= 1
            self._changed.notify_all()
