"""A small app behind the front door, for test_front.py: it echoes, streams, waits, and tells what it has seen."""

import contextlib
import io
import socket
import threading
from collections.abc import Iterator
from typing import Any

from flask import Flask, Response, request, send_file
from werkzeug.wrappers.response import Response as WerkzeugResponse

from config import Settings
from swarm.errors import Cancelled
from web.client_socket import RequestWaiter, client_socket, limit_sends

FILE = bytes(range(256)) * 5600  # 1.4 MB, as the largest file of the program
WAIT = 20.0  # seconds; a test that needs more has failed

settings = Settings.from_environment()
app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = settings.MAX_BODY_BYTES
lock = threading.Lock()
seen: dict[str, int] = {"busy": 0, "gone": 0, "streams_ended": 0}
events = {name: threading.Event() for name in ("release", "go")}


def count(name: str, by: int = 1) -> None:
    with lock:
        seen[name] += by


@app.get("/healthz")
def healthz() -> dict[str, int]:
    return seen


@app.route("/echo", methods=["GET", "POST"])
def echo() -> dict[str, Any]:
    return {"body": request.get_data(as_text=True), "peer": request.remote_addr, "mark": request.args.get("mark")}


@app.get("/file")
def file() -> Response:
    return send_file(io.BytesIO(FILE), mimetype="application/octet-stream")


@app.get("/disk_file")
def disk_file() -> Response:
    return send_file(__file__)


@app.get("/busy")
def busy() -> str:
    count("busy")
    try:
        events["release"].wait(WAIT)
    finally:
        count("busy", -1)
    return "released"


@app.post("/set/<name>")
def set_event(name: str) -> str:
    events[name].set()
    return "set"


@app.post("/clear/<name>")
def clear_event(name: str) -> str:
    events[name].clear()
    return "cleared"


@app.get("/pieces")
def pieces() -> Response:
    def steps() -> Iterator[str]:
        yield "first"
        assert events["go"].wait(WAIT)
        yield "second"

    return Response(steps(), mimetype="text/plain")


@app.get("/endless")
def endless() -> Response:
    sock = client_socket(request.environ)
    assert sock is not None
    limit_sends(sock, settings.SEND_TIMEOUT)

    def steps() -> Iterator[bytes]:
        try:
            while True:
                yield bytes(65536)
        finally:
            count("streams_ended")

    return Response(steps())


@app.get("/until_gone")
def until_gone() -> str:
    waiter = RequestWaiter(request.environ)
    pause = threading.Event()
    for _ in range(int(WAIT / 0.05)):
        try:
            waiter.look()
        except Cancelled:
            count("gone")
            break
        pause.wait(0.05)
    return "done"


@app.get("/fails_midway")
def fails_midway() -> Response:
    def steps() -> Iterator[str]:
        yield "begin"
        raise ValueError("on purpose")

    return Response(steps())


@app.get("/detach")
def detach() -> WerkzeugResponse:
    raw, unread = request.environ["front.detach"]()
    threading.Thread(target=echo_bytes, args=(raw, unread), daemon=True).start()
    return HandedOver()


class HandedOver(Response):
    def __call__(self, *args: Any) -> Any:
        raise StopIteration  # as WebSockets do


def echo_bytes(raw: socket.socket, unread: bytes) -> None:
    assert type(raw) is socket.socket and raw.gettimeout() is None
    with raw, contextlib.suppress(OSError):
        raw.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + unread)
        while data := raw.recv(1000):
            raw.sendall(data)
