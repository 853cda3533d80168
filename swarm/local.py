"""The embedded private swarm: this program is its first peer, and its servers are child processes that it watches."""

import contextlib
import dataclasses
import logging
import subprocess
import threading
import time
from collections.abc import Sequence

from swarm import fork_server
from swarm.client.membership import Swarm
from swarm.lifeline import ServerLine, describe_exit
from swarm.options import ServerOptions
from swarm.process import kill_descendants
from swarm.supervision import HEALTHY_AFTER, backoff

log = logging.getLogger(__name__)

THIS_MACHINE = ("/ip4/127.0.0.1/tcp/0",)  # where nobody else can reach the embedded swarm
# Longer than a server's own limit for an orderly stop, which announces that its blocks go.
STOP_TIMEOUT = 12.0  # seconds


class LocalServer:
    """One server of the embedded swarm: a child process, started again when it dies."""

    def __init__(self, options: ServerOptions, initial_peers: Sequence[str]) -> None:
        self.options = options
        self._initial_peers = initial_peers  # not a copy: they change when the swarm is founded again on other ports
        self._stopping = threading.Event()
        self._failure: str | None = None  # why the process before this one has never served
        self._next_start: float | None = None  # time.monotonic()
        self._line = ServerLine()
        self.process = self._start(self._line)
        self._watcher = threading.Thread(target=self._watch, name=f"watch-server-{options.model}", daemon=True)
        self._watcher.start()

    @property
    def failure(self) -> str | None:
        """Why the server cannot serve, in one line; None if it serves, or has not failed to yet."""
        line = self._line
        return None if line.serving else line.failure or self._failure

    @property
    def retry_in(self) -> float | None:
        """Seconds until the server is started again; None while there is a process."""
        next_start = self._next_start
        return None if next_start is None else max(0.0, next_start - time.monotonic())

    def command(self) -> list[str]:
        """Return the command that starts the server."""
        options = dataclasses.replace(
            self.options,
            initial_peers=tuple(self._initial_peers),
            host_maddrs=self.options.host_maddrs or THIS_MACHINE,
            end_with_parent=True,
            quiet=True,
        )
        return [*fork_server.SERVER, *options.arguments()]

    def _start(self, line: ServerLine) -> fork_server.Fork | subprocess.Popen[bytes]:
        # A session of its own, so that Ctrl-C in a terminal reaches this program first, which then stops its servers in
        # order; its standard input is a line that ends when this program does, even with SIGKILL.
        try:
            return fork_server.start(self.command(), line.servers, str(self.options.cache_dir or ""))
        finally:
            line.servers.close()

    def _watch(self) -> None:
        deaths = 0  # early ones, in a row
        while not self._stopping.is_set():
            started = time.monotonic()
            status = self.process.wait()
            served = self._line.serving
            deaths = 0 if served and time.monotonic() - started > HEALTHY_AFTER else deaths + 1
            self._failure = None if served else self._reason(status)
            if not self._stopping.is_set():
                reason = self._failure or describe_exit(status)
                log.warning("the server of %s fails: %s; again in %.1f s", self.options.model, reason, backoff(deaths))
            while not self._wait(backoff(deaths)):
                if self._restart():
                    break
                deaths += 1

    def _reason(self, status: int) -> str:
        """Return why a process has ended that has never served: what it said, unless it was killed."""
        return (self._line.failure if status > 0 else None) or describe_exit(status)

    def _wait(self, delay: float) -> bool:
        """Wait for the time of the next start; return whether there will be none."""
        self._next_start = time.monotonic() + delay
        return self._stopping.wait(delay)

    def _restart(self) -> bool:
        """Start the server again; return whether that could be done."""
        self._line.close()
        try:
            self._line = ServerLine()
            self.process = self._start(self._line)
        except OSError as error:  # no memory or no file descriptor is free, for one
            self._failure = f"it cannot be started: {error}"
            log.warning("the server of %s cannot be started: %s", self.options.model, error)
            return False
        self._next_start = None
        return True

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
        self._line.close()


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
