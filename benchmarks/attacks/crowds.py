"""Attacks by numbers: connections, sessions, waiting requests, attention cache, each from one address."""

import socket
import time
from contextlib import ExitStack, closing
from typing import Any

from benchmarks.attacks.client import Client, WebSocket, head
from benchmarks.attacks.target import Target, attack

CROWD = 130  # more than there are threads
HOLD = 12.0  # seconds for which an attack goes on: longer than a bystander may wait


def hold(target: Target, socks: ExitStack) -> None:
    """Let the connections stand for a while."""
    target.wait(HOLD)
    socks.close()


@attack(f"{CROWD} silent connections")
def silent(target: Target) -> str | None:
    with ExitStack() as socks:
        for _ in range(CROWD):
            socks.enter_context(target.client.connect())
        hold(target, socks)
    return None


@attack(f"{CROWD} half-sent heads")
def half_heads(target: Target) -> str | None:
    with ExitStack() as socks:
        for _ in range(CROWD):
            socks.enter_context(target.client.connect()).sendall(b"G")
        hold(target, socks)
    return None


@attack(f"{CROWD} half-sent bodies")
def half_bodies(target: Target) -> str | None:
    with ExitStack() as socks:
        for _ in range(CROWD):
            socks.enter_context(target.client.connect()).sendall(head("POST", "/api/v1/generate", 100) + b"{")
        hold(target, socks)
    return None


@attack(f"{CROWD} idle WebSockets")
def idle_websockets(target: Target) -> str | None:
    with ExitStack() as sockets:
        for _ in range(CROWD):
            sockets.enter_context(closing(target.client.websocket()))
        hold(target, sockets)
    return None


@attack("110 readers of a large file who do not read")
def slow_readers(target: Target) -> str | None:
    with ExitStack() as socks:
        for _ in range(110):
            sock = socks.enter_context(target.client.connect(receive_buffer=2048))
            sock.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
        hold(target, socks)
    return None


@attack("8 clients who do not close")
def lingering(target: Target) -> str | None:
    def linger() -> None:
        for _ in range(4):
            with target.client.connect() as sock:
                sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                while sock.recv(65536):
                    pass  # up to the program's end of the connection; ours stays open
                target.wait(3)

    target.together([linger] * 8)
    return None


@attack("120 requests to one busy session")
def busy_session(target: Target) -> str | None:
    client = target.client
    session = client.post("/api/v1/open_inference_session", {"max_length": 4096})[1]["session_id"]
    with ExitStack() as socks:
        long = {"session_id": session, "inputs": "Once upon a time", "max_new_tokens": 4000}
        socks.enter_context(client.send("/api/v1/generate", long))
        for _ in range(120):
            request = {"session_id": session, "inputs": "x", "max_new_tokens": 1}
            socks.enter_context(client.send("/api/v1/generate", request))
        hold(target, socks)
    client.post("/api/v1/close_inference_session", {"session_id": session})
    return None


@attack("64 sessions hoarded")
def hoarded_sessions(target: Target) -> str | None:
    sessions = [open_session(target.client, 16) for _ in range(64)]
    target.wait(HOLD)
    close_sessions(target.client, sessions)
    return None


@attack("20 sessions that hold all attention cache")
def hoarded_cache(target: Target) -> str | None:
    longest = target.client.call("GET", "/v1/models")[1]["data"][0]["max_model_len"]
    sessions = []
    for _ in range(20):
        sessions.append(open_session(target.client, longest))
        request = {"session_id": sessions[-1], "inputs": "x", "max_new_tokens": 1}
        target.client.status("/api/v1/generate", request)
    target.wait(HOLD)
    close_sessions(target.client, sessions)
    return None


def open_session(client: Client, length: int) -> str | None:
    """Open a session; None if it is refused."""
    status, body = client.call("GET", f"/api/v1/open_inference_session?max_length={length}", timeout=60)
    return body["session_id"] if status == 200 else None


def close_sessions(client: Client, sessions: list[str | None]) -> None:
    for session in filter(None, sessions):
        client.post("/api/v1/close_inference_session", {"session_id": session})


@attack("a flood on a WebSocket that does not read")
def flood(target: Target) -> str | None:
    """Refusals that nobody reads, then messages of a megabyte; a thousand bytes each, if they may be compressed."""
    before = target.memory()
    with closing(target.client.websocket(timeout=5.0, deflate=True, receive_buffer=2048)) as websocket:
        refused = WebSocket.frame(b"x") * 200
        large = WebSocket.frame(b"x" * 1_000_000)
        sent = try_to_send(websocket.sock, [refused] * 150) + try_to_send(websocket.sock, [large] * 200)
        target.wait(2)
        grown = target.memory() - before
    return f"{grown} MiB held after {sent >> 20} MiB sent" if grown > 100 else None


def try_to_send(sock: socket.socket, frames: list[bytes]) -> int:
    """Send until the other side takes no more; return how many bytes."""
    sent = 0
    try:
        for frame in frames:
            sock.sendall(frame)
            sent += len(frame)
    except OSError:  # it closes, or does not read: as it should
        return sent
    return sent


@attack("64 answers at a time from one address")
def many_answers(target: Target) -> str | None:
    """Nobody may be refused for that, and the others have to wait a little only."""
    statuses: list[Any] = []

    def ask() -> None:
        deadline = time.monotonic() + HOLD
        while time.monotonic() < deadline:
            body = {"inputs": "Once upon a time", "max_new_tokens": 20}
            statuses.append(target.client.status("/api/v1/generate", body))

    target.together([ask] * 64)
    return None if set(statuses) <= {200, 429} else f"{set(statuses)}"
