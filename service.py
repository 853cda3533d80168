"""What the transports share: settings, models and sessions, with one beginning and one end. Knows nothing of routes."""

import logging
import threading
from typing import TYPE_CHECKING

from config import Settings
from inference_sessions import InferenceSessions
from models import Models

if TYPE_CHECKING:
    from flask import Flask

log = logging.getLogger(__name__)

# For embedded servers to leave the swarm in order; a little more than each of them takes at most.
CLOSE_TIMEOUT = 15.0  # seconds


class Service:
    """The program behind the routes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models = Models(settings)
        self.sessions = InferenceSessions(settings.MAX_SESSIONS, settings.SESSION_TIMEOUT)
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
