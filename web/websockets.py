"""The open WebSockets of an app: where they are taken over from HTTP, and the threads that handle their messages."""

import atexit
import threading
from collections.abc import Mapping
from typing import Any

from flask import Flask, Response

from admission.fair_pool import FairPool
from config import Settings
from errors import ShuttingDown, TooManyRequests
from swarm.errors import Cancelled
from web.client_socket import take_socket
from web.reply_stream import ReplyStreams
from web.websocket import CLOSING_LIMIT, Closed, Limits, WebSocket
from web.websocket_hub import Hub, NoRoom

# Threads for messages whose handling waits for nothing, beside those that have a session or wait for one.
SPARE_THREADS = 8


class WebSockets:
    """The open WebSockets of an app, and the threads that handle their messages."""

    def __init__(self, settings: Settings, ending: threading.Event) -> None:
        self.hub = Hub(
            Limits(
                max_websockets=settings.MAX_WEBSOCKETS,
                max_message=settings.MAX_BODY_BYTES,
                ping_interval=settings.WEBSOCKET_PING_INTERVAL,
                send_timeout=settings.SEND_TIMEOUT,
            )
        )
        # All that have a session may be answered, or wait for that; and this many may wait for a session.
        threads = settings.MAX_SESSIONS + 2 * settings.MAX_QUEUE + SPARE_THREADS
        self.pool = FairPool("websocket", threads)
        self.streams = ReplyStreams()
        self._ending = ending
        self._watched = False
        self._lock = threading.Lock()

    def adopt(self, environ: Mapping[str, Any], address: str, accepted: bytes) -> WebSocket:
        """Take over the connection of a request.

        :param accepted: what its client is answered
        :raises TooManyRequests: if there are too many
        :raises ShuttingDown: if the program is ending
        :raises Cancelled: if the client has gone already
        """
        self._watch()
        try:
            return self.hub.adopt(lambda: take_socket(environ), address, accepted)
        except NoRoom as error:
            raise TooManyRequests(str(error)) from None
        except Closed as error:
            raise ShuttingDown(str(error)) from None
        except OSError as error:
            raise Cancelled(f"the client has hung up: {error}") from None

    def _watch(self) -> None:
        """Start a thread that waits for the end of the program, from the first connection on."""
        with self._lock:
            watched, self._watched = self._watched, True
        if not watched:
            atexit.register(self._let_finish)
            threading.Thread(target=self._await_end, name="websockets-end", daemon=True).start()

    def _await_end(self) -> None:
        self._ending.wait()
        self.hub.shut_down()

    def _let_finish(self) -> None:
        """Let slow clients have the end of their answers, for a moment, before the program ends."""
        if self.hub.ending:
            self.hub.join(2 * CLOSING_LIMIT)


class Upgraded(Response):
    """The response to a request whose connection is the hub's: nothing that its server may write."""

    def __init__(self, websocket: WebSocket) -> None:
        super().__init__(status=101)
        self._websocket = websocket

    def __call__(self, environ: Mapping[str, Any], start_response: Any) -> Any:
        """End the request: at once, or, under servers that close the connection then, with the connection.

        :raises StopIteration: by which gunicorn, and servers made like it, learn that nothing is left to do
        :raises ConnectionAbortedError: for werkzeug
        """
        if "front.detach" not in environ:
            self._websocket.wait_closed()
        if "werkzeug.socket" in environ:
            raise ConnectionAbortedError("the WebSocket was closed")
        raise StopIteration


def websockets_of(app: Flask) -> WebSockets:
    """Return an app's WebSockets."""
    found: WebSockets = app.extensions["petals_chat_websockets"]
    return found
