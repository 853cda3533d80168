"""A server that gives connections up to the app, as the program's own does under gunicorn; here for tests alone."""

import contextlib
import socket
from collections.abc import Iterable, Iterator
from typing import Any

from flask import Flask
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from tests.support.processes import serving


class Handler(WSGIRequestHandler):
    def make_environ(self) -> Any:
        environ = super().make_environ()
        del environ["werkzeug.socket"]

        def detach() -> tuple[socket.socket, bytes]:
            assert isinstance(self.server, DetachingServer)
            self.server.detached.add(self.connection)
            self.close_connection = True  # else it would read the next request, from what the client sends to the app
            return self.connection.dup(), b""

        environ["front.detach"] = detach
        return environ


class DetachingServer(ThreadedWSGIServer):
    daemon_threads = True

    def __init__(self, app: Flask) -> None:
        def ended_by_stopping(environ: Any, start_response: Any) -> Iterable[bytes]:
            try:
                return app(environ, start_response)
            except StopIteration:
                raise ConnectionAbortedError from None  # with which werkzeug writes nothing

        super().__init__("127.0.0.1", 0, ended_by_stopping, Handler)
        self.detached: set[Any] = set()

    def shutdown_request(self, request: Any) -> None:
        if request in self.detached:
            self.detached.remove(request)
            request.close()  # without ending the connection, which is the app's
        else:
            super().shutdown_request(request)


@contextlib.contextmanager
def detaching(app: Flask) -> Iterator[str]:
    """Serve an app from threads of this process; yield its address, http://127.0.0.1:PORT."""
    with serving(DetachingServer(app)) as url:
        yield url
