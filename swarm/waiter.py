"""Waiters: how a wait for a place, a session or a step of the swarm checks on its caller."""

import threading

from swarm.errors import Cancelled


class Waiter:
    """The caller of a wait, as the wait sees it. This one waits as long as it takes; subclasses may end the wait.

    A wait must call ``look`` at least every tenth of a second, from the waiting thread. ``look`` may do more than
    check: it may send news to a client and read what the client has sent.
    """

    @property
    def attended(self) -> bool:
        """Whether a client is there to receive the result. Never waits: queues ask under their locks."""
        return True

    def look(self) -> None:
        """Check whether the wait should continue.

        :raises Cancelled: if it should not
        """

    def position(self, place: int) -> None:
        """Receive the place in a queue, 1 for the next, whenever it changes."""


PATIENT = Waiter()


class Relay(Waiter):
    """Waits on behalf of another waiter; subclasses add reasons to give up earlier."""

    def __init__(self, waiter: Waiter) -> None:
        self._waiter = waiter

    @property
    def attended(self) -> bool:
        return self._waiter.attended

    def look(self) -> None:
        self._waiter.look()

    def position(self, place: int) -> None:
        self._waiter.position(place)


class Until(Relay):
    """Waits until an event is set, and no longer than another waiter does."""

    def __init__(self, ended: threading.Event, waiter: Waiter = PATIENT) -> None:
        super().__init__(waiter)
        self._ended = ended

    def look(self) -> None:
        if self._ended.is_set():
            raise Cancelled("nobody waits for this any more")
        super().look()
