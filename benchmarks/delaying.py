"""Distance on one machine: servers of a private swarm behind TCP proxies on loopback that delay what passes.

    with far_apart(local, options, one_way=0.05) as links:   # options: of each server
        ...                                                  # each server is 0.1 s of round trip from everybody
        links.one_way = 0.0                                  # from now on none

Each server announces its proxy in its own place, and knows the swarm's first peer by a proxy as well, so that every
connection passes one proxy, whoever has opened it. A proxy delays what passes in each direction; with a bandwidth, it
lets that much pass, of all connections of a server together. The proxies are a process of their own.
"""

import asyncio
import contextlib
import dataclasses
import multiprocessing
import os
import re
import selectors
import socket
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from swarm.local import LocalServer, LocalSwarm
from swarm.options import ServerOptions

HOST = "127.0.0.1"
PIECE = 2**16  # bytes that are read at a time


class Links:
    """Proxies in a process of their own. What is set takes effect on what comes next."""

    def __init__(self, one_way: float = 0.0, bandwidth: float = 0.0) -> None:
        """Start the process; close it in the end.

        :param one_way: seconds that each direction takes, half of the round trip
        :param bandwidth: bytes per second in each direction of each proxy; 0: any number
        """
        context = multiprocessing.get_context("spawn")
        self._terms: Any = context.Array("d", [one_way, bandwidth])
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._terms), name="links", daemon=True)
        self._process.start()
        theirs.close()

    @property
    def one_way(self) -> float:
        """Seconds that each direction takes."""
        return float(self._terms[0])

    @one_way.setter
    def one_way(self, seconds: float) -> None:
        self._terms[0] = seconds

    @property
    def bandwidth(self) -> float:
        """Bytes per second in each direction of each proxy; 0: any number."""
        return float(self._terms[1])

    @bandwidth.setter
    def bandwidth(self, rate: float) -> None:
        self._terms[1] = rate

    def add(self, target: int) -> int:
        """Return the port of a new proxy, which connects to the port ``target`` of this machine."""
        self._line.send(target)
        port: int = self._line.recv()
        return port

    def cut(self, port: int) -> None:
        """Break all connections of a proxy, and take no new ones, until ``mend``: nobody reaches what is behind it."""
        self._line.send(("cut", port))
        self._line.recv()

    def mend(self, port: int) -> None:
        """Take connections again."""
        self._line.send(("mend", port))
        self._line.recv()

    def close(self) -> None:
        """End the process and all connections."""
        self._line.close()
        self._process.join(5)
        self._process.kill()

    def __enter__(self) -> "Links":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def far_apart(
    local: LocalSwarm, servers: Sequence[ServerOptions], *, one_way: float = 0.0, bandwidth: float = 0.0
) -> Iterator[Links]:
    """Start servers of a swarm, each behind a proxy; end the proxies after the block, when the servers are closed.

    :param one_way: see ``Links``
    """
    with Links(one_way, bandwidth) as links:
        first = [behind(links, peer) for peer in local.swarm.initial_peers if f"/{HOST}/" in peer]
        for options in servers:
            place(local, links, options, first)
        yield links


def place(local: LocalSwarm, links: Links, options: ServerOptions, first: Sequence[str]) -> LocalServer:
    """Start a server behind a proxy.

    :param first: peers of the swarm, by their proxies; see ``behind``
    """
    port = free_port()
    options = dataclasses.replace(
        options,
        host_maddrs=(f"/ip4/{HOST}/tcp/{port}",),
        announce_maddrs=(f"/ip4/{HOST}/tcp/{links.add(port)}",),
    )
    server = LocalServer(options, first)
    local.servers.append(server)
    return server


def behind(links: Links, maddr: str) -> str:
    """Return a peer's address by a new proxy."""
    return re.sub(r"/tcp/(\d+)", lambda found: f"/tcp/{links.add(int(found[1]))}", maddr)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class _Proxy:
    """What listens on one port."""

    def __init__(self, target: int, terms: Any) -> None:
        self.target = target
        self.port = 0
        self.is_cut = False
        self._terms = terms
        self._free_at = [0.0, 0.0]  # when each direction has let pass what has come so far
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connect, HOST, 0, limit=PIECE)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        self.is_cut = True
        for writer in list(self._writers):
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(HOST, self.target, limit=PIECE)
        except OSError:
            writer.close()
            return
        both = {writer, far_writer}
        for each in both:
            each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._writers |= both
        try:
            await asyncio.gather(self._pass(0, reader, far_writer), self._pass(1, far_reader, writer))
        finally:
            self._writers -= both
            for each in both:
                each.close()

    async def _pass(self, direction: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what comes in one direction, each piece when its time has come."""
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        reading = asyncio.create_task(self._read(direction, reader, pieces))
        loop = asyncio.get_running_loop()
        try:
            while True:
                due, piece = await pieces.get()
                if (wait := due - loop.time()) > 0:
                    await asyncio.sleep(wait)
                if not piece:
                    break
                writer.write(piece)
                await writer.drain()
            writer.write_eof()
        except OSError:  # the other side has gone
            writer.transport.abort()
        finally:
            reading.cancel()

    async def _read(
        self, direction: int, reader: asyncio.StreamReader, pieces: "asyncio.Queue[tuple[float, bytes]]"
    ) -> None:
        """Note when each piece is due; the last is empty."""
        loop, piece = asyncio.get_running_loop(), b"-"
        while piece:
            try:
                piece = await reader.read(PIECE)
            except OSError:
                piece = b""
            one_way, bandwidth = self._terms[0], self._terms[1]
            began = max(loop.time(), self._free_at[direction])
            self._free_at[direction] = began + (len(piece) / bandwidth if bandwidth else 0.0)
            pieces.put_nowait((self._free_at[direction] + one_way, piece))


def _serve(line: Connection, terms: Any) -> None:
    # By select(), which is exact to microseconds: epoll() waits whole milliseconds.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    loop.run_until_complete(_obey(line, terms))
    os._exit(0)  # with all connections


async def _obey(line: Connection, terms: Any) -> None:
    """Do what the other end of the line asks for, until it ends."""
    proxies: dict[int, _Proxy] = {}
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    asked: asyncio.Queue[Any] = asyncio.Queue()

    def read() -> None:
        try:
            asked.put_nowait(line.recv())
        except (EOFError, OSError):
            loop.remove_reader(line.fileno())
            ended.set()

    loop.add_reader(line.fileno(), read)
    end = asyncio.create_task(ended.wait())
    while not ended.is_set():
        ask = asyncio.create_task(asked.get())
        await asyncio.wait({ask, end}, return_when=asyncio.FIRST_COMPLETED)
        if not ask.done():
            ask.cancel()
            break
        match ask.result():
            case int(target):
                proxy = _Proxy(target, terms)
                await proxy.start()
                proxies[proxy.port] = proxy
                line.send(proxy.port)
            case ("cut", int(port)):
                proxies[port].cut()
                line.send(port)
            case ("mend", int(port)):
                proxies[port].is_cut = False
                line.send(port)
