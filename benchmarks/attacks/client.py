"""A client of bad manners: raw connections, from a loopback address of its choice."""

import base64
import http.client
import json
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

# Addresses of the loopback network: to the program, each is another client.
ATTACKER, READER, STREAMER, MONITOR = "127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"
TEXT, CLOSING, PING, PONG = 1, 8, 9, 10  # opcodes of frames (RFC 6455, section 5.2)


@dataclass(frozen=True)
class Client:
    """Somebody at an address, with a key or without."""

    url: str  # http://127.0.0.1:PORT
    address: str = ATTACKER
    key: str = ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 80

    def connect(self, timeout: float = 30.0, receive_buffer: int | None = None) -> socket.socket:
        """Open a connection."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(timeout)
        sock.bind((self.address, 0))
        sock.connect(("127.0.0.1", self.port))
        return sock

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> tuple[int, Any]:
        """Send a request; return the status, and the body, read as JSON if it is.

        :raises OSError, http.client.HTTPException: if there is no answer in time
        """
        headers = dict(headers or {})
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        if body is not None and not isinstance(body, (bytes, str)):
            body = json.dumps(body)
            headers.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=timeout, source_address=(self.address, 0)
        )
        try:
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        finally:
            connection.close()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text

    def post(self, path: str, body: Any, timeout: float = 60.0) -> tuple[int, Any]:
        return self.call("POST", path, body, timeout=timeout)

    def status(self, path: str, body: Any, timeout: float = 120.0) -> int | str:
        """Return the status of an answer, or what came in its place."""
        try:
            return self.post(path, body, timeout)[0]
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__

    def send(self, path: str, body: Any) -> socket.socket:
        """Send a request whose answer nobody may ever read."""
        data = json.dumps(body).encode()
        sock = self.connect()
        sock.sendall(head("POST", path, len(data)) + data)
        return sock

    def websocket(
        self, timeout: float = 30.0, *, deflate: bool = False, receive_buffer: int | None = None
    ) -> "WebSocket":
        return WebSocket(self.connect(timeout, receive_buffer), self.port, deflate=deflate)


def head(method: str, path: str, length: int) -> bytes:
    """Return the head of a request with a JSON body."""
    lines = (
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class WebSocket:
    """A WebSocket, frame by frame."""

    def __init__(self, sock: socket.socket, port: int, *, deflate: bool) -> None:
        """Shake hands.

        :raises OSError: if the program does not
        """
        self.sock = sock
        lines = [
            "GET /api/v2/generate HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
            *(["Sec-WebSocket-Extensions: permessage-deflate; client_no_context_takeover"] if deflate else []),
        ]
        sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        self._buffer = b""
        while b"\r\n\r\n" not in self._buffer:
            self._receive()
        answer, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        if b" 101 " not in answer.split(b"\r\n")[0]:
            raise OSError(f"no WebSocket: {answer[:200]!r}")
        self.deflated = b"permessage-deflate" in answer

    def _receive(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise OSError("the connection was closed")
        self._buffer += data

    def _read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._receive()
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    @staticmethod
    def frame(payload: bytes, opcode: int = TEXT, *, compressed: bool = False) -> bytes:
        """Return a frame, masked with zeros, which change nothing."""
        first = bytes([0x80 | (0x40 if compressed else 0) | opcode])
        size = len(payload)
        if size < 126:
            length = bytes([0x80 | size])
        elif size < 2**16:
            length = bytes([0x80 | 126]) + struct.pack("!H", size)
        else:
            length = bytes([0x80 | 127]) + struct.pack("!Q", size)
        return first + length + bytes(4) + payload

    def send(self, message: Any) -> None:
        self.sock.sendall(self.frame(json.dumps(message).encode()))

    def receive(self) -> dict[str, Any]:
        """Return the next message; pings are answered.

        :raises OSError: if the connection ends
        """
        while True:
            first, second = self._read(2)
            size = second & 0x7F
            if size == 126:
                size = struct.unpack("!H", self._read(2))[0]
            elif size == 127:
                size = struct.unpack("!Q", self._read(8))[0]
            payload = self._read(size)
            opcode = first & 0x0F
            if opcode == PING:
                self.sock.sendall(self.frame(payload, PONG))
            elif opcode == CLOSING:
                raise OSError(f"closed with {payload!r}")
            elif opcode == TEXT:
                return json.loads(payload)

    def ask(self, message: Any) -> dict[str, Any]:
        self.send(message)
        return self.receive()

    def close(self) -> None:
        self.sock.close()
