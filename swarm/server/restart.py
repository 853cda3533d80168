"""End a server, or restart it in the same process with the state that it must keep."""

import contextlib
import logging
import os
import threading
import time

from swarm import supervision
from swarm.process import kill_descendants

log = logging.getLogger(__name__)

# How long an orderly stop may take before this process and all its descendants are killed.
STOP_TIMEOUT = 10.0  # seconds
# Passed on across a restart: how many times in a row the server has died early.
EARLY_DEATHS = "SWARM_SERVER_EARLY_DEATHS"
started = time.monotonic()


def begin() -> None:
    """Count this process's life from now on: it was forked from one that is older."""
    global started
    started = time.monotonic()


def start_again(stop: threading.Event) -> None:
    """Restart this process, with a growing delay if it keeps dying early.

    Returns only if ``stop`` is set during the delay.
    """
    lived = time.monotonic() - started
    deaths = 0 if lived > supervision.HEALTHY_AFTER else int(os.environ.get(EARLY_DEATHS, "0")) + 1
    if stop.wait(supervision.backoff(deaths)):
        return
    try:
        supervision.replace_process(**{EARLY_DEATHS: str(deaths)})
    except OSError:
        log.exception("cannot restart this server; ending")
        die()


def bury_children() -> None:
    """Reap dead children of the program that this process ran before; otherwise they stay zombies."""
    with contextlib.suppress(ChildProcessError):  # none is left
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def die() -> None:
    """End this process and all its descendants, now."""
    kill_descendants()
    os._exit(1)
