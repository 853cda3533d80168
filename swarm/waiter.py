"""Whoever waits: for a place, for a session, for the swarm to compute a step."""

import threading

from swarm.errors import Cancelled


class Waiter:
    """Somebody who waits, as seen by what they wait for. This one waits for as long as it takes; others say more.

    What makes others wait looks after them: it calls ``look`` at least every tenth of a second, from the thread that
    waits. To look may do more than to look: it may send news to a client, and read what the client has sent.
    """

    @property
    def attended(self) -> bool:
        """Whether somebody would have the result now. Never waits: queues ask under their locks."""
        return True

    def look(self) -> None:
        """Look whether the wait goes on.

        :raises Cancelled: if it does not
        """

    def position(self, place: int) -> None:
        """Be told the place in a queue, 1 for the next one, whenever it changes."""


PATIENT = Waiter()


class Until(Waiter):
    """Somebody who waits until an event is set, and no longer than somebody else does."""

    def __init__(self, ended: threading.Event, waiter: Waiter = PATIENT) -> None:
        self._ended = ended
        self._waiter = waiter

    @property
    def attended(self) -> bool:
        return self._waiter.attended

    def look(self) -> None:
        if self._ended.is_set():
            raise Cancelled("nobody waits for this any more")
        self._waiter.look()

    def position(self, place: int) -> None:
        self._waiter.position(place)
