"""The connection of a request's client: whether it has hung up, and how long sending to it may take."""

import math
import socket
import struct
from collections.abc import Mapping
from typing import Any

from errors import ApiError
from swarm.errors import Cancelled
from swarm.waiter import Waiter


def client_socket(environ: Mapping[str, Any]) -> socket.socket | None:
    """Return the socket of a request, if its server provides it."""
    return environ.get("gunicorn.socket") or environ.get("werkzeug.socket")


def limit_sends(sock: Any, timeout: float) -> None:
    """Let sending to a client that takes no data fail after this many seconds, instead of holding a thread for ever."""
    if (limit := getattr(sock, "limit_sends", None)) is not None:  # front.answer_socket
        limit(timeout)
        return
    # Not `settimeout`, which would let readers time out as well.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(timeout), 0))


class RequestWaiter(Waiter):
    """The client of a request: waits for as long as the connection stands."""

    def __init__(self, environ: Mapping[str, Any]) -> None:
        self._socket = client_socket(environ)

    def look(self) -> None:
        if self._has_hung_up():
            raise Cancelled("the client has hung up")

    def _has_hung_up(self) -> bool:
        if self._socket is None:
            return False
        try:
            # Readable without a byte to read: the other side has closed. Bytes would be the next request.
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        except ValueError:  # a TLS socket cannot peek
            return False


def take_socket(environ: Mapping[str, Any]) -> tuple[socket.socket, bytes]:
    """Take the connection of a request over from its server.

    Under a server that gives it up (``front.detach``) it is the caller's alone. Under others the request must not end
    before the caller has closed it, and what a client sends before it has an answer is lost (RFC 6455, section 4.1,
    forbids that).

    :returns: the socket, and what the server has read of it beyond the request
    :raises ApiError: if the server does not provide the socket
    """
    detach = environ.get("front.detach")
    if detach is not None:
        return detach()
    sock = client_socket(environ)
    if sock is None:
        raise ApiError("this WSGI server cannot serve WebSockets: use gunicorn or flask run")
    return sock, b""
