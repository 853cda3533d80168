"""Servers as forks of one process that has loaded the program: a server starts in the time that its blocks take.

Loading the libraries takes more than two seconds of a processor. Here that happens once, beside the program's own
imports. Forks share the memory of what is loaded. The process is ``swarm.server.forking``; it is asked over a pair of
sockets, and ends when they do and all its servers have.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import psutil

from swarm.places import PlaceUnusable, default_cache_dir

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
# How a server is started by itself; what follows are its arguments.
SERVER = (sys.executable, "-W", "ignore", "-m", "swarm.server")
FORKING = (sys.executable, "-W", "ignore", "-m", "swarm.server.forking")
# Until a fork says its number, the libraries may still have to be loaded, on a machine that does other things too.
LOADING_TIMEOUT = 120.0  # seconds
# How often a fork is looked at whose parent has died, which would have told its end.
PERIOD = 0.25  # seconds
# Variables that libraries set while the program loads, and in which the tests' runner tells which test is running, and
# Flask's own server how it is run.
CHANGING = (
    "PETALS_IGNORE_DEPENDENCY_VERSION",
    "BITSANDBYTES_NOWELCOME",
    "TOKENIZERS_PARALLELISM",
    "TORCHINDUCTOR_",
    "PYTEST_",
    "WERKZEUG_",
)
OUTPUT, ERRORS = 1, 2  # file descriptors of the program, as a process that it starts would inherit them
UNKNOWN = 1  # the exit status of a process that nobody has waited for


class Fork:
    """A forked server, as ``subprocess.Popen`` shows a process. Thread-safe."""

    def __init__(self, status: socket.socket) -> None:
        """:param status: over which the process that forks says the number of the fork, and then its exit status"""
        status.setblocking(False)
        self._status = status
        self._lock = threading.Lock()
        self._received = b""
        self._pid: int | None = None
        self._process: psutil.Process | None = None
        self._signal: int | None = None  # what is to be sent as soon as there is a process
        self.returncode: int | None = None  # negative: the signal that has ended it

    @property
    def pid(self) -> int:
        """The number of the process.

        :raises OSError: if it could not be forked
        """
        deadline = time.monotonic() + LOADING_TIMEOUT
        while self._pid is None:
            if self.returncode is not None or time.monotonic() > deadline:
                raise OSError("the server could not be forked")
            self._hear(max(0.0, deadline - time.monotonic()))
        return self._pid

    def poll(self) -> int | None:
        """Return the exit status; None while the process runs."""
        self._hear(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process; return its exit status.

        :raises subprocess.TimeoutExpired: if it runs longer than ``timeout`` seconds
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(SERVER, timeout or 0.0)
            self._hear(left)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        self._hear(0)
        with self._lock:
            if self._pid is None:
                self._signal = number
            elif self.returncode is None:
                send(self._pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _hear(self, timeout: float | None) -> None:
        """Take what has been said, within ``timeout`` seconds; None: whenever that is."""
        if self._process is not None:  # whoever has forked it has died
            self._look(timeout)
            return
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile, by a thread that has heard of the end
            wait([self._status], timeout)
        with self._lock:
            if self.returncode is not None or self._process is not None:
                return
            try:
                data = self._status.recv(4096)
            except BlockingIOError:
                return
            self._received += data
            *lines, self._received = self._received.split(b"\n")
            for line in lines:
                self._note(*line.split())
            if not data and self.returncode is None:
                self._be_orphaned()

    def _note(self, word: bytes, number: bytes) -> None:
        if word == b"pid":
            self._pid = int(number)
            if self._signal is not None:
                send(self._pid, self._signal)
        else:
            self.returncode = int(number)
            self._status.close()

    def _be_orphaned(self) -> None:
        self._status.close()
        try:
            self._process = psutil.Process(self._pid) if self._pid is not None else None
        except psutil.NoSuchProcess:
            self._process = None
        if self._process is None:
            self.returncode = UNKNOWN

    def _look(self, timeout: float | None) -> None:
        assert self._process is not None
        with contextlib.suppress(psutil.TimeoutExpired, psutil.NoSuchProcess):
            self._process.wait(PERIOD if timeout is None else min(PERIOD, timeout))
        if not self._process.is_running():
            self.returncode = UNKNOWN


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class ForkServer:
    """The program's end of the process that forks servers."""

    def __init__(self, environment: Mapping[str, str], cache_dir: str) -> None:
        """Start the process, which loads the libraries in the background.

        :param environment: of the process, and of the servers
        :param cache_dir: where servers keep what they prepare and compile; empty: the default
        :raises OSError: if it cannot be started
        """
        self._own, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [*FORKING, *([cache_dir] if cache_dir else [])],
                cwd=ROOT,
                env=environment,
                stdin=theirs.fileno(),
                start_new_session=True,
            )
        except BaseException:
            self._own.close()
            raise
        finally:
            theirs.close()
        # It reads one request after the other, and has to load the program first.
        self._own.settimeout(LOADING_TIMEOUT)

    def fork(self, arguments: Sequence[str], environment: Mapping[str, str], line: socket.socket) -> Fork:
        """Start a server.

        :param arguments: of ``python -m swarm.server``
        :param line: the server's standard input
        :raises OSError: if the process has ended
        """
        own, theirs = socket.socketpair()
        request = json.dumps({"arguments": list(arguments), "environment": dict(environment)}).encode() + b"\n"
        try:
            descriptors = [line.fileno(), theirs.fileno(), OUTPUT, ERRORS]
            sent = socket.send_fds(self._own, [request], descriptors)
            self._own.sendall(request[sent:])
        except BaseException:
            own.close()
            raise
        finally:
            theirs.close()
        return Fork(own)

    def close(self) -> None:
        """Ask for no more servers. The process ends once those that it has forked have."""
        self._own.close()
        # Somebody has to wait for it when it has ended; by then nobody knows this object any more.
        threading.Thread(target=self._process.wait, name="wait-fork-server", daemon=True).start()


_lock = threading.Lock()
_current: tuple[tuple[object, ...], ForkServer] | None = None


def prepare(cache_dir: str = "") -> None:
    """Begin to load what servers need, if that has not been begun. Does not wait.

    :raises OSError: if no process can be started
    """
    with _lock:
        _get(dict(os.environ), cache_dir)


def start(command: Sequence[str], line: socket.socket, cache_dir: str = "") -> "Fork | subprocess.Popen[bytes]":
    """Start a server in a session of its own, so that Ctrl-C in a terminal does not reach it.

    :param command: ``SERVER`` with its arguments; any other one is run as it is
    :param line: its standard input
    :param cache_dir: as its arguments have it
    :raises OSError: if it cannot be started
    """
    if tuple(command[: len(SERVER)]) != SERVER:
        return subprocess.Popen(command, cwd=ROOT, stdin=line.fileno(), start_new_session=True)
    arguments, environment = command[len(SERVER) :], dict(os.environ)
    with _lock:
        try:
            return _get(environment, cache_dir).fork(arguments, environment, line)
        except OSError as error:
            log.warning("the process that servers are forked from has ended (%s); starting another one", error)
            _forget()
            return _get(environment, cache_dir).fork(arguments, environment, line)


def _get(environment: Mapping[str, str], cache_dir: str) -> ForkServer:
    """Return the fork server for this environment: libraries look at theirs when they are loaded."""
    global _current
    if not cache_dir:
        with contextlib.suppress(PlaceUnusable):  # there is none by default, and servers will say so
            cache_dir = str(default_cache_dir())
    seen = (
        frozenset(item for item in environment.items() if not item[0].startswith(CHANGING)),
        cache_dir,
        os.getpid(),
    )
    if _current is None or _current[0] != seen:
        _forget()
        _current = seen, ForkServer(environment, cache_dir)
    return _current[1]


def _forget() -> None:
    global _current
    if _current is not None:
        _current[1].close()
        _current = None
