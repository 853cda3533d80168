"""gunicorn's configuration for front_app.py."""

import os
import signal
from typing import Any

import front.worker
from config import Settings
from front.request_reader import RequestReader

bind = f"127.0.0.1:{os.environ.get('PORT', '0')}"
worker_class = "front.worker.Worker"
threads = 100
worker_connections = Settings.from_environment().MAX_CONNECTIONS
keepalive = 15
control_socket_disable = True
# Tests need not fill as much memory as there may be filled.
front.worker.MAX_HELD = int(os.environ.get("MAX_HELD", front.worker.MAX_HELD))
feed = RequestReader.feed


def feed_or_fail(self: RequestReader, data: bytes) -> None:
    """Make the loop fail when somebody asks for it, as a fault in it would."""
    if data == b"fail":
        raise ValueError("on purpose")
    feed(self, data)


RequestReader.feed = feed_or_fail  # type: ignore[method-assign]


def post_worker_init(worker: Any) -> None:
    """Let SIGUSR1 set the events that requests wait for, when no thread is left to ask for it."""
    from tests.support.front_app import events

    def set_all(signum: int, frame: Any) -> None:
        for event in events.values():
            event.set()

    signal.signal(signal.SIGUSR1, set_all)
