"""Start the program as an operator does, and see what is left of it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
from flask import Flask
from werkzeug.serving import BaseWSGIServer, make_server

ROOT = Path(__file__).resolve().parent.parent.parent
GUNICORN = [sys.executable, "-m", "gunicorn", "app:app"]
# An app with a tiny model is ready in about 12 s on two cores; busy machines take several times as long.
START_TIMEOUT = 120.0  # seconds
END_TIMEOUT = 30.0  # seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def listening(app: Flask) -> Iterator[str]:
    """Serve an app from threads of this process on a port of its own; yield its address, http://127.0.0.1:PORT."""
    with serving(make_server("127.0.0.1", 0, app, threaded=True)) as url:
        yield url


@contextlib.contextmanager
def serving(server: BaseWSGIServer) -> Iterator[str]:
    """Run a server from a thread of this process; yield its address."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(timeout=END_TIMEOUT)
        server.server_close()


class Program:
    """The app in a process of its own, with its output in a file."""

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # A shell that starts something in the background lets it ignore Ctrl-C, and so everything below it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        environment = {**os.environ, "PORT": str(self.port), "PYTHONUNBUFFERED": "1", **environment}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [part.format(port=self.port) for part in command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, path: str = "/readyz") -> None:
        waiting = threading.Event()
        for _ in range(int(START_TIMEOUT / 0.2)):
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url + path, timeout=10):
                return
            assert self.process.poll() is None, self.output
            waiting.wait(0.2)
        raise AssertionError(f"not ready:\n{self.output}")

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """The program and everything below it."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            self.process.wait(timeout=END_TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=END_TIMEOUT)
            raise


def survivors(family: list[psutil.Process]) -> list[str]:
    """Wait for processes to end; return the command lines of those that do not.

    PyTorch's shared-memory manager is left out: it ends itself some seconds after the last process that used it.
    """
    mine = [process for process in family if not is_memory_manager(process)]
    _, alive = psutil.wait_procs(mine, timeout=END_TIMEOUT)
    return [f"{process.pid} {process.name()}" for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def is_memory_manager(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "torch_shm" in process.name()
    return False


@contextlib.contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[Program]:
    program = Program(command, log, **environment)
    try:
        yield program
    finally:
        program.end()
