"""Messages from a stream: how large they may be, and how many one peer may have in flight."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message
from hivemind.p2p import P2P, PeerID
from hivemind.proto.p2pd_pb2 import RPCError

from swarm.wire.text import Malformed, clean, quoted

# Streams consist of pieces of 4 MB. 64 MB hold 4,096 tokens of a 7B model's inputs, or deep prompts for 70 blocks.
MAX_MESSAGE = 64 * 2**20  # bytes
# A client has one stream per session, and reads or computes one message of each at a time.
MAX_STREAMS = 512  # of one peer to one process


@dataclass
class _Sender:
    """What one peer has in flight to this process."""

    streams: int = 0
    size: int = 0  # bytes of the messages being received


_senders: dict[PeerID, _Sender] = {}
_sender: ContextVar[_Sender | None] = ContextVar("sender", default=None)  # whose stream this task reads
_limits = {"message": MAX_MESSAGE}


def limit_messages(size: int) -> None:
    """Let this process accept messages of up to ``size`` bytes by default."""
    _limits["message"] = size


async def receive(
    kind: type[Message], reader: asyncio.StreamReader, limit: Callable[[], int] | None = None
) -> tuple[Any, Any]:
    """Receive one of hivemind's messages: (message, None), or (None, the error that the peer replies with).

    :param limit: asked when a message comes: its bytes, at most; default: the process's own limit
    :raises Malformed: if it is too large or cannot be read; the stream is unusable then
    :raises EOFError: if the stream ends
    """
    header = await reader.readexactly(1 + P2P.HEADER_LEN)
    marker, size = header[:1], int.from_bytes(header[1:], P2P.BYTEORDER)
    if marker not in (P2P.MESSAGE_MARKER, P2P.ERROR_MARKER):
        raise Malformed(f"{quoted(marker)} begins no message")
    allowed = _limits["message"] if limit is None else limit()
    if size > allowed:
        raise Malformed(f"a message of {size} bytes is larger than {allowed}")
    with _under_way(size):
        data = await reader.readexactly(size)
    message = kind() if marker == P2P.MESSAGE_MARKER else RPCError()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise Malformed(f"a message cannot be read: {clean(str(error))}") from None
    return (message, None) if marker == P2P.MESSAGE_MARKER else (None, message)


@contextlib.contextmanager
def _under_way(size: int) -> Iterator[None]:
    """Count what this task's peer sends; it may send two of the largest messages at a time.

    :raises Malformed: if it sends more
    """
    sender = _sender.get()
    if sender is None:  # a stream that this process opened, for one message
        yield
        return
    if sender.size + size > 2 * _limits["message"]:
        raise Malformed(f"messages of {sender.size + size} bytes at a time are more than one peer may send")
    sender.size += size
    try:
        yield
    finally:
        sender.size -= size


def bound_streams(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Return a handler of binary streams that accepts a bounded number from each peer and closes the others."""

    async def handle(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sender = _senders.setdefault(info.peer_id, _Sender())
        if sender.streams >= MAX_STREAMS:
            writer.close()
            return
        sender.streams += 1
        _sender.set(sender)  # for this task, which belongs to the stream, and the tasks it starts
        try:
            await handler(info, reader, writer)
        finally:
            sender.streams -= 1
            if not sender.streams:
                _senders.pop(info.peer_id, None)

    return handle


async def bound_total(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Yield the pieces of a streamed request, as long as their total stays within the limit of one message.

    :raises Malformed: if it does not
    """
    size = 0
    async for request in requests:
        size += request.ByteSize()
        if size > _limits["message"]:
            raise Malformed(f"a request of {size} bytes is larger than {_limits['message']}")
        yield request
