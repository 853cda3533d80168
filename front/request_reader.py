"""Find out when a request is whole. Heads are read by gunicorn's own parser, bodies are bounded here."""

import re
from collections.abc import Callable
from typing import Any

from gunicorn.http.body import Body, ChunkedReader, LengthReader
from gunicorn.http.errors import (
    ChunkMissingTerminator,
    InvalidChunkSize,
    InvalidHeader,
    InvalidRequestLine,
    LimitRequestHeaders,
    NoMoreData,
)
from gunicorn.http.message import Request
from gunicorn.http.unreader import IterUnreader

# gunicorn bounds lines (8190 bytes) and their number (100), which would be 800 kB a head. Browsers and proxies send,
# and usually accept, no more than some 8 to 32 kB.
MAX_HEAD = 64 * 1024  # bytes
# A body that is too large is still read, and dropped, up to this many times the limit: clients that send before they
# read get the answer, instead of an error while they send. Beyond, it is a waste of everybody's network.
DISCARDED = 16
HEAD_END = b"\r\n\r\n"
BARE_LF = re.compile(rb"(?<!\r)\n")
# RFC 9112, 7.1: the size, and extensions that nobody uses. Eight digits are 4 GiB.
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
MAX_LINE = 8190  # bytes of a chunk's size line, and of all trailers; as gunicorn bounds lines
# Received at a time, of one connection, before the others have their turn: 2 ms of work, for chunks of one byte each.
CHUNKS_RECEIVED = 8 * 1024  # bytes
RECEIVED = 64 * 1024  # bytes of anything else


class RequestReader:
    """Takes the bytes of a connection as they come, and gives its requests one by one, each once it is whole."""

    def __init__(self, cfg: Any, client: Any, max_body: int, on_continue: Callable[[], None] = lambda: None) -> None:
        """Begin to read a connection.

        :param cfg: gunicorn's configuration
        :param client: the address of the other side
        :param max_body: bytes of a body that are kept; a larger one is dropped
        :param on_continue: called when the client waits for a 100 (Continue) before it sends the body
        """
        self.unread = bytearray()  # what came and belongs to no whole part of a request yet
        self.received = 0  # bytes of the request that is being read
        self._cfg = cfg
        self._client = client
        self._max_body = max_body
        self.on_continue = on_continue
        self._number = 0
        self._searched = 0  # how far there is no end of a head
        self._request: Request | None = None
        self._body: _Body | None = None

    @property
    def begun(self) -> bool:
        """Whether a part of a request is here."""
        return bool(self.unread) or self._request is not None

    @property
    def appetite(self) -> int:
        """Bytes to receive next."""
        return CHUNKS_RECEIVED if isinstance(self._body, _ChunkedBody) else RECEIVED

    @property
    def held(self) -> int:
        """Bytes in memory of what is no whole request yet."""
        return len(self.unread) + (0 if self._body is None else len(self._body.content))

    def feed(self, data: bytes) -> None:
        self.unread += data
        self.received += len(data)

    def next_request(self) -> Request | None:
        """Return the request if it is whole, with its body in memory.

        A body that was too large is empty, and its request says by ``Content-Length`` how large it was, also if it came
        in chunks: an application with a limit refuses it by that.

        :raises gunicorn.http.errors.ParseException: if it is none; nothing more can be read of the connection then
        """
        if self._request is None and not self._read_head():
            return None
        assert self._request is not None and self._body is not None
        self._body.take(self.unread)
        if not self._body.whole:
            return None
        request, body = self._request, self._body
        self._request = self._body = None
        self.received = len(self.unread)
        if body.too_large:
            _replace_length(request, body.size)
        if body.abandoned:
            request.force_close()
        content = bytes(body.content)
        request.body = Body(LengthReader(IterUnreader([content]), len(content)))
        return request

    def _read_head(self) -> bool:
        """Take a head, if it is whole, and get ready for the body."""
        end = self.unread.find(HEAD_END, max(0, self._searched - len(HEAD_END) + 1))
        if (len(self.unread) if end < 0 else end) > MAX_HEAD:
            raise LimitRequestHeaders(f"more than {MAX_HEAD} bytes")
        if end < 0:
            if BARE_LF.search(self.unread, self._searched):
                raise InvalidHeader("bare LF as line terminator")
            self._searched = len(self.unread)
            return False
        self._searched = 0
        head = bytes(self.unread[: end + len(HEAD_END)])
        del self.unread[: len(head)]
        self._begin(self._parse(head))
        return True

    def _parse(self, head: bytes) -> Request:
        self._number += 1
        try:
            return Request(self._cfg, IterUnreader([head]), self._client, self._number)
        except (NoMoreData, StopIteration):  # such as two empty lines
            raise InvalidRequestLine("no request") from None

    def _begin(self, request: Request) -> None:
        self._request = request
        reader = request.body.reader
        if isinstance(reader, ChunkedReader):
            self._body = _ChunkedBody(self._max_body)
        else:
            self._body = _PlainBody(self._max_body, reader.length)
        if request._expected_100_continue:
            request._expected_100_continue = False  # gunicorn would send it again
            if self._body.too_large:
                self._body.abandon()
            elif not self._body.whole and not self.unread:
                self.on_continue()


def _replace_length(request: Request, length: int) -> None:
    framing = ("CONTENT-LENGTH", "TRANSFER-ENCODING")
    request.headers = [header for header in request.headers if header[0] not in framing]
    request.headers.append(("CONTENT-LENGTH", str(length)))


class _Body:
    """A body as it comes in: kept up to a limit, then dropped, then no longer read."""

    def __init__(self, limit: int) -> None:
        self.content = bytearray()
        self.size = 0  # bytes, as far as known
        self.whole = False
        self.abandoned = False  # there is more, which will not be read
        self._limit = limit

    @property
    def too_large(self) -> bool:
        return self.size > self._limit

    def take(self, buffer: bytearray) -> None:
        """Take what belongs to the body from the beginning of a buffer."""
        raise NotImplementedError

    def abandon(self) -> None:
        self.abandoned = self.whole = True

    def _keep(self, piece: bytearray) -> None:
        if self.too_large:
            self.content.clear()
        else:
            self.content += piece


class _PlainBody(_Body):
    """A body whose length was announced."""

    def __init__(self, limit: int, length: int) -> None:
        super().__init__(limit)
        self.size = self._left = length
        self.whole = not length
        if length > DISCARDED * limit:
            self.abandon()

    def take(self, buffer: bytearray) -> None:
        if self.whole:
            return
        piece = buffer[: self._left]
        del buffer[: len(piece)]
        self._left -= len(piece)
        self._keep(piece)
        self.whole = not self._left


class _ChunkedBody(_Body):
    """A body in chunks (RFC 9112, 7.1). Trailers are dropped."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self._left = 0  # bytes of the current chunk
        self._trailers = 0  # bytes
        self._step: Callable[[bytearray, int], int | None] = self._read_size

    def take(self, buffer: bytearray) -> None:
        """Take whole chunks and parts of chunks.

        :raises gunicorn.http.errors.ParseException: if they are none
        """
        position = 0
        while not self.whole and (after := self._step(buffer, position)) is not None:
            position = after
        del buffer[:position]

    # Each step reads from a position of the buffer and returns the position behind, or None if there is too little.

    def _read_size(self, buffer: bytearray, position: int) -> int | None:
        match = CHUNK_SIZE.match(buffer, position, position + MAX_LINE)
        if match is None:
            if buffer.find(b"\n", position) >= 0 or len(buffer) - position > MAX_LINE:
                raise InvalidChunkSize(bytes(buffer[position : position + 20]))
            return None
        size = int(match[1], 16)
        end = match.end() + size
        if size and buffer[end : end + 2] == b"\r\n":  # the whole chunk is here: no steps, for they may be many
            self._add(buffer[match.end() : end])
            return end + 2
        self._left = size
        self._step = self._read_data if size else self._read_trailer
        return match.end()

    def _read_data(self, buffer: bytearray, position: int) -> int | None:
        piece = buffer[position : position + self._left]
        self._left -= len(piece)
        self._add(piece)
        if not self._left:
            self._step = self._read_end
        return position + len(piece) if piece else None

    def _add(self, piece: bytearray) -> None:
        self.size += len(piece)
        self._keep(piece)
        if self.size > DISCARDED * self._limit:
            self.abandon()

    def _read_end(self, buffer: bytearray, position: int) -> int | None:
        end = buffer[position : position + 2]
        if len(end) < 2:
            return None
        if end != b"\r\n":
            raise ChunkMissingTerminator(bytes(end))
        self._step = self._read_size
        return position + 2

    def _read_trailer(self, buffer: bytearray, position: int) -> int | None:
        end = buffer.find(b"\r\n", position)
        if self._trailers + max(end, len(buffer) if end < 0 else 0) - position > MAX_LINE:
            raise LimitRequestHeaders("trailers of more than 8190 bytes")
        if end < 0:
            return None
        self.whole = end == position
        self._trailers += end - position + 2
        return end + 2
