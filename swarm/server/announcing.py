"""How a server tells the swarm which blocks it serves, and that it goes."""

import logging

import swarm.compat  # noqa: F401

from hivemind import get_dht_time
from petals.data_structures import ServerState
from petals.server.server import ModuleAnnouncerThread
from petals.utils.dht import declare_active_modules

from swarm.server.restart import STOP_TIMEOUT

log = logging.getLogger(__name__)

# How soon a failed announcement is tried again.
ANNOUNCEMENT_DELAY = 2.0  # seconds


class Announcer(ModuleAnnouncerThread):
    """Petals' announcer. One announcement that fails does not end it: without announcements the server is forgotten."""

    def run(self) -> None:
        while True:
            try:
                return super().run()  # until the server goes
            except Exception as error:
                log.warning("the blocks could not be announced: %s: %s", type(error).__name__, error)
            if self.server_info.state == ServerState.OFFLINE:
                return
            self.trigger.wait(ANNOUNCEMENT_DELAY)

    def announce(self, state: ServerState) -> None:
        """Announce a state soon, or, if it is that the server goes, within a limit."""
        self.server_info.state = state
        self.trigger.set()
        if state == ServerState.OFFLINE:
            self.join(STOP_TIMEOUT / 2)

    def withdraw(self) -> None:
        """Announce at once that the server goes, whatever the announcer's thread does."""
        self.server_info.state = ServerState.OFFLINE
        self.server_info.next_pings = None
        try:
            declare_active_modules(self.dht, self.module_uids, self.server_info, get_dht_time() + self.expiration)
        except Exception as error:  # the dead part may be the DHT: then others find out when they ask
            log.warning("the swarm cannot be told that this server goes: %s: %s", type(error).__name__, error)

    def _ping_next_servers(self) -> None:
        try:
            super()._ping_next_servers()
        except Exception as error:  # what others announce is no reason not to announce oneself
            log.warning("the next servers cannot be measured: %s: %s", type(error).__name__, error)
