"""A bounded number of places, and a bounded, fair queue before them. Knows nothing of what the places are for.

Fair is max-min: of those that wait, the client with the fewest places is served next; where too many wait, the one with
most requests among them gives way. Nothing is set aside: while nobody else wants one, a client may have all places.
"""

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from swarm.waiter import PATIENT, Waiter

# How often each waiter is looked after: hanging up is noticed within this time.
POLL = 0.1  # seconds
# How long the next in line may take to report something to its client before others pass it. Normally that takes
# milliseconds, unless the client takes no data.
GRACE = 0.5  # seconds


class QueueFull(Exception):
    """Too many wait already."""


class WaitedTooLong(Exception):
    """No place became free in time."""


@dataclass(eq=False)
class _Ticket:
    """A waiter in the queue. All but ``woken`` is guarded by the queue's lock."""

    client: str
    patient: bool
    waiter: Waiter
    busy_since: float | None = None  # time.monotonic() when its waiter began to look, which may take long
    position: int = 0  # in the queue, 1 for the next one
    served: bool = False
    refusal: str = ""  # why it was turned away, if it was
    woken: threading.Event = field(default_factory=threading.Event)  # set when something of this has changed


class FairQueue:
    """Places for a bounded number of users, shared fairly between clients; within one, first come, first served."""

    def __init__(self, places: int, *, max_waiting: int, timeout: float) -> None:
        """Make a queue with all places free.

        :param places: users at a time
        :param max_waiting: how many may wait
        :param timeout: seconds that each may wait
        """
        self.places = places
        self.max_waiting = max_waiting
        self.timeout = timeout
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()  # places of each client that has any
        self._waiting: list[_Ticket] = []  # in the order in which they came
        self._turn = 0  # counts the places handed over
        self._turns: dict[str, int] = {}  # of each client that has or wants a place: when it was given one last

    def take(
        self,
        *,
        client: str = "",
        patient: bool = False,
        waiter: Waiter = PATIENT,
        make_room: Callable[[Callable[[], bool]], None] | None = None,
    ) -> None:
        """Take a place, waiting for one if need be; it must be given back.

        Nobody waits for another's look: one that takes longer than ``GRACE`` is passed over meanwhile.

        :param client: whose share of the places it is
        :param patient: wait even if too many do already, and give way to nobody in that
        :param waiter: who waits
        :param make_room: called, without any lock, while no place is free; may give places back. Must not wait. It is
            given a function that tells whether one is still lacking, for places are given back at any time
        :raises QueueFull, WaitedTooLong, Cancelled: if there is no place
        """
        if make_room is not None and self.full:
            make_room(lambda: self.full)
        ticket = _Ticket(client, patient, waiter)
        deadline = time.monotonic() + self.timeout
        try:
            self._join(ticket)
            reported = 0
            while not self._is_served(ticket):
                waiter.look()
                if time.monotonic() > deadline:
                    raise WaitedTooLong(f"none became free within {self.timeout:.0f} s")
                if ticket.position != reported:
                    reported = ticket.position
                    waiter.position(reported)
                self._listen(ticket)
                ticket.woken.wait(POLL)
                ticket.woken.clear()
                if make_room is not None and self._lacks_place(ticket):
                    make_room(lambda: self._lacks_place(ticket))
        except BaseException:
            self._withdraw(ticket)
            raise

    @property
    def awaited(self) -> bool:
        """Whether anyone waits who is still connected."""
        with self._lock:
            return any(ticket.waiter.attended for ticket in self._waiting)

    @property
    def full(self) -> bool:
        """Whether all places are taken."""
        with self._lock:
            return self._taken >= self.places

    @property
    def held(self) -> Counter[str]:
        """How many places each client has."""
        with self._lock:
            return self._held.copy()

    def give_back(self, client: str = "") -> None:
        """Free a place, or hand it over to the next in line. Does not wait.

        :param client: the one that took it
        """
        with self._lock:
            self._let_go(client)
            self._serve()

    @property
    def _taken(self) -> int:
        return self._held.total()

    def _join(self, ticket: _Ticket) -> None:
        with self._lock:
            self._waiting.append(ticket)
            self._serve()
            if len(self._waiting) > self.max_waiting and not (ticket.served or ticket.patient):
                self._turn_one_away(ticket.client)

    def _is_served(self, ticket: _Ticket) -> bool:
        """Whether a ticket has its place; if not, its waiter looks now.

        :raises QueueFull: if it was turned away
        """
        with self._lock:
            if ticket.refusal:
                raise QueueFull(ticket.refusal)
            ticket.busy_since = time.monotonic()
            return ticket.served

    def _lacks_place(self, ticket: _Ticket) -> bool:
        """Whether a ticket waits, and no place is free for it."""
        with self._lock:
            return ticket in self._waiting and self._taken >= self.places

    def _listen(self, ticket: _Ticket) -> None:
        """Note that a ticket's waiter has looked; a place may have become free meanwhile."""
        with self._lock:
            ticket.busy_since = None
            if self._taken < self.places:
                self._serve()

    def _withdraw(self, ticket: _Ticket) -> None:
        with self._lock:
            if ticket.served:
                self._let_go(ticket.client)
            elif ticket in self._waiting:
                self._waiting.remove(ticket)
            self._forget(ticket.client)
            self._serve()

    def _let_go(self, client: str) -> None:
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
        self._forget(client)

    def _forget(self, client: str) -> None:
        """Forget when a client had its last turn, if it neither has nor wants a place: clients are without number."""
        if client not in self._held and not any(ticket.client == client for ticket in self._waiting):
            self._turns.pop(client, None)

    def _serve(self) -> None:
        """Under the lock: hand over the places that are free, and count again who is where in the queue."""
        while self._taken < self.places:
            since = time.monotonic() - GRACE
            here = (ticket for ticket in self._in_order() if ticket.busy_since is None or ticket.busy_since > since)
            ticket = next(here, None)
            if ticket is None or ticket.busy_since is not None:
                break  # whoever waits looks again within POLL
            self._waiting.remove(ticket)
            self._held[ticket.client] += 1
            self._turn += 1
            self._turns[ticket.client] = self._turn
            ticket.served = True
            ticket.woken.set()
        for position, ticket in enumerate(self._in_order(), 1):
            if ticket.position != position:
                ticket.position = position
                ticket.woken.set()

    def _in_order(self) -> list[_Ticket]:
        """Under the lock: the waiters, in the order in which they are served if no more clients come.

        It is max-min fair sharing in whole places: next is the client with fewest, and of several the one whose last
        turn was first; clients that have had none are taken in the order in which they came.
        """
        queues: dict[str, deque[_Ticket]] = {}
        for ticket in self._waiting:
            queues.setdefault(ticket.client, deque()).append(ticket)
        clients = [
            (self._held[client], self._turns.get(client, 0), number, client) for number, client in enumerate(queues)
        ]
        heapq.heapify(clients)
        order: list[_Ticket] = []
        while clients:
            held, _, number, client = clients[0]
            order.append(queues[client].popleft())
            if queues[client]:
                heapq.heapreplace(clients, (held + 1, self._turn + len(order), number, client))
            else:
                heapq.heappop(clients)
        return order

    def _turn_one_away(self, newcomer: str) -> None:
        """Under the lock: too many wait; turn away the newest of the client with most among them.

        Of clients with equally many it is the newcomer's: else equals would push each other out for ever.
        """
        counts = Counter(ticket.client for ticket in self._waiting if not ticket.patient)
        most = max(counts, key=lambda client: (counts[client], client == newcomer))
        ticket = next(ticket for ticket in reversed(self._waiting) if ticket.client == most and not ticket.patient)
        self._waiting.remove(ticket)
        ticket.refusal = f"{len(self._waiting)} wait already"
        if most != newcomer:
            ticket.refusal += ", one of them for a client with fewer requests"
        ticket.woken.set()
        self._serve()
