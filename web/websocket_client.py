"""One open WebSocket, as a reply stream sees it: what is sent on it, and what its client asks for meanwhile."""

import json
from typing import Any

from errors import InvalidParameter
from swarm.errors import Cancelled
from swarm.waiter import Waiter
from web.reply_stream import Unreachable
from web.websocket import POLICY_VIOLATION, Closed, WebSocket

# Requests that a client may send ahead while an answer is running; one that sends more does not read its answers.
MAX_PENDING, MAX_PENDING_SIZE = 64, 4_194_304  # messages, bytes
ON_PURPOSE = (1000, 1005)  # normal, and without a code; a browser that reloads or closes a page sends 1001
RESUMED_ELSEWHERE = 4001  # ours
CLOSE = "close_inference_session"


class WebSocketClient(Waiter):
    """The client at the other end of a WebSocket; it may wait for a session."""

    def __init__(self, websocket: WebSocket) -> None:
        self.websocket = websocket
        self.queue_updates = False  # whether to send its place in queues
        self.swarm_updates = False  # whether to send news of the swarm, and the session's position
        self._stopped = False

    def begin(self) -> None:
        """Note that something begins that the client may stop."""
        self._stopped = False

    def look(self) -> None:
        if self.stopped() or not self.connected:
            raise Cancelled("the client does not want to wait any more, or has gone")

    def position(self, place: int) -> None:
        """Send the place in the queue for a session to a client that asked for queue updates."""
        if self.queue_updates:
            self.offer({"ok": True, "queue": {"position": place}})

    def stopped(self) -> bool:
        """Whether the client has stopped the answer; other messages wait for the answer to end."""
        while not self._stopped and (message := self.websocket.look()) is not None:
            kind = kind_of(message)
            self._stopped = kind in ("stop", CLOSE)
            if kind == "stop":
                self.websocket.withdraw()
            count, size = self.websocket.ahead
            if count > MAX_PENDING or size > MAX_PENDING_SIZE:
                self.websocket.close(POLICY_VIOLATION, "too many requests sent ahead")
        return self._stopped

    @property
    def connected(self) -> bool:
        """Whether the client is there, as far as is known."""
        return self.websocket.connected

    @property
    def closed_on_purpose(self) -> bool:
        """Whether the client has closed the connection, other than by leaving the page or losing its network."""
        return self.websocket.close_code in ON_PURPOSE

    def deliver(self, *messages: dict[str, Any]) -> None:
        """Send messages; wait while the client takes no data.

        :raises Unreachable: if the client is gone, or takes none for too long
        """
        try:
            self.websocket.send(*map(json.dumps, messages))
        except Closed as error:
            raise Unreachable(str(error)) from error

    def offer(self, message: dict[str, Any]) -> None:
        """Send a message, or the next one in its place if the client takes no data. Does not wait."""
        self.websocket.offer(json.dumps(message))

    def handle_pending(self) -> None:
        """Handle what the client has sent meanwhile, when a thread is free. Does not wait."""
        self.websocket.done()

    def abandon(self) -> None:
        """Break the connection off: threads that send on it are woken. Does not wait."""
        self.websocket.abandon()

    def dismiss(self) -> None:
        """Close the connection because the client has resumed its session on another one. Does not wait."""
        self.websocket.close(RESUMED_ELSEWHERE, "resumed elsewhere")


def parse_message(message: str | bytes) -> dict[str, Any]:
    """Read a message.

    :raises InvalidParameter: if it is not a JSON object in a text frame
    """
    if not isinstance(message, str):
        raise InvalidParameter("messages must be JSON in text frames, not binary frames")
    try:
        request = json.loads(message)
    except (ValueError, RecursionError):
        raise InvalidParameter("the message is not valid JSON") from None
    if not isinstance(request, dict):
        raise InvalidParameter("the message must be a JSON object")
    return request


def kind_of(message: str | bytes) -> Any:
    """Return the type of a message; None if it has none."""
    try:
        return parse_message(message).get("type")
    except InvalidParameter:
        return None  # reported to the client when its turn comes
