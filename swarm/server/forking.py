"""``python -m swarm.server.forking [CACHE_DIR]``: loads what servers need, and forks one at each request.

The program's end is ``swarm.fork_server``. This process has one thread and computes nothing, for a fork has only the
thread that forked it.
"""

import contextlib
import json
import logging
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import setproctitle

from swarm import collector
from swarm.fork_server import SERVER
from swarm.server import restart
from swarm.server.__main__ import load, start

log = logging.getLogger(__name__)

REQUEST_DESCRIPTORS = 4  # the server's standard input, its status, standard output and error
LONGEST_READ = 65536  # bytes


class Request(NamedTuple):
    """A server that is to be started."""

    arguments: list[str]
    environment: dict[str, str]
    line: int  # file descriptors
    status: int
    output: int
    errors: int


class Forker:
    """Takes requests, and tells how the forks fare."""

    def __init__(self, program: socket.socket) -> None:
        self._program = program
        self._received = b""
        self._descriptors: list[int] = []
        self._statuses: dict[int, int] = {}  # by number of the process
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the wake-up is all that is wanted
        signal.set_wakeup_fd(self._waker)

    def run(self) -> Request | None:
        """Fork; return the request in each fork, and None in this process when there is nothing left to do."""
        open_ended = True
        while open_ended or self._statuses:
            ready, _, _ = select.select([self._program] * open_ended + [self._woken], [], [])
            if self._woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken, LONGEST_READ)
                self._bury()
            if self._program in ready:
                open_ended = self._receive()
                while (request := self._next()) is not None:
                    if self._fork(request):
                        return request
        return None

    def _receive(self) -> bool:
        """Take what has come; return whether more can come."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._program, LONGEST_READ, REQUEST_DESCRIPTORS)
        except ConnectionResetError:
            return False
        self._received += data
        self._descriptors += descriptors
        return bool(data)

    def _next(self) -> Request | None:
        request, separator, rest = self._received.partition(b"\n")
        if not separator:
            return None
        self._received = rest
        descriptors, self._descriptors = (
            self._descriptors[:REQUEST_DESCRIPTORS],
            self._descriptors[REQUEST_DESCRIPTORS:],
        )
        content: dict[str, Any] = json.loads(request)
        return Request(content["arguments"], content["environment"], *descriptors)

    def _fork(self, request: Request) -> bool:
        """Return whether this is the fork."""
        try:
            pid = os.fork()
        except OSError as error:  # no memory, or too many processes: the program hears that it has ended
            print(f"a server cannot be forked: {error}", file=sys.stderr, flush=True)
            pid = -1
        if pid == 0:
            self._let_go(request)
            return True
        if pid > 0:
            self._statuses[pid] = request.status
            tell(request.status, f"pid {pid}")
        else:
            os.close(request.status)
        for descriptor in (request.line, request.output, request.errors):
            os.close(descriptor)
        return False

    def _bury(self) -> None:
        with contextlib.suppress(ChildProcessError):  # there is none
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                told = self._statuses.pop(pid)
                tell(told, f"ended {os.waitstatus_to_exitcode(status)}")
                os.close(told)

    def _let_go(self, request: Request) -> None:
        """In a fork: close all that is this process's, and other servers'."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (self._woken, self._waker, request.status, *self._statuses.values()):
            os.close(descriptor)
        self._program.detach()  # it is standard input, which is replaced


def tell(status: int, message: str) -> None:
    with contextlib.suppress(OSError):  # the program has ended
        os.write(status, f"{message}\n".encode())


def preload(cache_dir: Path | None) -> bool:
    """Load what servers need; return whether that could be done. If not, each server will say why."""
    try:
        load(cache_dir)
    except Exception:
        log.info("servers cannot be loaded ahead of time", exc_info=True)
        return False
    collector.freeze()
    return True


def become(request: Request) -> None:
    """In a fork: be what ``python -m swarm.server`` would be."""
    os.setsid()
    for number, descriptor in enumerate((request.line, request.output, request.errors)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request.environment)
    # A server that is ill begins anew by its command line, see swarm.supervision; ``ps`` shows it too.
    sys.orig_argv = [*SERVER, *request.arguments]
    sys.argv = [sys.argv[0], *request.arguments]
    setproctitle.setproctitle(" ".join(sys.orig_argv))
    np.random.seed()  # PyTorch's numbers are the same in every process anyway, and Python seeds its own after a fork
    restart.begin()


def main() -> int:
    """Serve forks; return the exit status of this process, or of the server that it has become."""
    setproctitle.getproctitle()  # it looks for its place beside the environment, which must not have changed yet
    preload(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    request = Forker(socket.socket(fileno=sys.stdin.fileno())).run()
    if request is None:
        return 0
    become(request)
    return start()


if __name__ == "__main__":
    sys.exit(main())
