"""The transport of WebSockets, over socket pairs and without an app: what is read, what is held, and how it ends."""

import base64
import contextlib
import dataclasses
import logging
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from admission.fair_pool import FairPool
from tests.test_session import wait_until
from web import websocket as one_websocket
from web import websocket_hub
from web.websocket import READ_SIZE, UNSEEN_BYTES, UNSEEN_MESSAGES, UNSENT_BYTES, Closed, Limits, WebSocket
from web.websocket_handshake import BadHandshake, accept_handshake
from web.websocket_hub import Hub, NoRoom

TIMEOUT = 20  # seconds
TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10
LIMITS = Limits(max_websockets=8, max_message=1_000_000, ping_interval=TIMEOUT, send_timeout=TIMEOUT)
HANDSHAKE = {
    "REQUEST_METHOD": "GET",
    "HTTP_CONNECTION": "keep-alive, Upgrade",
    "HTTP_UPGRADE": "WebSocket",
    "HTTP_SEC_WEBSOCKET_VERSION": "13",
    "HTTP_SEC_WEBSOCKET_KEY": "dGhlIHNhbXBsZSBub25jZQ==",  # RFC 6455, section 1.3
    "HTTP_SEC_WEBSOCKET_EXTENSIONS": "permessage-deflate",
}


def frame(payload: bytes = b"", opcode: int = TEXT, *, fin: bool = True, masked: bool = True, rsv: int = 0) -> bytes:
    head = bytes([fin << 7 | rsv << 4 | opcode])
    mask = 0x80 if masked else 0
    size = len(payload)
    if size < 126:
        head += bytes([mask | size])
    elif size < 65536:
        head += bytes([mask | 126]) + struct.pack("!H", size)
    else:
        head += bytes([mask | 127]) + struct.pack("!Q", size)
    return head + (b"\0\0\0\0" if masked else b"") + payload  # a mask of zeros changes nothing


class Peer:
    """A connection, seen from its client, and what the server side notices of it."""

    def __init__(self, hub: Hub, address: str = "a", *, tcp: bool = False, leftover: bytes = b"") -> None:
        self.sock, ours = tcp_pair() if tcp else socket.socketpair()
        self.sock.settimeout(TIMEOUT)
        self._stream = self.sock.makefile("rb")
        self.ready: queue.SimpleQueue[None] = queue.SimpleQueue()
        try:
            self.websocket: WebSocket = hub.adopt(lambda: (ours, leftover), address)
        except BaseException:
            ours.close()
            self.leave()
            raise
        self.websocket.start(lambda: self.ready.put(None))

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self) -> tuple[int, bytes]:
        """Return the opcode and the payload of the next frame; raise EOFError at the end."""
        head = self._read(2)
        assert head[0] & 0xF0 == 0x80 and head[1] < 0x80, "whole, without extensions and without a mask"
        size = head[1]
        if size == 126:
            (size,) = struct.unpack("!H", self._read(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self._read(8))
        return head[0] & 0xF, self._read(size)

    def _read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def close_code(self) -> int:
        """Return the code of the server's closing frame, behind which nothing comes."""
        opcode, payload = self.receive()
        assert opcode == CLOSE
        with pytest.raises(EOFError):
            self.receive()
        return struct.unpack("!H", payload[:2])[0]

    def take(self) -> str | bytes | None:
        """Be who handles the connection: wait until there is something, and take it."""
        self.ready.get(timeout=TIMEOUT)
        message = self.websocket.take()
        (self.websocket.done if message is not None else self.websocket.finish)()
        return message

    def leave(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()
        self.sock.close()

    def vanish(self) -> None:
        """Reset the connection, one of TCP."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.leave()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    return theirs, ours


@pytest.fixture
def hub(caplog: pytest.LogCaptureFixture) -> Iterator[Hub]:
    hub = Hub(LIMITS)
    yield hub
    hub.shut_down()
    for websocket in list(hub._websockets):
        websocket.abandon()
        websocket.finish()
    wait_until(lambda: hub._thread is None, "the hub's thread did not end")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.fixture
def peer(hub: Hub) -> Iterator[Peer]:
    peer = Peer(hub)
    yield peer
    peer.leave()


def test_handshake() -> None:
    answer = accept_handshake(HANDSHAKE).decode()
    assert answer.startswith("HTTP/1.1 101 ") and answer.endswith("\r\n\r\n")
    assert "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in answer
    assert "deflate" not in answer  # what is small on the wire could be large here


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"REQUEST_METHOD": "HEAD"}, 400),
        ({"HTTP_UPGRADE": ""}, 426),
        ({"HTTP_CONNECTION": "keep-alive"}, 426),
        ({"HTTP_SEC_WEBSOCKET_VERSION": "8"}, 426),
        ({"HTTP_SEC_WEBSOCKET_KEY": ""}, 400),
        ({"HTTP_SEC_WEBSOCKET_KEY": "é" * 22 + "=="}, 400),
        ({"HTTP_SEC_WEBSOCKET_KEY": base64.b64encode(b"short").decode()}, 400),
    ],
)
def test_bad_handshake(changes: dict[str, str], status: int) -> None:
    with pytest.raises(BadHandshake) as refused:
        accept_handshake({**HANDSHAKE, **changes})
    assert refused.value.status == status
    assert bool(refused.value.headers) == (status == 426)


def test_messages_come_in_order_and_answers_go_back(peer: Peer) -> None:
    peer.send(b"".join(frame(f"message {i} ©".encode()) for i in range(40)))
    for i in range(40):
        assert peer.take() == f"message {i} ©"
    peer.websocket.send("one", "two", "x" * 70_000)
    assert [peer.receive() for _ in range(3)] == [(TEXT, b"one"), (TEXT, b"two"), (TEXT, b"x" * 70_000)]


def test_one_handler_at_a_time(peer: Peer) -> None:
    peer.send(frame(b"a") + frame(b"b"))
    peer.ready.get(timeout=TIMEOUT)
    assert peer.websocket.take() == "a"
    peer.send(frame(b"c"))
    wait_until(lambda: len(peer.websocket._messages) == 2, "it was not read")
    assert peer.ready.empty()  # until it is done
    peer.websocket.done()
    assert [peer.take(), peer.take()] == ["b", "c"]


def test_what_the_server_has_read_already_is_not_lost(hub: Hub) -> None:
    peer = Peer(hub, leftover=frame(b"early") + frame(b"half")[:3])
    assert peer.take() == "early"
    peer.send(frame(b"half")[3:])
    assert peer.take() == "half"
    peer.leave()


def test_fragments_with_control_frames_between_them(peer: Peer) -> None:
    euro = "€".encode()
    peer.send(frame(b"a" + euro[:1], fin=False) + frame(b"1", PING) + frame(b"", CONTINUATION, fin=False))
    peer.send(frame(euro[1:2], CONTINUATION, fin=False) + frame(b"2", PING))
    peer.send(frame(euro[2:] + b"b", CONTINUATION) + frame(b"unasked", PONG))
    assert peer.take() == "a€b"
    assert [peer.receive(), peer.receive()] == [(PONG, b"1"), (PONG, b"2")]


def test_binary_messages(peer: Peer) -> None:
    peer.send(frame(b"\xff", BINARY, fin=False) + frame(b"\0", CONTINUATION))
    assert peer.take() == b"\xff\0"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(b"\xff"), 1007),
        (frame(b"\xe2\x82", fin=True), 1007),
        (frame(b"a", masked=False), 1002),
        (frame(b"a", rsv=4), 1002),  # compressed, which nobody has agreed on
        (frame(b"a", opcode=3), 1002),
        (frame(b"a", CONTINUATION), 1002),
        (frame(b"a", fin=False) + frame(b"b"), 1002),
        (frame(b"a", PING, fin=False), 1002),
        (frame(b"a" * 126, PING), 1002),
        (frame(b"\0", CLOSE), 1002),
        (frame(struct.pack("!H", 1005), CLOSE), 1002),
        (frame(struct.pack("!H", 1000) + b"\xff", CLOSE), 1007),
        (frame(b"a" * 1_000_001), 1009),
        (frame(b"a" * 600_000, fin=False) + frame(b"a" * 600_000, CONTINUATION), 1009),
        (frame("é".encode() * 500_001), 1009),  # bytes count
    ],
)
def test_what_is_not_allowed_ends_the_connection_with_a_reason(peer: Peer, data: bytes, code: int) -> None:
    def send() -> None:
        with contextlib.suppress(OSError):  # it is not read to its end
            peer.send(data)

    sender = threading.Thread(target=send)
    sender.start()
    assert peer.close_code() == code
    assert peer.take() is None and peer.websocket.close_code == code
    peer.leave()
    sender.join(TIMEOUT)


def test_largest_message(peer: Peer) -> None:
    peer.send(frame(b"x" * 1_000_000))
    assert peer.take() == "x" * 1_000_000


@pytest.mark.parametrize(
    ("payload", "code"), [(b"", 1005), (struct.pack("!H", 1000), 1000), (struct.pack("!H", 4000) + b"bye", 4000)]
)
def test_client_closes(peer: Peer, payload: bytes, code: int) -> None:
    peer.send(frame(b"last") + frame(payload, CLOSE))
    assert peer.take() == "last" and peer.take() is None
    assert peer.websocket.close_code == code
    assert peer.receive() == (CLOSE, payload)
    with pytest.raises(EOFError):
        peer.receive()
    with pytest.raises(Closed):
        peer.websocket.send("too late")


def test_server_closes_and_waits_for_the_client(peer: Peer, hub: Hub) -> None:
    peer.websocket.send("last")
    peer.websocket.close(4001, "elsewhere")
    peer.websocket.close(1000, "once is enough")
    assert peer.receive() == (TEXT, b"last")
    assert peer.receive() == (CLOSE, struct.pack("!H", 4001) + b"elsewhere")
    assert not peer.websocket.closed.is_set()
    peer.send(frame(b"ignored") + frame(struct.pack("!H", 4001), CLOSE))
    peer.leave()
    assert peer.websocket.closed.wait(TIMEOUT)
    assert peer.take() is None and peer.websocket.close_code == 4001
    wait_until(lambda: len(hub) == 0, "its place was not given back")


def test_client_that_does_not_close_in_its_turn(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_websocket, "CLOSING_LIMIT", 0.1)
    peer.websocket.close(1000, "bye")
    assert peer.websocket.closed.wait(TIMEOUT)


def test_half_closed_connections_are_lost(peer: Peer) -> None:
    peer.send(frame(b"last") + frame(b"half")[:3])
    peer.sock.shutdown(socket.SHUT_WR)
    assert peer.take() == "last" and peer.take() is None
    assert peer.websocket.close_code == 1006


@pytest.mark.parametrize("stage", ["at once", "within a frame", "with a message", "while sent to", "closing"])
def test_client_that_vanishes(hub: Hub, stage: str) -> None:
    peer = Peer(hub, tcp=True)
    if stage == "within a frame":
        peer.send(frame(b"abc")[:4])
    elif stage == "with a message":
        peer.send(frame(b"abc"))
        peer.ready.get(timeout=TIMEOUT)
    elif stage == "while sent to":
        sender = threading.Thread(target=send_until_closed, args=(peer.websocket,))
        sender.start()
        wait_until(lambda: len(peer.websocket._out) > UNSENT_BYTES, "it was all taken")
    elif stage == "closing":
        peer.websocket.close(1000, "bye")
    peer.vanish()
    assert peer.websocket.closed.wait(TIMEOUT)
    if stage == "while sent to":
        sender.join(TIMEOUT)
        assert not sender.is_alive()
    if stage == "with a message":
        assert peer.websocket.take() == "abc"
        peer.websocket.done()
    while peer.take() is not None:
        pass
    assert peer.websocket.close_code == (1000 if stage == "closing" else 1006)
    wait_until(lambda: len(hub) == 0, "its place was not given back")


def send_until_closed(websocket: WebSocket) -> None:
    with contextlib.suppress(Closed):
        while True:
            websocket.send("x" * 10_000)


def test_socket_that_is_dead_already(hub: Hub) -> None:
    theirs, ours = tcp_pair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    websocket = hub.adopt(lambda: (ours, b""), "a", b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
    ready = threading.Event()
    websocket.start(ready.set)
    assert ready.wait(TIMEOUT) and websocket.close_code == 1006
    websocket.finish()


def test_client_that_goes_while_it_is_taken_over(hub: Hub) -> None:
    def take() -> tuple[socket.socket, bytes]:
        raise BrokenPipeError

    hub.limits = dataclasses.replace(LIMITS, max_websockets=1)
    for _ in range(3):
        with pytest.raises(BrokenPipeError):
            hub.adopt(take, "a")
    Peer(hub).leave()  # the place is free


def test_flood_stays_with_the_client(peer: Peer) -> None:
    """100 MB are sent, and nobody takes them: all but one message stays in the kernel, or is not sent."""
    message = frame(b"x" * 1_000_000)
    peer.sock.settimeout(0.5)
    with pytest.raises(TimeoutError):
        for _ in range(100):
            peer.send(message)
    websocket = peer.websocket
    assert websocket.held + len(websocket._protocol._proto._frame_decoder.buffer) <= 1_000_000 + READ_SIZE
    peer.sock.settimeout(TIMEOUT)
    assert peer.take() == "x" * 1_000_000  # and who takes gets the next


@pytest.mark.parametrize("size", [2, 10_000])
def test_small_messages_are_bounded_by_number_and_size(peer: Peer, size: int) -> None:
    peer.sock.settimeout(0.5)
    sent = 0
    with pytest.raises(TimeoutError):
        while True:
            peer.send(frame(b"x" * size))
            sent += 1
    held = len(peer.websocket._messages)
    assert held == min(UNSEEN_MESSAGES, UNSEEN_BYTES // size + 1) < sent
    for _ in range(min(sent, 100)):  # what the kernel has comes behind
        assert peer.take() == "x" * size


def test_flood_of_the_smallest_frames_leaves_the_thread_to_others(
    peer: Peer, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket_hub, "TICK", TIMEOUT)
    other = Peer(hub)  # looked at in the first tick
    peer.send(b"".join(frame(str(i % 10).encode(), PING) for i in range(1005)))
    wait_until(lambda: peer.websocket._frames == 1000, "it was not read")
    other.send(frame(b"a"))
    assert other.take() == "a" and peer.websocket._frames == 1000
    peer.websocket.tick(time.monotonic())
    hub.poke(peer.websocket)
    for _ in range(100):
        assert peer.receive()[0] == PONG
    wait_until(lambda: peer.websocket._frames == 5, "the rest was not read")
    other.leave()


def test_looking_ahead(peer: Peer) -> None:
    """What was looked at makes room for what comes behind it."""
    count = 3 * UNSEEN_MESSAGES
    peer.send(b"".join(frame(str(i).encode()) for i in range(count)))
    peer.ready.get(timeout=TIMEOUT)
    websocket = peer.websocket
    assert websocket.take() == "0"
    seen: list[str | bytes] = []

    def look() -> bool:
        while (message := websocket.look()) is not None:
            if message == "20":
                websocket.withdraw()
            else:
                seen.append(message)
        return len(seen) == count - 2

    wait_until(look, "what is behind was not read")
    assert seen == [str(i) for i in range(1, count) if i != 20]
    assert websocket.ahead == (count - 2, sum(map(len, seen)))
    websocket.reset_lookahead()
    assert websocket.ahead == (0, 0) and websocket.look() == "1"
    websocket.done()
    assert [peer.take() for _ in range(count - 2)] == seen
    assert websocket.ahead == (0, 0) and websocket.held == 0


def test_all_connections_together_hold_a_bounded_amount(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that holds most gives way, not who has a message of the largest size."""
    monkeypatch.setattr(websocket_hub, "TOTAL_BYTES", 2_500_000)
    modest, *greedy = [Peer(hub, address) for address in ("modest", "greedy", "greedy", "greedy")]
    for peer in (modest, *greedy[:2]):
        peer.send(frame(b"x" * 900_000, fin=False))
        wait_until(lambda peer=peer: peer.websocket.held == 900_000, "it was not read")
    with contextlib.suppress(OSError):
        greedy[2].send(frame(b"x" * 950_000, fin=False))
    wait_until(lambda: sum(peer.websocket.connected for peer in greedy) == 2, "none was ended")
    (ended,) = [peer for peer in greedy if not peer.websocket.connected]
    assert ended.websocket.close_code == 1013
    modest.send(frame(b"x", CONTINUATION))
    assert modest.take() == "x" * 900_001
    for peer in (modest, *greedy):
        peer.leave()


def test_sender_waits_for_a_slow_client_but_not_for_ever(peer: Peer, hub: Hub) -> None:
    sent: list[int] = []

    def send() -> None:
        with contextlib.suppress(Closed):
            for i in range(200):
                peer.websocket.send("x" * 10_000)
                sent.append(i)

    sender = threading.Thread(target=send)
    sender.start()
    wait_until(lambda: len(peer.websocket._out) > UNSENT_BYTES, "it was all taken")
    assert len(peer.websocket._out) <= UNSENT_BYTES + 10_010 and len(sent) < 100
    assert [peer.receive() for _ in range(100)] == [(TEXT, b"x" * 10_000)] * 100
    hub.limits = dataclasses.replace(LIMITS, send_timeout=0.3)
    sender.join(TIMEOUT)
    assert not sender.is_alive() and len(sent) < 200
    assert peer.take() is None and peer.websocket.close_code == 1006


def fill(peer: Peer) -> int:
    """Send until the kernel takes no more, and sending does not yet wait; return how many messages."""
    count = 0
    while not peer.websocket._out:
        peer.websocket.send("x" * 10_000)
        count += 1
    return count


def test_offers_are_merged_as_pongs_are(peer: Peer) -> None:
    count = fill(peer)
    for i in range(10):
        peer.websocket.offer(str(i))  # does not wait
    peer.send(frame(b"a", PING) + frame(b"b", PING) + frame(b"behind"))
    assert peer.take() == "behind"
    assert [peer.receive() for _ in range(count)] == [(TEXT, b"x" * 10_000)] * count
    assert [peer.receive(), peer.receive()] == [(PONG, b"b"), (TEXT, b"9")]


def test_offer_is_overtaken_by_what_must_be_sent(peer: Peer) -> None:
    count = fill(peer)
    peer.websocket.offer("late")
    peer.websocket.send("after")
    assert [peer.receive() for _ in range(count)] == [(TEXT, b"x" * 10_000)] * count
    assert peer.receive() == (TEXT, b"after")
    peer.websocket.offer("next")
    assert peer.receive() == (TEXT, b"next")


def test_client_that_takes_no_data_is_given_up_without_a_sender(peer: Peer, hub: Hub) -> None:
    hub.limits = dataclasses.replace(LIMITS, send_timeout=0.2)
    peer.websocket.send("x" * 10_000_000)  # into the buffer; there was room
    assert peer.take() is None and peer.websocket.close_code == 1006


def test_who_does_not_take_answers_asks_no_more_questions(peer: Peer) -> None:
    """So nobody who handles one waits to send to it."""
    peer.send(frame(b"first"))
    peer.ready.get(timeout=TIMEOUT)
    assert peer.websocket.take() == "first"
    peer.websocket.send("x" * 10_000_000)
    peer.send(frame(b"second"))
    wait_until(lambda: len(peer.websocket._messages) == 1, "it was not read")
    peer.websocket.done()
    assert peer.ready.empty()
    assert peer.receive() == (TEXT, b"x" * 10_000_000)
    assert peer.take() == "second"


def test_abandoning_wakes_the_sender(peer: Peer) -> None:
    sender = threading.Thread(target=send_until_closed, args=(peer.websocket,))
    sender.start()
    wait_until(lambda: len(peer.websocket._out) > UNSENT_BYTES, "it was all taken")
    peer.websocket.abandon()
    sender.join(TIMEOUT)
    assert not sender.is_alive() and peer.websocket.close_code == 1006


def test_silent_clients_are_given_up(hub: Hub) -> None:
    hub.limits = dataclasses.replace(LIMITS, ping_interval=0.2)
    silent, lively = Peer(hub), Peer(hub)
    stop = threading.Event()

    def live() -> None:
        with contextlib.suppress(OSError, EOFError):
            while not stop.is_set():
                opcode, payload = lively.receive()
                if opcode == PING:
                    lively.send(frame(payload, PONG))

    living = threading.Thread(target=live)
    living.start()
    assert silent.receive() == silent.receive() == (PING, b"")
    wait_until(lambda: not silent.websocket.connected, "it was not given up")
    assert silent.websocket.close_code == 1008 and lively.websocket.connected
    stop.set()
    lively.websocket.abandon()
    living.join(TIMEOUT)
    silent.leave()
    lively.leave()


def test_connection_that_asks_for_nothing_is_closed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_websocket, "OPENING_LIMIT", 0.1)
    monkeypatch.setattr(websocket_hub, "TICK", 0.05)
    idle, busy, engaged = Peer(hub), Peer(hub), Peer(hub)
    engaged.websocket.engaged = True
    busy.send(frame(b"work"))
    busy.ready.get(timeout=TIMEOUT)
    assert idle.close_code() == 1008
    assert busy.websocket.connected and engaged.websocket.connected
    for peer in (idle, busy, engaged):
        peer.leave()


def test_places_go_to_who_has_fewer(hub: Hub) -> None:
    mine = [Peer(hub, "many") for _ in range(6)]
    mine[0].websocket.engaged = True
    mine[1].send(frame(b"work"))
    mine[1].ready.get(timeout=TIMEOUT)
    others = [Peer(hub, "few"), Peer(hub, "one")]
    newcomer = Peer(hub, "new")
    assert mine[2].close_code() == 1013  # the oldest that nobody would miss
    assert mine[2].take() is None
    again = Peer(hub, "many")  # takes its own
    assert mine[3].close_code() == 1013
    assert all(peer.websocket.connected for peer in (*mine[:2], *mine[4:], *others, newcomer, again))
    for peer in (*mine[4:], again):
        peer.websocket.engaged = True
    count = len(hub)
    with pytest.raises(NoRoom, match="8"):
        Peer(hub, "newest")
    assert len(hub) == count
    for peer in (*mine, *others, newcomer, again):
        peer.leave()


def test_who_is_put_to_use_keeps_its_place(hub: Hub) -> None:
    """Also if it was to give way to one whose connection is still being taken over."""
    mine = [Peer(hub, "many") for _ in range(8)]
    theirs, ours = tcp_pair()

    def take() -> tuple[socket.socket, bytes]:
        mine[0].websocket.engaged = True
        return ours, b""

    newcomer = hub.adopt(take, "new")
    assert mine[1].close_code() == 1013
    assert newcomer.connected and all(peer.websocket.connected for peer in (mine[0], *mine[2:]))
    newcomer.abandon()
    newcomer.finish()
    theirs.close()
    for peer in mine:
        peer.leave()


def test_newcomers_displace_one_each(hub: Hub) -> None:
    mine = [Peer(hub, "many") for _ in range(8)]
    pairs, newcomers = [tcp_pair(), tcp_pair()], []

    def take_after_another() -> tuple[socket.socket, bytes]:
        newcomers.append(hub.adopt(lambda: (pairs[1][1], b""), "other"))
        return pairs[0][1], b""

    newcomers.append(hub.adopt(take_after_another, "new"))
    assert [peer.close_code() for peer in mine[:2]] == [1013, 1013]
    assert all(websocket.connected for websocket in (*newcomers, *(peer.websocket for peer in mine[2:])))
    for newcomer, (theirs, _) in zip(newcomers, pairs, strict=True):
        newcomer.abandon()
        newcomer.finish()
        theirs.close()
    for peer in mine:
        peer.leave()


def test_newcomer_goes_if_nobody_can_give_way_any_more(hub: Hub) -> None:
    mine = [Peer(hub, "many") for _ in range(8)]
    theirs, ours = tcp_pair()

    def take() -> tuple[socket.socket, bytes]:
        for peer in mine:
            peer.websocket.engaged = True
        return ours, b""

    newcomer = hub.adopt(take, "new")
    assert newcomer.close_code == 1013 and all(peer.websocket.connected for peer in mine)
    newcomer.finish()
    theirs.close()
    for peer in mine:
        peer.leave()


def test_shutting_down(hub: Hub) -> None:
    idle, busy = Peer(hub), Peer(hub)
    busy.send(frame(b"work") + frame(b"more"))
    busy.ready.get(timeout=TIMEOUT)
    assert busy.websocket.take() == "work"
    hub.shut_down()
    assert idle.close_code() == 1001 and idle.take() is None
    busy.websocket.send("done")
    assert busy.receive() == (TEXT, b"done")
    busy.websocket.done()
    assert busy.close_code() == 1001
    with pytest.raises(Closed):
        Peer(hub)
    idle.leave()
    busy.leave()
    assert idle.websocket.closed.wait(TIMEOUT) and busy.websocket.closed.wait(TIMEOUT)


def test_fault_of_one_connection_ends_that_one_alone(
    hub: Hub, peer: Peer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = Peer(hub)

    def fail(data: bytes) -> None:
        raise RuntimeError("a fault of the parser's")

    monkeypatch.setattr(peer.websocket._protocol, "receive_data", fail)
    peer.send(frame(b"a"))
    assert peer.take() is None
    other.send(frame(b"a"))
    assert other.take() == "a"
    assert "a fault of the parser's" in caplog.text
    caplog.clear()
    other.leave()


FRAMES = st.builds(
    frame,
    st.binary(max_size=140),
    st.integers(0, 15),
    fin=st.booleans(),
    masked=st.sampled_from([True, True, True, False]),
    rsv=st.sampled_from([0, 0, 0, 0, 1, 2, 4]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(FRAMES, FRAMES, st.binary(max_size=40)), max_size=8))
def test_whatever_is_sent_the_others_are_served(hub: Hub, parts: list[bytes]) -> None:
    peer, other = Peer(hub), Peer(hub, "other")
    with contextlib.suppress(OSError):
        for part in parts:
            peer.send(part)
        peer.sock.shutdown(socket.SHUT_WR)
    other.send(frame(b"a"))
    assert other.take() == "a"
    while peer.take() is not None:
        pass
    assert not peer.websocket.connected
    for one in (peer, other):
        one.leave()
    assert other.take() is None


def test_pool_serves_parties_by_turns() -> None:
    pool = FairPool("test", 1)
    begun, go = threading.Event(), threading.Event()
    order: list[str] = []
    ended = threading.Event()

    def job(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    def work() -> None:
        begun.set()
        assert go.wait(TIMEOUT)

    def fail() -> None:
        raise ValueError("of one job")

    pool.submit("busy", work)
    assert begun.wait(TIMEOUT)
    for i in range(3):
        pool.submit("busy", job(f"busy {i}"))
    pool.submit("other", job("other 0"))
    pool.submit("other", fail)
    pool.submit("third", job("third 0"))
    pool.submit("busy", ended.set)
    go.set()
    assert ended.wait(TIMEOUT)
    assert order == ["busy 0", "other 0", "third 0", "busy 1", "busy 2"]


def test_pool_has_no_more_threads_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("admission.fair_pool.PATIENCE", 0.2)
    pool = FairPool("few", 3)
    barrier = threading.Barrier(4)

    def meet() -> None:
        barrier.wait(TIMEOUT)

    for _ in range(3):
        pool.submit("a", meet)
    barrier.wait(TIMEOUT)  # three at a time
    done = threading.Event()
    for i in range(50):
        pool.submit(str(i), done.set if i == 49 else lambda: None)
    assert done.wait(TIMEOUT) and pool._threads <= 3
    wait_until(lambda: pool._threads == 0, "threads without work did not end")
