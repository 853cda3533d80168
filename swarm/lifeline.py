"""The line between a program and a server that it has started: a pair of sockets, one of which is the server's input.

The server ends when the line does, however its program has ended. Over the line it says that it serves, or why it
cannot: the program knows how a server was killed, but not why one gave up.
"""

import contextlib
import os
import signal
import socket
import threading

from swarm.errors import SwarmError

STARTING, SERVING, FAILED = "starting", "serving", "failed "  # one message a line
LONGEST_REASON = 300  # characters; some libraries append a stack


class ServerLine:
    """The program's end. Thread-safe; nothing here waits."""

    def __init__(self) -> None:
        self._own, self.servers = socket.socketpair()  # the second is for the server, and to be closed here
        self._own.setblocking(False)
        self._received = b""
        self._serving = False
        self._failure: str | None = None
        self._lock = threading.Lock()

    @property
    def serving(self) -> bool:
        """Whether the server has announced its blocks since it was started."""
        self._hear()
        return self._serving

    @property
    def failure(self) -> str | None:
        """What the server has said last of why it cannot serve."""
        self._hear()
        return self._failure

    def _hear(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # nothing more has come, or the line is closed
            while data := self._own.recv(4096):
                *lines, self._received = (self._received + data).split(b"\n")
                for line in lines:
                    self._note(line.decode(errors="replace"))

    def _note(self, message: str) -> None:
        self._serving = message == SERVING
        if message.startswith(FAILED):
            self._failure = message.removeprefix(FAILED)
        elif self._serving:
            self._failure = None

    def close(self) -> None:
        """End the line, and with it the server; may be called twice."""
        self._own.close()
        self.servers.close()


class _ProgramLine:
    """The server's end: standard input. It leads nowhere until it is held: a server may have been started by hand."""

    def __init__(self) -> None:
        self._held = False
        self._serving = False

    def hold(self) -> None:
        """End this process when the line ends, and say from now on how the server fares."""
        if self._held:
            return
        self._held = True
        threading.Thread(target=self._watch, name="watch-parent", daemon=True).start()
        self._say(STARTING)

    @staticmethod
    def _watch() -> None:
        with contextlib.suppress(ConnectionResetError):  # it ended with something unread
            while os.read(0, 1024):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    def say_serving(self) -> None:
        self._serving = True
        self._say(SERVING)

    def say_failed(self, reason: str | BaseException) -> None:
        """Say why this server cannot serve; of one that has served nobody needs to know, for it is back soon."""
        if not self._serving:
            self._say(FAILED + one_line(reason))

    def _say(self, message: str) -> None:
        if self._held:
            with contextlib.suppress(OSError):  # nobody listens any more
                os.write(0, message.encode(errors="replace") + b"\n")


program_line = _ProgramLine()


def one_line(reason: str | BaseException) -> str:
    """Return the first line of a reason, of bounded length; of an exception with its type, unless it is the swarm's."""
    lines = (" ".join(line.split()) for line in str(reason).splitlines())
    text = next(filter(None, lines), "")
    if isinstance(reason, BaseException) and not isinstance(reason, SwarmError):
        text = f"{type(reason).__name__}: {text}" if text else type(reason).__name__
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


def describe_exit(status: int) -> str:
    """Return how a process has ended.

    :param status: as ``subprocess`` gives it: negative for a signal
    """
    if status >= 0:
        return f"it ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"it was killed by {name}" + (", as when memory runs out" if -status == signal.SIGKILL else "")
