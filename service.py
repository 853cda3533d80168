"""What the transports share: settings, models and sessions, with one beginning and one end. Knows nothing of routes."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from admission.access import Access, Caller
from admission.fair_queue import FairQueue, QueueFull, WaitedTooLong
from config import Settings
from errors import ModelNotFound, TooManyRequests
from inference_sessions import InferenceSessions
from models.loading import Models, ServedModel
from swarm.background import Loop
from swarm.client.warm_sessions import SessionMemory

if TYPE_CHECKING:
    from flask import Flask

    from swarm.client.model import SwarmModel

log = logging.getLogger(__name__)

# For embedded servers to leave the swarm in order; a little more than each of them takes at most.
CLOSE_TIMEOUT = 15.0  # seconds


class Service:
    """The program behind the routes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.access = Access(settings)
        self.models = Models(settings)
        self.sessions = InferenceSessions(
            settings.MAX_SESSIONS,
            settings.SESSION_TIMEOUT,
            max_waiting=settings.MAX_QUEUE,
            queue_timeout=settings.QUEUE_TIMEOUT,
            resume_timeout=settings.RESUME_TIMEOUT,
            max_waiting_per_session=settings.MAX_WAITING_PER_SESSION,
            memory=SessionMemory(settings.WARM_SESSIONS, settings.WARM_TOKENS, settings.WARM_TIMEOUT),
        )
        self.models.make_room = self.sessions.free_cache
        self._generations = FairQueue(
            settings.MAX_CONCURRENT_GENERATIONS, max_waiting=settings.MAX_QUEUE, timeout=settings.QUEUE_TIMEOUT
        )
        self.ending = threading.Event()  # set when the program is told to end
        self._lock = threading.Lock()
        self._started = False
        self._closing = False
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to load the models; may be called any number of times."""
        with self._lock:
            if self._started or self._closing:
                return
            self._started = True
        self.models.start()
        self.sessions.start()

    @contextlib.contextmanager
    def generating(
        self,
        caller: Caller,
        cancelled: Callable[[], bool],
        on_position: Callable[[int], None] | None = None,
        *,
        present: Callable[[], bool] = lambda: True,
    ) -> Iterator[None]:
        """Have a place among the answers that are computed at a time; wait for it in a fair queue.

        A request takes, in this order, its place among those of its key (``Caller.generating``), its session, and
        this one. Who has a later one never waits for an earlier one, so that no two wait for each other; and a key that
        is at its limit is told so at once, and not after waiting for a busy session.

        :param caller: for whom; of whose share the place is
        :param cancelled: looked at while waiting; ends it when it returns true
        :param on_position: told the place in the queue, whenever it changes
        :param present: whether the caller is still there; for those who are not, nobody else makes room
        :raises TooManyRequests: if too many wait already, or no place becomes free in time
        :raises Cancelled: if the wait was ended
        """
        client = caller.client
        try:
            self._generations.take(client=client, cancelled=cancelled, on_position=on_position, present=present)
        except (QueueFull, WaitedTooLong) as error:
            places = self._generations.places
            raise TooManyRequests(f"{places} answers are computed at a time: {error}") from None
        try:
            yield
        finally:
            self._generations.give_back(client)

    @property
    def loops(self) -> list[Loop]:
        """What runs in the background for as long as the program does."""
        return [*self.sessions.loops, *self.models.loops]

    def others_wait(self) -> bool:
        """Whether somebody who is there waits for a session, or for an answer's turn."""
        return self.sessions.awaited or self._generations.awaited

    def model(self, caller: Caller, name: str | None) -> "SwarmModel":
        """Return a model for a caller; None: the default model.

        :raises ModelNotFound, ModelNotAllowed, ModelUnavailable, ModelNotReady: if there is none
        """
        return self.models.get(self.find(caller, name or self.settings.default_model).config.name)

    def find(self, caller: Caller, name: str) -> ServedModel:
        """Return a model in whatever state it is. Others than the caller's are not told of.

        :raises ModelNotFound, ModelNotAllowed: if there is none
        """
        if name not in self.models.served:
            names = ", ".join(filter(caller.may_use, self.models.served)) or "none for you"
            raise ModelNotFound(f"no model {name!r} is served here; there are: {names}")
        caller.check_model(name)
        return self.models.find(name)

    def log_text(self, kind: str, text: str) -> None:
        """Log a prompt or an answer, if the operator wants that."""
        if self.settings.LOG_TEXTS:
            log.info("%s: %r", kind, text)

    def close(self, grace: float | None = None) -> None:
        """End: take nothing new, let running answers finish, close everything. Whoever calls second waits as well.

        :param grace: seconds that running answers have; default: ``SHUTDOWN_TIMEOUT``
        """
        grace = self.settings.SHUTDOWN_TIMEOUT if grace is None else grace
        self.ending.set()
        with self._lock:
            first, self._closing = not self._closing, True
        if not first:
            self._closed.wait(self.settings.SHUTDOWN_TIMEOUT + CLOSE_TIMEOUT)
            return
        try:
            if self._started:
                log.info("ending; running answers have %.0f s to finish", grace)
                self.sessions.shut_down(grace)
                self.models.close()
        finally:
            self._closed.set()


def get_service(app: "Flask") -> Service:
    """Return the service of an app."""
    return app.extensions["petals_chat"]
