"""How a request becomes a WebSocket, or is refused; RFC 6455, section 4.2."""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from wsproto.utilities import generate_accept_token

VERSION = "13"


class BadHandshake(Exception):
    """A request that is not a valid WebSocket handshake."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        # RFC 6455, section 4.4; RFC 9110, section 15.5.22
        self.headers = {"Upgrade": "websocket", "Sec-WebSocket-Version": VERSION} if status == 426 else {}


def accept_handshake(environ: Mapping[str, Any]) -> bytes:
    """Return the answer to a client that wants to talk WebSocket; RFC 6455, section 4.2.

    :param environ: of the request, as WSGI has it
    :raises BadHandshake: with the status of the refusal
    """
    if environ.get("REQUEST_METHOD") != "GET":
        raise BadHandshake(400, "a WebSocket handshake must be a GET request")
    connection = [token.strip().lower() for token in environ.get("HTTP_CONNECTION", "").split(",")]
    if environ.get("HTTP_UPGRADE", "").lower() != "websocket" or "upgrade" not in connection:
        raise BadHandshake(426, "this is a WebSocket API: connect with a WebSocket client")
    if environ.get("HTTP_SEC_WEBSOCKET_VERSION") != VERSION:
        raise BadHandshake(426, f"the WebSocket version must be {VERSION}")
    key = environ.get("HTTP_SEC_WEBSOCKET_KEY", "").strip()
    try:
        size = len(base64.b64decode(key, validate=True))
    except (binascii.Error, ValueError):
        size = 0
    if size != 16:
        raise BadHandshake(400, "Sec-WebSocket-Key must be 16 bytes in base64")
    token = generate_accept_token(key.encode("ascii")).decode("ascii")
    lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"]
    return "\r\n".join([*lines, f"Sec-WebSocket-Accept: {token}", "", ""]).encode("ascii")
