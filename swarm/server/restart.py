"""How a server ends, and begins as it began: in the same process, with what it has to know of the time before."""

import contextlib
import logging
import os
import threading
import time

from swarm import supervision
from swarm.process import kill_descendants

log = logging.getLogger(__name__)

# How long an orderly stop may take before everything below this process is killed.
STOP_TIMEOUT = 10.0  # seconds
# What this process tells the program that it begins again with: how many before it died early, one after the other.
EARLY_DEATHS = "SWARM_SERVER_EARLY_DEATHS"
STARTED = time.monotonic()


def start_again(stop: threading.Event) -> None:
    """Begin as this process began, but later and later if it died early again and again.

    Returns only if ``stop`` is set meanwhile.
    """
    lived = time.monotonic() - STARTED
    deaths = 0 if lived > supervision.HEALTHY_AFTER else int(os.environ.get(EARLY_DEATHS, "0")) + 1
    if stop.wait(supervision.backoff(deaths)):
        return
    try:
        supervision.replace_process(**{EARLY_DEATHS: str(deaths)})
    except OSError:
        log.exception("this server cannot begin anew, and ends")
        die()


def bury_children() -> None:
    """Take note of the deaths of processes that this process had as another program: nobody else would, for good."""
    with contextlib.suppress(ChildProcessError):  # there are no more
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def die() -> None:
    """End this process and everything below it, now."""
    kill_descendants()
    os._exit(1)
