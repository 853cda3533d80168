"""A client's connection, as the loop sees it."""

import enum
import math
import socket
import time
from collections.abc import Iterator
from typing import Any

from gunicorn.http.message import Request

from front.answer_socket import AnswerSocket
from front.request_reader import RequestReader

# The least a client may send, on average, beyond the first REQUEST_READ_TIMEOUT: slower than any link that a person
# would bear, and a body of 1 MiB may take 2 minutes.
MIN_RATE = 10_000  # bytes per second


class State(enum.Enum):
    READING = enum.auto()  # no request, or a part of one
    WAITING = enum.auto()  # for a thread
    RUNNING = enum.auto()  # a thread answers; the loop only sends
    FLUSHING = enum.auto()  # the answer is made; the client has not taken all of it
    LINGERING = enum.auto()  # our side is closed, and the other is asked to close its own
    CLOSED = enum.auto()  # or handed over


class Connection:
    """A connection and where it stands. Belongs to the loop, but for ``sock``, on which any thread may send.

    Is also what gunicorn's ``ThreadWorker.handle`` takes for a connection.
    """

    initialized = data_ready = True
    is_http2 = False

    def __init__(
        self, raw: socket.socket, peer: Any, server: Any, client: str, reader: RequestReader, send_timeout: float
    ) -> None:
        """Describe a connection that was accepted.

        :param peer: the address of the other side, and ``server`` that of ours, as sockets have them
        :param client: the client whose share of connections it uses
        """
        self.raw = raw
        self.client_key = client
        self.reader = reader
        self.sock = AnswerSocket(raw, send_timeout, reader.unread)
        self.state = State.READING
        self.events = 0  # that the loop watches for
        self.heard = time.monotonic()  # when the client last sent something
        self.began = math.nan  # when the request that is read began
        self.deadline = math.inf  # of the state
        self.keep = False  # after the answer
        self.held = 0  # bytes of the request in memory, until it is answered
        self.lane: Any = None  # where it waits or runs
        # For gunicorn:
        self.client = peer
        self.server = server
        self.parser: _Whole | None = None

    def init(self) -> None:
        """gunicorn's connections begin in the thread; ours have begun."""

    def hold(self, request: Request) -> None:
        """Keep a request for the thread."""
        self.parser = _Whole(request)

    def await_rest(self, timeout: float, max_body: int) -> None:
        """Set the deadline for the rest of a request, of which something has come.

        A client that sends an allowed body steadily, at ``MIN_RATE`` or faster, is not cut off.

        :param timeout: seconds, from the first byte, that a request may take in any case
        """
        if math.isnan(self.began):
            self.began = time.monotonic()
        self.deadline = self.began + timeout + min(self.reader.received, max_body) / MIN_RATE

    def await_next(self, timeout: float) -> None:
        """Set the deadline for the first byte of a request."""
        self.began = math.nan
        self.deadline = time.monotonic() + timeout

    @property
    def active(self) -> float:
        """When the client last took or sent something."""
        return max(self.heard, self.sock.progress)


class _Whole:
    """A request that is whole, in place of gunicorn's parser."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        return self._request

    def finish_body(self, deadline: float) -> bool:
        """Report that nothing of the request is left on the connection."""
        return True
