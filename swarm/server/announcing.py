"""How a server announces to the swarm which blocks it serves, and that it leaves."""

import logging
from typing import Any

import swarm.compat  # noqa: F401

from hivemind import get_dht_time
from petals.data_structures import ServerState
from petals.server.server import ModuleAnnouncerThread
from petals.utils.dht import declare_active_modules

from swarm.server.restart import STOP_TIMEOUT
from swarm.shape import attention_share

log = logging.getLogger(__name__)

# How soon a failed announcement is retried.
ANNOUNCEMENT_DELAY = 2.0  # seconds


class Announcer(ModuleAnnouncerThread):
    """Petals' announcer, which survives a failed announcement: without announcements the server is forgotten."""

    bytes_per_token: int

    def __init__(self, *args: Any, block_config: Any, **options: Any) -> None:
        super().__init__(*args, block_config=block_config, **options)
        # Petals takes all heads to be hidden size wide.
        self.bytes_per_token = int(self.bytes_per_token * attention_share(block_config))

    def run(self) -> None:
        while True:
            try:
                return super().run()  # until the server leaves
            except Exception as error:
                log.warning("cannot announce the blocks: %s: %s", type(error).__name__, error)
            if self.server_info.state == ServerState.OFFLINE:
                return
            self.trigger.wait(ANNOUNCEMENT_DELAY)

    def announce(self, state: ServerState) -> None:
        """Announce a state soon. If it is OFFLINE, wait for the announcer, within a limit."""
        self.server_info.state = state
        self.trigger.set()
        if state == ServerState.OFFLINE:
            self.join(STOP_TIMEOUT / 2)

    def withdraw(self) -> None:
        """Announce at once that the server leaves, whatever the announcer's thread does."""
        self.server_info.state = ServerState.OFFLINE
        self.server_info.next_pings = None
        try:
            declare_active_modules(self.dht, self.module_uids, self.server_info, get_dht_time() + self.expiration)
        except Exception as error:  # the dead part may be the DHT; then others notice when they call this server
            log.warning("cannot announce that this server leaves: %s: %s", type(error).__name__, error)

    def _ping_next_servers(self) -> None:
        try:
            super()._ping_next_servers()
        except Exception as error:  # bad announcements of others must not stop this server's own
            log.warning("cannot ping the next servers: %s: %s", type(error).__name__, error)
