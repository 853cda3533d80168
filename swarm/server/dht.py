"""A server's DHT, a hivemind process that is waited for within a limit; and its ``p2pd``."""

from typing import Any

from swarm.compat import await_dht

import hivemind
import psutil
from hivemind.dht.protocol import ValidationError

from swarm.clock import clock_off

# The DHT answers within milliseconds in a local network and within seconds over the internet. After several timeouts
# in a row it counts as dead.
DHT_TIMEOUT, DHT_FAILURES = 30.0, 3  # seconds, times
# Joining takes seconds; hivemind's own limits end it within this time, unless its process has died.
JOIN_TIMEOUT = 120.0  # seconds


class PatientDHT(hivemind.DHT):
    """A DHT with a limit on every wait for its process."""

    unanswered = 0  # calls in a row that timed out

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Wait until the process has joined the swarm.

        :raises ConnectionError: if it ends meanwhile
        :raises TimeoutError: if it takes too long
        :raises ClockOff: if the swarm has another time
        """
        try:
            await_dht(self, self._ready, timeout or JOIN_TIMEOUT)
        except ValidationError as error:
            raise clock_off(error) or error from None

    def run_coroutine(self, coro: Any, return_future: bool = False) -> Any:
        """Run a coroutine in the DHT's process.

        :raises ConnectionError: if the process ends meanwhile
        :raises TimeoutError: if it takes too long
        """
        future = super().run_coroutine(coro, return_future=True)
        if return_future:
            return future
        try:
            result = await_dht(self, future, DHT_TIMEOUT)
        except TimeoutError:
            self.unanswered += not future.done()  # else the coroutine itself raised it
            raise
        self.unanswered = 0
        return result

    def is_answering(self) -> bool:
        return self.unanswered < DHT_FAILURES


def find_daemon(pid: int) -> psutil.Process:
    """Return the p2pd of a DHT process.

    :raises ProcessLookupError: if it has none
    """
    for child in psutil.Process(pid).children():
        if "p2pd" in child.name():
            return child
    raise ProcessLookupError("the DHT process has no p2pd")


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it has just ended
        return False
