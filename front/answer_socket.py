"""What the thread that answers a request sees of its connection: within bounds, sending waits for no client."""

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Callable
from typing import IO

# What a client has not taken yet, of one connection. Every file of this program fits (the largest, of Swagger UI, has
# 1.4 MB), so that a client that reads one slowly holds no thread; streams that are not read at all wait here.
CAPACITY = 2 * 1024**2  # bytes
# Sent at a time by the loop: about what a kernel's send buffer takes.
PIECE = 256 * 1024  # bytes


class AnswerSocket:
    """A client's socket. What the kernel does not take at once is kept, and the loop sends it later.

    Has the methods of ``socket.socket`` that gunicorn and this program call. All may be called from any thread.
    """

    def __init__(
        self, raw: socket.socket, timeout: float, unread: bytearray, on_pending: Callable[[], None] = lambda: None
    ) -> None:
        """Wrap a socket that does not block.

        :param timeout: seconds after which a client that takes no data is given up
        :param unread: what was read of the connection beyond the request; only for :meth:`detach`
        :param on_pending: called when there begins to be something to send later; must not block
        """
        self.raw = raw
        self.timeout = timeout
        self.broken = False
        self.detached = False
        self.progress = time.monotonic()  # when the kernel last took something
        self.changed = threading.Condition()  # guards all of this
        self.on_pending = on_pending
        self._unread = unread
        self._pending = bytearray()

    @property
    def pending(self) -> int:
        """Bytes that are still to be sent."""
        return len(self._pending)

    def sendall(self, data: bytes) -> None:
        """Send data now or later; wait only while more than ``CAPACITY`` is pending.

        :raises OSError: if the client is gone, or takes no data for ``timeout`` seconds
        """
        with self.changed:
            rest = memoryview(data)
            while rest and not self.detached:
                rest = rest[self._take(rest) :]

    def sendfile(self, file: IO[bytes], offset: int = 0, count: int | None = None) -> int:
        """Send a part of a file; all that follows ``offset`` if there is no ``count``."""
        file.seek(offset)
        sent = 0
        while count is None or sent < count:
            data = file.read(PIECE if count is None else min(PIECE, count - sent))
            if not data:
                break
            self.sendall(data)
            sent += len(data)
        return sent

    def _take(self, data: memoryview) -> int:
        """Send or keep the beginning of data; return how much. Nothing was taken if there was no room before."""
        if self.broken:
            raise BrokenPipeError(errno.EPIPE, "the client is gone, or takes no data")
        if not self._pending:
            if sent := self._send(data):
                return sent
            self.progress = time.monotonic()
            self.on_pending()
        elif len(self._pending) >= CAPACITY:
            if not self.changed.wait(self.timeout):
                self.break_off()
            return 0
        kept = data[: CAPACITY - len(self._pending)]
        self._pending += kept
        return len(kept)

    def _send(self, data: memoryview | bytearray) -> int:
        try:
            sent = self.raw.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self.break_off()
            raise
        self.progress = time.monotonic()
        return sent

    def flush(self) -> None:
        """Send of what is pending as much as the kernel takes."""
        with self.changed, contextlib.suppress(OSError):  # which has made it `broken`
            if self._pending and (sent := self._send(self._pending[:PIECE])):
                del self._pending[:sent]
                self.changed.notify_all()

    def break_off(self) -> None:
        """End the connection for both sides: a thread that sends or waits for room fails at once."""
        with self.changed:
            if self.detached:
                return
            self.broken = True
            self._pending.clear()
            self.changed.notify_all()
            with contextlib.suppress(OSError):
                self.raw.shutdown(socket.SHUT_RDWR)

    def limit_sends(self, timeout: float) -> None:
        """Give a client up that takes no data for this many seconds."""
        self.timeout = timeout

    def detach(self) -> tuple[socket.socket, bytes]:
        """Hand the connection over: the server sends nothing on it any more, never closes it and forgets it.

        For the request's own thread, before or after what it sends itself.

        :returns: a socket that blocks, and what was read of it beyond the request
        :raises BrokenPipeError: if the client is gone, or does not take what was sent before
        """
        with self.changed:
            if not self.changed.wait_for(lambda: not self._pending or self.broken, self.timeout):
                self.break_off()
            if self.broken:
                raise BrokenPipeError(errno.EPIPE, "the client is gone, or takes no data")
            self.detached = True
        unread = bytes(self._unread)
        self._unread.clear()
        self.raw.setblocking(True)
        return self.raw, unread

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive what has come, as ``socket.recv`` of a socket that does not block.

        What came with the request has been read. To peek whether the client has hung up.
        """
        return self.raw.recv(size, flags)

    # What gunicorn 27 calls beside `sendall` and `sendfile`:

    def shutdown(self, how: int) -> None:
        """Refuse: the loop ends connections itself, after what is pending.

        gunicorn's ``close_graceful`` calls it if an application fails in the middle of an answer. If it succeeded, that
        would go on to wait for the client.

        :raises OSError: always
        """
        raise OSError(errno.ENOTSUP, "the front door ends connections itself")

    def close(self) -> None:
        """Do nothing: the loop closes the socket when its request has been answered.

        gunicorn's ``close_graceful`` calls it as well.
        """

    def gettimeout(self) -> float:
        """Return 0: gunicorn's ``write_error`` need not ask for a socket that does not block, and then undo it."""
        return 0.0

    def setblocking(self, flag: bool) -> None:
        """Do nothing: sending waits as described, whatever the flag. gunicorn's ``handle`` sets it before a request."""
