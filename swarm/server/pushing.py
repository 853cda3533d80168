"""Steps on their way from server to server: those that come to a session, and those that leave it.

A client that has a step computed by several servers sends it to the first, with the list of the others. Each server
passes its outputs on to the next one (``Outbox``) while it sends them to the client, too. The client sends again what
does not arrive in time, so a session may get a step from two sides (``Inbox``). Whichever comes first is computed.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import swarm.compat  # noqa: F401

from hivemind import MSGPackSerializer
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, P2PDaemonError
from hivemind.proto import runtime_pb2
from petals.data_structures import CHAIN_DELIMITER, UID_DELIMITER

from swarm.wire.announcements import read_peer_id
from swarm.wire.messages import MAX_MESSAGE
from swarm.wire.packing import read_metadata
from swarm.wire.pushes import MAX_PUSH, Label, check_permit, read_label
from swarm.wire.requests import NO_PROMPTS_AND_HYPOTHESES, check_call
from swarm.wire.text import Malformed

log = logging.getLogger(__name__)

# A client has this many chunks of a prompt on their way at a time, at most; each may wait for the one before it.
MAX_HELD = 64  # pushes of one session
# Bytes of the pushes that wait, of one session and of all sessions of a handler. What exceeds them the client sends.
SESSION_BYTES, HANDLER_BYTES = MAX_MESSAGE, 4 * MAX_MESSAGE
# A push that waits is worth nothing once the client has sent the step itself, which it does within a second or so.
HOLD_TIME = 30.0  # seconds
# A server that takes nothing for this long cannot be reached.
PUSH_TIMEOUT = 5.0  # seconds
MAX_PUSHING = 64  # of one session at a time

Requests = AsyncIterator[runtime_pb2.ExpertRequest]


@dataclass(frozen=True, eq=False)
class Arrival:
    """A step of a session, from its client or from another server."""

    request: runtime_pb2.ExpertRequest
    metadata: dict[str, Any]
    label: Label | None = None
    pushed: bool = False
    size: int = 0  # bytes, of a push that waits
    since: float = 0.0  # time.monotonic() when it came


class Store:
    """The memory for pushes that wait, of all sessions of a handler."""

    def __init__(self, limit: int = HANDLER_BYTES) -> None:
        self.limit = limit  # bytes
        self.used = 0  # bytes


class Inbox:
    """The steps of one session, from both sides, in the order in which they can be computed.

    It stands in the place of petals' queue of pushes. Used on the handler's event loop only.
    """

    def __init__(self, uid: str, key: bytes, store: Store) -> None:
        """Make an empty inbox.

        :param uid: of the session's blocks
        :param key: see ``swarm.wire.pushes``
        """
        self.position = 0  # tokens that the session has computed
        self.newest = -1  # number of the newest step that was begun
        self._uid = uid
        self._key = key
        self._store = store
        self._held: dict[int, Arrival] = {}  # pushes, by the numbers of their steps
        self._size = 0  # bytes held
        self._woken: asyncio.Future[None] | None = None  # while somebody waits for a push
        self._sweeping: asyncio.TimerHandle | None = None

    def put_nowait(self, request: runtime_pb2.ExpertRequest | None) -> None:
        """Take a push, unless it is not permitted, comes too late or finds no room; None ends the inbox."""
        if request is None:
            self.close()
            return
        try:
            arrival = self._read(request)
        except Malformed as error:
            log.debug("a push was refused: %s", error)
            return
        assert arrival.label is not None
        number, size = arrival.label.number, arrival.size
        if number <= self.newest or number in self._held or len(self._held) >= MAX_HELD:
            return
        if self._size + size > SESSION_BYTES or self._store.used + size > self._store.limit:
            return
        self._held[number] = arrival
        self._size += size
        self._store.used += size
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(HOLD_TIME, self._sweep)

    def _read(self, request: runtime_pb2.ExpertRequest) -> Arrival:
        check_call(request)
        metadata = read_metadata(request.metadata)
        label = read_label(metadata)
        if label is None or request.uid != self._uid or not request.tensors or len(request.tensors[0].size) != 3:
            raise Malformed("this is no step of the session")
        check_permit(metadata.get("permit"), self._key, label, request.tensors[0].size[1])
        return Arrival(request, metadata, label, True, request.ByteSize(), time.monotonic())

    async def arrivals(
        self, first: runtime_pb2.ExpertRequest, requests: Requests, timeout: float
    ) -> AsyncIterator[Arrival]:
        """Yield each step once, until the client ends the session or nothing has come for ``timeout`` seconds.

        Whoever takes them sets ``position`` and ``newest``.

        :param first: the client's first request
        :param requests: the others
        """
        arrival: Arrival | None = read_arrival(first)
        reading: asyncio.Task[runtime_pb2.ExpertRequest | None] | None = None
        try:
            while arrival is not None and arrival.request.tensors:
                if arrival.label is None or arrival.label.number > self.newest:
                    yield arrival
                arrival = self._due()
                while arrival is None:
                    reading = reading or asyncio.create_task(next_of(requests))
                    self._woken = asyncio.get_running_loop().create_future()
                    done, _ = await asyncio.wait(
                        {reading, self._woken}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
                    )
                    if reading in done:
                        request, reading = reading.result(), None
                        if request is None:
                            return
                        arrival = read_arrival(request)
                    elif done:
                        arrival = self._due()
                    else:
                        return
        finally:
            if reading is not None:
                reading.cancel()
            self.close()

    def _due(self) -> Arrival | None:
        """Take the first push that can be computed now, and drop those that never will be."""
        for number in sorted(self._held):
            label = self._held[number].label
            assert label is not None and label.start is not None  # they are permitted
            if number <= self.newest:
                self._drop(number)
            elif label.start <= self.position:
                return self._drop(number)
        return None

    def _drop(self, number: int) -> Arrival:
        arrival = self._held.pop(number)
        self._size -= arrival.size
        self._store.used -= arrival.size
        return arrival

    def _sweep(self) -> None:
        """Drop pushes that have waited too long."""
        self._sweeping = None
        oldest = time.monotonic() - HOLD_TIME
        for number in [number for number, arrival in self._held.items() if arrival.since <= oldest]:
            self._drop(number)
        if self._held:
            self._sweeping = asyncio.get_running_loop().call_later(HOLD_TIME, self._sweep)

    def close(self) -> None:
        """Drop all pushes."""
        for number in list(self._held):
            self._drop(number)
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None


def read_arrival(request: runtime_pb2.ExpertRequest) -> Arrival:
    """Return a client's step.

    :raises Malformed: if its label cannot be read
    """
    metadata = read_metadata(request.metadata)
    return Arrival(request, metadata, read_label(metadata))


async def next_of(requests: Requests) -> runtime_pb2.ExpertRequest | None:
    """Return the next request; None if there is none."""
    async for request in requests:
        return request
    return None


class Outbox:
    """What a session passes on to the server after this one. It may find that it cannot reach that."""

    def __init__(self, send: Callable[[PeerID, runtime_pb2.ExpertRequest], Awaitable[Any]], prefix: str) -> None:
        """Make an outbox.

        :param send: calls a peer's ``rpc_push``
        :param prefix: of the names of the model's blocks
        """
        self._send = send
        self._prefix = prefix
        self._tasks: set[asyncio.Task[None]] = set()
        self._unreachable: set[str] = set()

    def push(self, label: Label, start: int, output: runtime_pb2.Tensor) -> None:
        """Pass the outputs of a step on. Does not wait; it is no fault if that fails, the client sends them too."""
        hop = label.hops[0]
        uids = CHAIN_DELIMITER.join(f"{self._prefix}{UID_DELIMITER}{block}" for block in range(hop.start, hop.end))
        metadata = {
            "session_id": hop.session_id,
            "step_id": label.number,
            "start_from_position": start,
            "permit": hop.permit,
            "next_servers": [after.packed() for after in label.hops[1:]],
            "pushed": True,
        }
        request = runtime_pb2.ExpertRequest(
            uid=uids, tensors=[output, *NO_PROMPTS_AND_HYPOTHESES], metadata=MSGPackSerializer.dumps(metadata)
        )
        if len(self._tasks) < MAX_PUSHING and request.ByteSize() <= MAX_PUSH:
            task = asyncio.create_task(self._push(hop.peer_id, request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _push(self, peer_id: str, request: runtime_pb2.ExpertRequest) -> None:
        try:
            await asyncio.wait_for(self._send(read_peer_id(peer_id), request), PUSH_TIMEOUT)
        except (TimeoutError, P2PDaemonError, ControlFailure, OSError, EOFError) as error:
            log.debug("cannot pass a step on to %s: %s", peer_id, error)
            self._unreachable.add(peer_id)
        except Exception as error:  # it has refused the push, or its answer cannot be read
            log.debug("%s did not take a step: %s", peer_id, error)

    def take_unreachable(self) -> list[str]:
        """Return the peers that could not be reached since the last call."""
        found, self._unreachable = sorted(self._unreachable), set()
        return found

    def close(self) -> None:
        """Give up what is still on its way out."""
        for task in list(self._tasks):
            task.cancel()
