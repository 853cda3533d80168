"""Deliver the answers of a session to its client, over a new connection if the old one is lost.

The thread that computes an answer puts its responses into the session's stream. While the client is connected, they are
sent at once. When the connection of a resumable session is lost, they are kept; the client reconnects, is sent what it
has missed, and from then on what comes. Knows nothing of sockets.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from errors import ApiError, InvalidParameter, SessionNotFound, TimedOut
from generation.loop import Chunk
from swarm.errors import Cancelled
from swarm.waiter import Waiter
from web.swarm_news import SwarmNews

if TYPE_CHECKING:
    from inference_sessions import InferenceSession
    from service import Service

# A stream's lock is held for moments, unless its client takes no data. A client that takes over waits this long
# before it breaks the old connection off.
STALLED = 2.0  # seconds
# Interrupting a step loses the session's attention cache, so an unattended step gets this long to finish.
STEP_GRACE = 1.0  # seconds


class Unreachable(Exception):
    """The client can no longer be sent anything."""


class Client(Protocol):
    """A connection, as a reply stream sees it."""

    queue_updates: bool  # whether to send its place in the queue
    swarm_updates: bool  # whether to send news of the swarm, and the session's position

    @property
    def connected(self) -> bool: ...

    @property
    def closed_on_purpose(self) -> bool: ...

    def deliver(self, *messages: dict[str, Any]) -> None:
        """Send messages, one after the other; wait, within a limit, while the client takes no data.

        :raises Unreachable: if that fails
        """

    def offer(self, message: dict[str, Any]) -> None:
        """Send a message, or skip it if the client takes no data. Does not wait."""

    def stopped(self) -> bool:
        """Read what the client has sent; return whether it wants the running answer to end. Does not wait."""

    def handle_pending(self) -> None:
        """Handle what the client sent while another thread computed an answer. Does not wait."""

    def abandon(self) -> None:
        """Break the connection off, so that a thread that is sending on it fails. Does not wait."""

    def dismiss(self) -> None:
        """Close the connection because the client continues over another one. Does not wait."""


class ReplyStream(Waiter):
    """The responses of one session on their way to its client. Thread-safe.

    While an answer runs, only the thread that computes it reads what the client sends, whatever connection the client
    has. It does so in ``look``, where it checks for everything that could end the answer.
    """

    def __init__(self, service: "Service", entry: "InferenceSession", client: Client, resumable: bool) -> None:
        self.session_id = entry.session_id
        self.resumable = resumable
        self._service = service
        self._watch = SwarmNews(entry)
        self._client: Client | None = client  # None: the connection was lost
        self._left_at = 0.0  # time.monotonic() when it was lost
        self._lock = threading.Lock()  # held while sending, to keep messages in order
        self._held: Client | None = None  # a client whose messages wait for the end of the running answer
        self._answers = 0  # begun so far
        self._responses: list[tuple[dict[str, Any], int]] = []  # to the last request, with the position; if resumable
        self._place: int | None = None  # of the running answer in the queue
        self._running = False  # whether there is a running answer
        self._computing = False  # whether its turn has come
        self._between_steps = True  # whether a token has been generated since its end was looked for
        self._overdue_at: float | None = None  # time.monotonic() when it was found that it should end

    def serves(self, client: Client) -> bool:
        """Whether this client is still the one that gets the answers."""
        return self._client is client

    @property
    def attended(self) -> bool:
        """Whether there is a client."""
        return self._client is not None

    @contextlib.contextmanager
    def answering(self, client: Client) -> Iterator[None]:
        """Let the block compute an answer.

        :raises Unreachable: if the client has meanwhile continued over another connection
        """
        with self._lock:
            if self._client is not client:
                raise Unreachable("the session was resumed elsewhere")
            self._answers += 1
            self._responses = []
            self._running = True
        try:
            yield
        finally:
            with self._lock:
                self._running = self._computing = False
                self._place = None
                self._release()

    def compute(self) -> None:
        """Begin to compute the running answer; report what happens in the swarm from now on."""
        with self._lock:
            self._computing, self._place = True, None
            self._between_steps, self._overdue_at = True, None
            self._watch.restart()

    def follow(self, chunks: Iterator[tuple[int, Chunk]]) -> Iterator[Chunk]:
        """Pass the chunks of the running answer on, and note when it can be ended without loss: between two steps."""
        for _, chunk in chunks:  # of the session's only row
            self._between_steps = True
            yield chunk

    def send(self, response: dict[str, Any], position: int = 0) -> None:
        """Send a response, or keep it for the client.

        :param position: tokens in the session
        """
        with self._lock:
            if self.resumable:
                self._responses.append((response, position))
            self._send_news()
            self._send_response(response, position)

    def _send_response(self, response: dict[str, Any], position: int) -> None:
        if self._client is not None:
            self._deliver(with_position(self._client, response, position))

    def position(self, place: int) -> None:
        """Report the place in the queue to a client that asked for queue updates."""
        with self._lock:
            self._place = place
            if self._client is not None and self._client.queue_updates:
                # The waiter at the head of the queue reports this, and must not be held up.
                self._client.offer({"ok": True, "queue": {"position": place}})

    def _send_news(self) -> None:
        if self._computing and self._client is not None and self._client.swarm_updates:
            for news in self._watch.news():
                self._deliver({"ok": True, "swarm": news})

    def _deliver(self, *messages: dict[str, Any]) -> None:
        """Send messages if a client is connected. If sending fails, a resumable session continues without it."""
        if (client := self._client) is not None:
            try:
                client.deliver(*messages)
            except Unreachable:
                self._notice_loss(client)

    def _notice_loss(self, client: Client) -> None:
        """Let a resumable session continue alone if its connection was lost and not closed on purpose."""
        if self.resumable and not client.closed_on_purpose and not self._service.ending.is_set():
            self._client, self._left_at = None, time.monotonic()
            with contextlib.suppress(SessionNotFound):  # it may have given its place to another
                self._service.sessions.detach(self.session_id)
            self._release()

    def look(self) -> None:
        """Send the client the news, and read what it has sent. Called by the thread that computes the answer.

        :raises Cancelled: if the running answer should end
        """
        with self._lock:
            self._send_news()
            if (client := self._client) is not None:
                if client.stopped():
                    raise Cancelled("the client has stopped the answer")
                if client.connected:
                    return
                self._notice_loss(client)
            between_steps, self._between_steps = self._between_steps or not self._computing, False
            if self._client is not None or self._ends_alone(between_steps):
                raise Cancelled("the client has gone")

    def _ends_alone(self, between_steps: bool) -> bool:
        """Whether an unattended answer ends now: after a while, or because others wait for its place."""
        now, service = time.monotonic(), self._service
        if now - self._left_at < service.settings.RESUME_TIMEOUT and not service.ending.is_set():
            if not service.others_wait():
                self._overdue_at = None
                return False
        self._overdue_at = self._overdue_at or now
        return between_steps or now - self._overdue_at >= STEP_GRACE

    def attach(self, client: Client, received: int, answers: int | None = None) -> bool:
        """Attach a client that reconnects, from where it lost its connection; close that one if it still seems open.

        :param received: how many responses to its last request the client has already
        :param answers: how many requests it has sent; the last one may have been lost with the connection. Then nothing
            is sent, for it would be the answer to another request. None: as many as were begun
        :returns: whether an answer is running; ``handle_pending`` is called when it has ended, or is another client's
        :raises InvalidParameter: if there are fewer responses, or more requests
        :raises SessionNotFound: if the session has ended
        """
        before = None
        self._take_over()
        try:
            if answers is not None and answers > self._answers:
                received = len(self._responses)
            if answers is not None and answers < self._answers:
                raise InvalidParameter(f"answers={answers} is too low: the session has begun {self._answers}")
            if received > len(self._responses):
                raise InvalidParameter(f"received={received} is too high: there are {len(self._responses)} responses")
            self._service.sessions.attach(self.session_id)
            before, self._client = self._client, client
            self._release()
            self._held = client if self._running else None
            # All at once, which does not wait: the thread that computes the answer, and those behind it, would too.
            self._deliver(*self._missed(client, received))
            return self._running
        finally:
            self._lock.release()
            if before is not None and before is not client:
                before.dismiss()

    def _missed(self, client: Client, received: int) -> Iterator[dict[str, Any]]:
        """Yield the messages for a client that reconnects."""
        yield {"ok": True, "answers": self._answers, "responses": len(self._responses)}
        for response, position in self._responses[received:]:
            yield with_position(client, response, position)
        if self._place is not None and client.queue_updates:
            yield {"ok": True, "queue": {"position": self._place}}
        self._watch.restart()
        if client.swarm_updates:
            for news in self._watch.route():
                yield {"ok": True, "swarm": news}

    def _release(self) -> None:
        """Under the lock: wake a client that waits for the end of an answer, once it has ended or is not theirs."""
        held = self._held
        if held is not None and not (self._running and self._client is held):
            self._held = None
            held.handle_pending()

    def _take_over(self) -> None:
        """Acquire the lock; if its holder is stuck sending to a client that takes no data, abandon that connection."""
        if not self._lock.acquire(timeout=STALLED):
            if (stalled := self._client) is not None:
                stalled.abandon()
            if not self._lock.acquire(timeout=self._service.settings.SEND_TIMEOUT):
                raise TimedOut(f"session {self.session_id} is busy with another connection; try again")

    def leave(self, client: Client) -> None:
        """Handle the end of a connection: close the session, or keep it for a while if the client may come back."""
        if self._client is not client:  # which it will never be again; another one may hold the lock for long
            return
        with self._lock:
            if self._client is client:
                self._notice_loss(client)
            if self._client is client:
                self._close()

    def close(self, client: Client) -> None:
        """Close the session at its client's request."""
        with self._lock:
            if self._client is client:
                self._close()

    def _close(self) -> None:
        self._client = None
        self._release()
        with contextlib.suppress(ApiError):  # it may have given its place to another
            # Keep what was computed for a client that comes back, as the page does after a reload.
            self._service.sessions.close(self.session_id, keep_warm=True)


class ReplyStreams:
    """The streams of all sessions that can be resumed. Thread-safe: each operation of a dictionary is atomic."""

    def __init__(self) -> None:
        self._streams: dict[str, ReplyStream] = {}

    def add(self, stream: ReplyStream) -> None:
        self._streams[stream.session_id] = stream

    def find(self, session_id: str) -> ReplyStream:
        """Return the stream of a session.

        :raises SessionNotFound: if it has none
        """
        stream = self._streams.get(session_id)
        if stream is None:
            raise SessionNotFound(f"session {session_id} cannot be resumed: it was opened without resumable")
        return stream

    def discard(self, session_id: str) -> None:
        """Forget the stream of a session that has ended, if it had one."""
        self._streams.pop(session_id, None)


def with_position(client: Client, response: dict[str, Any], position: int) -> dict[str, Any]:
    """Return a response, with the position if the client asked for swarm updates."""
    return {**response, "position": position} if client.swarm_updates and response["ok"] else response
