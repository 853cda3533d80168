"""The front door, with a small app, under real gunicorn: slow, silent and wrong clients harm nobody but themselves."""

import http.client
import json
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gunicorn.util
import pytest
from gunicorn.config import Config
from gunicorn.http.errors import ParseException

from front.answer_socket import CAPACITY, AnswerSocket
from front.connection import Connection
from front.lane import Lane
from front.request_reader import DISCARDED, MAX_HEAD, RequestReader
from tests.support.front_app import FILE
from tests.support.processes import ROOT, Program, running

THREADS = 100
SHARE = 90  # of one client
CONNECTIONS = 240
MAX_BODY = 100_000
WAIT = 20.0  # seconds; whoever waits so long has failed
GUNICORN = [
    sys.executable,
    "-m",
    "gunicorn",
    "tests.support.front_app:app",
    "--config",
    str(ROOT / "tests" / "support" / "front_conf.py"),
]
SETTINGS = {
    "REQUEST_READ_TIMEOUT": "1.5",
    "SEND_TIMEOUT": "1.5",
    "MAX_BODY_BYTES": str(MAX_BODY),
    "MAX_CONNECTIONS": str(CONNECTIONS),
    "QUEUE_TIMEOUT": "2",
}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with running(GUNICORN, tmp_path_factory.mktemp("front") / "log", **SETTINGS) as program:
        program.wait_ready("/healthz")
        yield program
    assert program.output.count("Traceback") == program.output.count("ValueError: on purpose"), program.output


@pytest.fixture
def connect(door: Program) -> Iterator[Callable[..., socket.socket]]:
    sockets: list[socket.socket] = []

    def connect(source: str = "127.0.0.1", receive_buffer: int | None = None) -> socket.socket:
        sock = socket.socket()
        sockets.append(sock)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(WAIT)
        sock.bind((source, 0))
        sock.connect(("127.0.0.1", door.port))
        return sock

    yield connect
    for sock in sockets:
        sock.close()


def answer(sock: socket.socket, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    response = http.client.HTTPResponse(sock, method=method)
    response.begin()
    return response.status, dict(response.getheaders()), response.read()


def ask(door: Program, path: str, method: str = "GET", body: bytes | None = None, source: str = "127.0.0.1") -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=WAIT, source_address=(source, 0))
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        assert response.status == 200
        return response.read()
    finally:
        connection.close()


def seen(door: Program) -> dict[str, int]:
    return json.loads(ask(door, "/healthz"))


def wait_for(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.05)


def everything(sock: socket.socket) -> bytes:
    """What comes until the other side closes."""
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def request(path: str, *lines: str, method: str = "GET", body: bytes = b"") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode() + body


def post(body: bytes, *lines: str) -> bytes:
    return request("/echo", f"Content-Length: {len(body)}", *lines, method="POST", body=body)


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


CHUNKED = request("/echo", "Transfer-Encoding: chunked", method="POST")


class TestSlowClients:
    """More of them than there are threads."""

    @pytest.mark.parametrize(
        "begin",
        [b"", b"GET /echo HTT", request("/echo", "Content-Length: 100", method="POST") + b"half", CHUNKED + b"5\r\nab"],
        ids=["silent", "half a head", "half a body", "half a chunk"],
    )
    def test_requests_that_are_not_whole(
        self, door: Program, connect: Callable[..., socket.socket], begin: bytes
    ) -> None:
        slow = [connect() for _ in range(130)]
        for sock in slow:
            sock.sendall(begin)
        assert json.loads(ask(door, "/echo?mark=1"))["mark"] == "1"
        for sock in slow:
            received = everything(sock)
            assert (
                received.startswith(b"HTTP/1.1 408 Request Timeout\r\n") and b"request_timeout" in received
                if begin
                else not received
            )

    def test_readers(self, door: Program, connect: Callable[..., socket.socket]) -> None:
        slow = [connect(receive_buffer=2048) for _ in range(110)]
        for sock in slow:
            sock.sendall(request("/file"))
        for sock in slow:
            assert sock.recv(1) == b"H"  # each has been given its thread, and has lost it again
        assert json.loads(ask(door, "/echo?mark=1"))["mark"] == "1"

    def test_a_slow_reader_that_goes_on_gets_everything(self, connect: Callable[..., socket.socket]) -> None:
        sock = connect(receive_buffer=65536)
        sock.sendall(request("/file", "Connection: close"))
        pause, data = threading.Event(), b""
        while piece := sock.recv(32768):
            data += piece
            pause.wait(0.05)
        assert data.endswith(b"\r\n\r\n" + FILE)

    def test_a_stream_that_nobody_reads_ends(self, door: Program, connect: Callable[..., socket.socket]) -> None:
        before = seen(door)["streams_ended"]
        connect(receive_buffer=2048).sendall(request("/endless"))
        wait_for(lambda: seen(door)["streams_ended"] == before + 1)

    def test_clients_that_do_not_close(self, door: Program, connect: Callable[..., socket.socket]) -> None:
        """gunicorn's own worker waits 2 s for each of them, and does nothing else meanwhile."""
        started = time.monotonic()
        for _ in range(8):
            sock = connect()
            sock.sendall(request("/healthz", "Connection: close"))
            assert everything(sock)
            seen(door)
        assert time.monotonic() - started < 8  # it would be 16

    def test_one_client_takes_many_threads(self, door: Program, connect: Callable[..., socket.socket]) -> None:
        busy = [connect() for _ in range(THREADS + 10)]
        for sock in busy:
            sock.sendall(request("/busy"))
        wait_for(lambda: seen(door)["busy"] == SHARE)
        for _ in range(3):
            assert ask(door, "/echo", source="127.0.0.2")
        waiting = connect()
        waiting.sendall(request("/echo"))
        assert answer(waiting)[0] == 503  # after QUEUE_TIMEOUT
        ask(door, "/set/release", method="POST", source="127.0.0.2")
        assert sorted(answer(sock)[0] for sock in busy) == [200] * SHARE + [503] * (len(busy) - SHARE)
        wait_for(lambda: seen(door)["busy"] == 0)
        ask(door, "/clear/release", method="POST")

    def test_two_clients_take_all_threads(self, door: Program, connect: Callable[..., socket.socket]) -> None:
        busy = [connect("127.0.0.2") for _ in range(THREADS - SHARE)] + [connect() for _ in range(SHARE)]
        for sock in busy:
            sock.sendall(request("/busy"))
        wait_for(lambda: seen(door)["busy"] == THREADS)  # which `/healthz` tells whatever the load
        small = connect("127.0.0.3")
        small.sendall(request("/echo"))
        hoard = [connect() for _ in range(CONNECTIONS // 2 + 3)]
        for sock in hoard:
            sock.sendall(request("/echo"))
        # Four more than may wait. Those of who has most are turned away, and at once.
        wait_for(lambda: len(select.select(hoard, [], [], 0)[0]) == 4)
        refused = select.select(hoard, [], [], 0)[0]
        assert all(b"overloaded" in everything(sock) for sock in refused)
        door.send(signal.SIGUSR1)  # see front_conf.py: there is no thread to ask for it
        assert all(answer(sock)[0] == 200 for sock in [small, *busy, *hoard] if sock not in refused)
        ask(door, "/clear/release", method="POST")
        ask(door, "/clear/go", method="POST")


class TestPlaces:
    """More connections than there may be."""

    def test_who_has_most_gives_way(self, door: Program, connect: Callable[..., socket.socket]) -> None:
        hoard = [connect() for _ in range(CONNECTIONS)]
        hoard[0].sendall(b"GET / HT")  # the others are silent for longer
        assert json.loads(ask(door, "/echo", source="127.0.0.2"))["peer"] == "127.0.0.2"
        assert hoard[1].recv(1) == b""

    def test_one_client_alone_is_served_too(self, door: Program, connect: Callable[..., socket.socket]) -> None:
        for _ in range(CONNECTIONS):
            connect()
        assert ask(door, "/echo")

    def test_the_small_client_keeps_its_own(self, door: Program, connect: Callable[..., socket.socket]) -> None:
        small = connect("127.0.0.3")
        small.sendall(b"GET /echo HTTP/1.1\r\n")
        for _ in range(CONNECTIONS + 5):
            connect()
        small.sendall(b"Host: x\r\n\r\n")
        assert answer(small)[0] == 200


class TestRequests:
    def test_byte_by_byte(self, connect: Callable[..., socket.socket]) -> None:
        sock = connect()
        for byte in post(b"some body"):
            sock.sendall(bytes([byte]))
        assert json.loads(answer(sock)[2])["body"] == "some body"

    @pytest.mark.parametrize("size", [MAX_BODY + 1, 10 * MAX_BODY])
    @pytest.mark.parametrize("framing", ["length", "chunks"])
    def test_too_large(self, connect: Callable[..., socket.socket], framing: str, size: int) -> None:
        """The client sends everything before it reads; and may send more on the same connection."""
        sock = connect()
        body = b"x" * size
        sock.sendall(post(body) if framing == "length" else CHUNKED + chunked(body[:50_000], body[50_000:]))
        assert answer(sock)[0] == 413
        sock.sendall(post(b"more"))
        assert json.loads(answer(sock)[2])["body"] == "more"

    def test_far_too_large(self, connect: Callable[..., socket.socket]) -> None:
        sock = connect()
        sock.sendall(request("/echo", f"Content-Length: {DISCARDED * MAX_BODY + 1}", method="POST"))
        status, headers, _ = answer(sock)
        assert status == 413 and headers["Connection"] == "close"

    def test_chunks(self, connect: Callable[..., socket.socket]) -> None:
        sock = connect()
        last = request("/echo", "Transfer-Encoding: chunked", "Connection: close", method="POST")
        sock.sendall(CHUNKED + chunked(b"one", b"two") + last + b"3;a=b\r\nsix\r\n0\r\nTrailer: x\r\n\r\n")
        answers = everything(sock)
        assert [json.loads(line)["body"] for line in answers.splitlines() if line.startswith(b"{")] == ["onetwo", "six"]

    def test_expect_continue(self, connect: Callable[..., socket.socket]) -> None:
        sock = connect()
        sock.sendall(request("/echo", "Content-Length: 4", "Expect: 100-continue", method="POST"))
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"body")
        status, _, body = answer(sock)
        assert status == 200 and json.loads(body)["body"] == "body"

    def test_expect_continue_of_too_much(self, connect: Callable[..., socket.socket]) -> None:
        sock = connect()
        sock.sendall(request("/echo", f"Content-Length: {MAX_BODY + 1}", "Expect: 100-continue", method="POST"))
        assert b" 413 " in everything(sock).splitlines()[0]

    def test_pipelining(self, connect: Callable[..., socket.socket]) -> None:
        sock = connect()
        last = request("/echo?mark=last", "Connection: close")
        sock.sendall(b"".join(request(f"/echo?mark={number}") for number in range(20)) + post(b"body") + last)
        answers = everything(sock)
        marks = [json.loads(line)["mark"] for line in answers.splitlines() if line.startswith(b"{")]
        assert marks == [*map(str, range(20)), None, "last"]

    def test_keep_alive(self, connect: Callable[..., socket.socket]) -> None:
        sock = connect()
        for number in range(5):
            sock.sendall(request(f"/echo?mark={number}"))
            status, headers, body = answer(sock)
            assert (status, headers["Connection"], json.loads(body)["mark"]) == (200, "keep-alive", str(number))

    def test_client_that_ends_its_side_gets_the_answer(self, connect: Callable[..., socket.socket]) -> None:
        sock = connect()
        sock.sendall(request("/file"))
        sock.shutdown(socket.SHUT_WR)
        assert everything(sock).endswith(FILE)

    def test_head(self, connect: Callable[..., socket.socket]) -> None:
        sock = connect()
        sock.sendall(request("/file", method="HEAD"))
        status, headers, body = answer(sock, "HEAD")
        assert (status, body, headers["Connection"]) == (200, b"", "keep-alive")
        sock.sendall(request("/echo", "Connection: close"))
        assert answer(sock)[0] == 200

    def test_file_of_the_disk(self, door: Program) -> None:
        assert ask(door, "/disk_file") == Path(ROOT / "tests" / "support" / "front_app.py").read_bytes()

    def test_http_1_0(self, connect: Callable[..., socket.socket]) -> None:
        sock = connect()
        sock.sendall(b"GET /echo?mark=old HTTP/1.0\r\n\r\n")
        head, _, body = everything(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 200") and json.loads(body)["mark"] == "old"

    @pytest.mark.parametrize(
        ("wrong", "status"),
        [
            (b"nonsense\r\n\r\n", 400),
            (b"\r\n\r\n", 400),
            (b"GET / HTTP/1.1\nHost: x\n", 400),
            (b"GET / HTTP/9.9\r\n\r\n", 400),
            (request("/echo", "Content-Length: 3", "Content-Length: 4", method="POST", body=b"abc"), 400),
            (request("/echo", "Content-Length: -3", method="POST"), 400),
            (
                request("/echo", "Content-Length: 3", "Transfer-Encoding: chunked", method="POST", body=b"0\r\n\r\n"),
                400,
            ),
            (request("/echo", "Transfer-Encoding: gzip", method="POST"), 400),
            (request("/echo", "Transfer-Encoding: chunked, chunked", method="POST"), 400),
            (CHUNKED + b"x\r\n", 400),
            (CHUNKED + b"3\r\nabcd\r\n", 400),
            (CHUNKED + b"-1\r\n", 400),
            (CHUNKED + b"3\nabc\r\n", 400),
            (CHUNKED + b"0" * 9000, 400),
            (CHUNKED + b"0\r\n" + b"Trailer: x\r\n" * 1000, 431),
            (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
            (request("/", "A: " + "x" * 9000), 431),
            (b"GET / HTTP/1.1\r\n" + b"A: x\r\n" * (MAX_HEAD // 6), 431),
        ],
        ids=lambda value: str(value)[:60],
    )
    def test_wrong(self, door: Program, connect: Callable[..., socket.socket], wrong: bytes, status: int) -> None:
        sock = connect()
        sock.sendall(wrong)
        assert everything(sock).startswith(f"HTTP/1.1 {status} ".encode())

    def test_a_fault_of_the_loop_is_the_end_of_one_connection(self, connect: Callable[..., socket.socket]) -> None:
        harmed, other = connect(), connect()
        other.sendall(b"GET /echo HTTP/1.1\r\n")
        harmed.sendall(b"fail")  # see front_conf.py
        assert everything(harmed) == b""
        other.sendall(b"Host: x\r\n\r\n")
        assert answer(other)[0] == 200

    def test_failure_midway_cuts_the_answer(self, connect: Callable[..., socket.socket]) -> None:
        sock = connect()
        sock.sendall(request("/fails_midway"))
        received = everything(sock)
        assert b"begin" in received and not received.endswith(b"0\r\n\r\n")


class TestAnswers:
    def test_pieces_come_as_they_are_made(self, door: Program, connect: Callable[..., socket.socket]) -> None:
        sock = connect()
        sock.sendall(request("/pieces"))
        received = b""
        while b"first" not in received:
            received += sock.recv(1000)
        ask(door, "/set/go", method="POST")
        while not received.endswith(b"0\r\n\r\n"):
            received += sock.recv(1000)
        assert b"second" in received

    def test_hanging_up_is_noticed(self, door: Program, connect: Callable[..., socket.socket]) -> None:
        before = seen(door)["gone"]
        sock = connect()
        sock.sendall(request("/until_gone"))
        assert seen(door)["gone"] == before
        sock.close()
        wait_for(lambda: seen(door)["gone"] == before + 1)

    def test_detached_connections_are_left_alone(self, connect: Callable[..., socket.socket]) -> None:
        sock = connect()
        sock.sendall(request("/detach") + b"behind")
        expected = b"HTTP/1.1 101 Switching Protocols\r\n\r\nbehind"
        received = b""
        while len(received) < len(expected):
            received += sock.recv(1000)
        assert received == expected
        threading.Event().wait(2.0)  # longer than any limit of the front door
        sock.sendall(b"still there")
        assert sock.recv(1000) == b"still there"


def test_end(tmp_path: Path) -> None:
    """SIGTERM: requests that are whole are answered, the others are closed at once."""
    with running(GUNICORN, tmp_path / "log", **{**SETTINGS, "REQUEST_READ_TIMEOUT": "60"}) as program:
        program.wait_ready("/healthz")
        address = ("127.0.0.1", program.port)
        with ThreadPoolExecutor() as pool:
            socks = [socket.create_connection(address, timeout=WAIT) for _ in range(20)]
            running_one, *others = socks
            running_one.sendall(request("/pieces"))
            assert running_one.recv(1)
            for sock in others[10:]:
                sock.sendall(b"GET /ec")
            seen(program)
            program.send(signal.SIGTERM)
            assert [everything(sock) for sock in others] == [b""] * len(others)
            assert program.process.poll() is None
            program.family()[1].send_signal(signal.SIGUSR1)
            assert pool.submit(everything, running_one).result(WAIT).endswith(b"second\r\n0\r\n\r\n")
            for sock in socks:
                sock.close()
        assert program.process.wait(WAIT) == 0
        assert "Traceback" not in program.output


def test_memory_of_slow_clients(tmp_path: Path) -> None:
    """Who fills it has connections broken off, others do not."""
    environment = {**SETTINGS, "MAX_HELD": str(2_000_000), "REQUEST_READ_TIMEOUT": "30", "SEND_TIMEOUT": "30"}
    body = bytes(90_000)

    def connect(source: str) -> socket.socket:
        return socket.create_connection(("127.0.0.1", program.port), timeout=WAIT, source_address=(source, 0))

    with running(GUNICORN, tmp_path / "log", **environment) as program:
        program.wait_ready("/healthz")
        small, reader = connect("127.0.0.2"), connect("127.0.0.2")
        small.sendall(post(body)[:-1])
        reader.sendall(request("/file"))
        greedy = [connect("127.0.0.1") for _ in range(30)]
        for sock in greedy:
            sock.sendall(post(body)[:-1])
        (refused, *_), _, _ = select.select(greedy, [], [], WAIT)
        assert b"overloaded" in everything(refused)
        small.sendall(b"\0")
        assert answer(small)[0] == 200
        readers = [connect("127.0.0.1") for _ in range(20)]
        for sock in readers:
            sock.sendall(request("/endless"))
        wait_for(lambda: seen(program)["streams_ended"] > 0)
        assert answer(reader)[2] == FILE
        for sock in [small, reader, *greedy, *readers]:
            sock.close()
        wait_for(lambda: seen(program)["streams_ended"] == len(readers))


@pytest.mark.parametrize("option", ["--certfile=x", "--proxy-protocol=v1"])
def test_what_is_not_served_is_refused_at_start(option: str) -> None:
    command = [*GUNICORN, "--bind", "127.0.0.1:0", option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and option[2:].partition("=")[0].replace("-", "_") in done.stderr


class TestReader:
    @pytest.mark.parametrize(
        "sent",
        [
            request("/a?b=c", "X: y"),
            b"\r\n" + request("/a"),
            request("/a", "Content-Length: 5", method="POST", body=b"12345"),
            request("/a", "Transfer-Encoding: chunked", method="POST")
            + b"2\r\n12\r\nA ; x=y\r\n3456789012\r\n0\r\nA: b\r\nC: d\r\n\r\n",
        ],
        ids=["head", "empty line before", "length", "chunks"],
    )
    def test_wherever_it_is_cut(self, sent: bytes) -> None:
        """A request, and the beginning of the next one, come in two or three pieces, or byte by byte."""
        data = sent + b"GET /n"
        cuts = [(first, second) for first in range(len(data)) for second in (first + 1, first + 3, len(data))]
        bodies = set()
        for pieces in [[data[:a], data[a:b], data[b:]] for a, b in cuts] + [[bytes([byte]) for byte in data]]:
            reader = RequestReader(Config(), ("127.0.0.1", 1), 1000)
            whole = []
            for piece in filter(None, pieces):
                reader.feed(piece)
                if (request := reader.next_request()) is not None:
                    whole.append(request)
            (request,) = whole
            assert reader.unread == b"GET /n" and reader.begun
            bodies.add((request.path, request.body.read()))
        assert len(bodies) == 1
        assert bodies.pop()[1] in (b"", b"12345", b"123456789012")

    def test_memory_is_bounded(self) -> None:
        reader = RequestReader(Config(), ("127.0.0.1", 1), 1000)
        reader.feed(CHUNKED)
        for _ in range(DISCARDED - 1):
            reader.feed(b"3e8\r\n" + bytes(1000) + b"\r\n")
            assert reader.next_request() is None
            assert reader.held <= 1000
        reader.feed(b"0\r\n\r\n")
        request = reader.next_request()
        assert request is not None and request.body.read() == b""
        assert ("CONTENT-LENGTH", str((DISCARDED - 1) * 1000)) in request.headers

    def test_head_is_bounded(self) -> None:
        reader = RequestReader(Config(), ("127.0.0.1", 1), 1000)
        with pytest.raises(ParseException):
            for _ in range(MAX_HEAD):
                reader.feed(b"A: b\r\n")
                reader.next_request()


def test_steady_uploads_have_time() -> None:
    """A body that comes at 10 kB/s or faster is not cut off, if it is allowed."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = RequestReader(Config(), ("127.0.0.1", 1), MAX_BODY)
        conn = Connection(ours, ("127.0.0.1", 1), "", "127.0.0.1", reader, WAIT)
        for received, seconds in ((1, 15), (50_000, 20), (MAX_BODY, 25), (5 * MAX_BODY, 25)):
            reader.received = received
            conn.await_rest(15.0, MAX_BODY)
            assert conn.deadline - conn.began == pytest.approx(seconds, abs=0.01)


class TestAnswerSocket:
    @pytest.fixture
    def pair(self) -> Iterator[tuple[AnswerSocket, socket.socket]]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours, theirs:
            yield AnswerSocket(ours, 0.2, bytearray()), theirs

    def test_what_is_not_taken_is_kept(self, pair: tuple[AnswerSocket, socket.socket]) -> None:
        sock, client = pair
        pending = threading.Event()
        sock.on_pending = pending.set
        data = bytes(range(256)) * 6000
        sock.sendall(data)
        assert pending.is_set() and 0 < sock.pending < len(data)
        received = b""
        while len(received) < len(data):
            received += client.recv(65536)
            sock.flush()
        assert received == data and not sock.pending

    def test_who_takes_nothing_is_given_up(self, pair: tuple[AnswerSocket, socket.socket]) -> None:
        sock, client = pair
        with pytest.raises(BrokenPipeError):
            sock.sendall(bytes(2 * CAPACITY))
        assert sock.pending == 0
        with pytest.raises(BrokenPipeError):
            sock.sendall(b"more")
        while client.recv(65536):
            pass  # what the kernel had, and then the end

    def test_threads_wait_for_room(self, pair: tuple[AnswerSocket, socket.socket]) -> None:
        sock, client = pair
        sock.limit_sends(WAIT)
        data = bytes(range(256)) * (3 * CAPACITY // 256)
        with ThreadPoolExecutor() as pool:
            sending = pool.submit(sock.sendall, data)
            received = b""
            while len(received) < len(data):
                sock.flush()
                received += client.recv(65536)
            sending.result(WAIT)
        assert received == data

    def test_gunicorn_neither_ends_a_connection_nor_waits_for_its_client(
        self, pair: tuple[AnswerSocket, socket.socket], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither after a failure in the middle of an answer nor with an error of its own, which waits as the rest."""
        sock, client = pair
        sock.sendall(bytes(CAPACITY // 2))
        pending = sock.pending
        monkeypatch.setattr(AnswerSocket, "recv", None)  # it would read until the client closes
        gunicorn.util.close_graceful(sock)
        gunicorn.util.write_error(sock, 500, "Internal Server Error", "on purpose")
        assert not sock.broken and sock.raw.fileno() >= 0 and sock.raw.gettimeout() == 0.0
        assert sock.pending > pending
        received = b""
        while sock.pending:
            received += client.recv(65536)
            sock.flush()
        assert sock.raw.send(b"|end")
        while not received.endswith(b"|end"):
            received += client.recv(65536)
        assert received.startswith(bytes(CAPACITY // 2)) and b"on purpose" in received

    def test_peeking_waits_for_nobody(self, pair: tuple[AnswerSocket, socket.socket]) -> None:
        sock, client = pair
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        client.sendall(b"next")
        assert sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"n" == sock.recv(1)
        client.close()
        assert sock.recv(100) == b"ext" and sock.recv(1) == b""


def test_clients_take_turns() -> None:
    with ThreadPoolExecutor(1) as pool:
        lane: Lane[str] = Lane(pool, 10)
        for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
            lane.add(item[0], item)
        assert lane.newest_of_heaviest() == "a3"
        lane.remove("a2")
        assert [lane.take() for _ in range(6)] == ["a1", "b1", "c1", "a3", "c2", None]
        for item in ("a1", "b1", "c1", "a3", "c2"):
            lane.done(item)
        for number in range(12):
            lane.add("a", f"a{number}")
        assert [lane.take() for _ in range(10)] == [*(f"a{number}" for number in range(9)), None]
        lane.add("b", "b2")
        assert [lane.take(), lane.take(), len(lane)] == ["b2", None, 3]
        lane.done("b2")
        lane.done("a0")
        assert [lane.take(), lane.take()] == ["a9", None]
