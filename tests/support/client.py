"""Programs that use the app from outside: plain HTTP, and somebody else's WebSocket client."""

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from websockets.sync.client import ClientConnection, connect

TIMEOUT = 60  # seconds; a tiny model answers in less than one


def call(
    url: str,
    path: str,
    *,
    form: dict[str, Any] | None = None,
    body: Any = None,
    data: bytes | None = None,
    headers: dict[str, str] | None = None,
    method: str | None = None,
) -> tuple[int, dict[str, str], Any]:
    """Send a request; return (status, headers in lower case, body read as JSON or text)."""
    headers = dict(headers or {})
    if form is not None:
        data = urllib.parse.urlencode(form).encode()
    if body is not None:
        data = json.dumps(body).encode()
        headers.setdefault("Content-Type", "application/json")
    request = urllib.request.Request(url + path, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return read(response)
    except urllib.error.HTTPError as error:
        with error:
            return read(error)


def read(response: Any) -> tuple[int, dict[str, str], Any]:
    text = response.read().decode()
    headers = {name.lower(): value for name, value in response.headers.items()}
    is_json = headers.get("content-type", "").startswith("application/json")
    return response.status, headers, json.loads(text) if is_json else text


class Socket:
    """One WebSocket connection."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    def send(self, message: Any) -> None:
        self.connection.send(message if isinstance(message, (str, bytes)) else json.dumps(message))

    def receive(self) -> dict[str, Any]:
        return json.loads(self.connection.recv(timeout=TIMEOUT))

    def ask(self, message: Any) -> dict[str, Any]:
        self.send(message)
        return self.receive()

    def open(self, max_length: int = 256, **more: Any) -> None:
        reply = self.ask({"type": "open_inference_session", "max_length": max_length, **more})
        assert reply == {"ok": True}, reply

    def generate(self, **params: Any) -> list[dict[str, Any]]:
        """Send a generate request; return all responses up to the last."""
        self.send({"type": "generate", **params})
        replies: list[dict[str, Any]] = []
        while not replies or (replies[-1]["ok"] and not replies[-1]["stop"]):
            reply = self.receive()
            if "queue" not in reply:  # reported if asked for
                replies.append(reply)
        return replies


@contextmanager
def websocket(url: str) -> Iterator[Socket]:
    with connect(url, open_timeout=TIMEOUT, close_timeout=TIMEOUT) as connection:
        yield Socket(connection)
