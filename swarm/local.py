"""The embedded private swarm: this program is its first peer, and its servers are child processes that it watches."""

import contextlib
import dataclasses
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from swarm.client.membership import Swarm
from swarm.options import ServerOptions
from swarm.process import kill_descendants
from swarm.supervision import HEALTHY_AFTER, backoff

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
THIS_MACHINE = ("/ip4/127.0.0.1/tcp/0",)  # where nobody else can reach the embedded swarm
# Longer than a server's own limit for an orderly stop, which announces that its blocks go.
STOP_TIMEOUT = 12.0  # seconds


class LocalServer:
    """One server of the embedded swarm: a child process, started again when it dies."""

    def __init__(self, options: ServerOptions, initial_peers: Sequence[str]) -> None:
        self.options = options
        self._initial_peers = initial_peers  # not a copy: they change when the swarm is founded again on other ports
        self._stopping = threading.Event()
        self.process = self._start()
        self._watcher = threading.Thread(target=self._watch, name=f"watch-server-{options.model}", daemon=True)
        self._watcher.start()

    def command(self) -> list[str]:
        """Return the command that starts the server."""
        options = dataclasses.replace(
            self.options,
            initial_peers=tuple(self._initial_peers),
            host_maddrs=self.options.host_maddrs or THIS_MACHINE,
            end_with_parent=True,
            quiet=True,
        )
        return [sys.executable, "-W", "ignore", "-m", "swarm.server", *options.arguments()]

    def _start(self) -> subprocess.Popen:
        # A session of its own, so that Ctrl-C in a terminal reaches this program first, which then stops its servers in
        # order; its standard input is a pipe that ends when this program does, even with SIGKILL.
        return subprocess.Popen(self.command(), cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True)

    def _watch(self) -> None:
        deaths = 0  # early ones, in a row
        while not self._stopping.is_set():
            started = time.monotonic()
            status = self.process.wait()
            deaths = 0 if time.monotonic() - started > HEALTHY_AFTER else deaths + 1
            if not self._stopping.is_set():
                log.warning(
                    "the server of %s ended with %s; again in %.1f s", self.options.model, status, backoff(deaths)
                )
            while not self._stopping.wait(backoff(deaths)):
                if self._restart():
                    break
                deaths += 1

    def _restart(self) -> bool:
        """Start the server again; return whether that could be done."""
        self._close_pipe()
        try:
            self.process = self._start()
        except OSError as error:  # no memory or no file descriptor is free, for one
            log.warning("the server of %s cannot be started: %s", self.options.model, error)
            return False
        return True

    def _close_pipe(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()

    def stop(self) -> None:
        """Ask the server to end; does not wait."""
        self._stopping.set()
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def close(self) -> None:
        """End the server, and kill it when it does not end in time."""
        self.stop()
        try:
            self.process.wait(timeout=STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            log.warning("the server of %s does not end and is killed", self.options.model)
            kill_descendants(self.process.pid)
            self.process.kill()
            self.process.wait(timeout=STOP_TIMEOUT)
        self._watcher.join(timeout=STOP_TIMEOUT)
        self._close_pipe()


class LocalSwarm:
    """A private swarm of this program's own. Others can join it if ``host_maddrs`` are addresses they can reach."""

    def __init__(self, host_maddrs: Sequence[str] = THIS_MACHINE) -> None:
        """Start the first peer.

        :raises SwarmUnreachable: if the addresses cannot be listened on
        """
        self.swarm = Swarm.found(host_maddrs)
        self.servers: list[LocalServer] = []

    def start_server(self, options: ServerOptions) -> LocalServer:
        """Start a server; it loads its blocks and announces them in the background."""
        server = LocalServer(options, self.swarm.initial_peers)
        self.servers.append(server)
        return server

    def close(self) -> None:
        """End all servers, then the first peer."""
        for server in self.servers:
            server.stop()
        for server in self.servers:
            server.close()
        self.swarm.close()

    def __enter__(self) -> "LocalSwarm":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
