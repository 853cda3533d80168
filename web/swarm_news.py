"""Report what happens in the swarm under a session: its route, lost servers, how far a prompt is processed."""

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference_sessions import InferenceSession

# Often enough to show a person that a long prompt is being read.
PREFILL_PERIOD = 0.5  # seconds


class SwarmNews:
    """Watches one session and reports what is new since the last look. Not thread-safe."""

    def __init__(self, entry: "InferenceSession") -> None:
        self._entry = entry
        self.restart()

    def restart(self) -> None:
        """Reset for a new answer or client: report the route again and ignore earlier losses."""
        self._session = self._entry.session
        losses = self._session.losses
        self._loss = losses[-1].number if losses else 0
        self._route: list[tuple[str, int, int]] = []
        self._prefill, self._prefill_at = (0, 0), 0.0

    def news(self) -> list[dict[str, Any]]:
        """Return what is new, in the order in which it happened."""
        if self._entry.session is not self._session:  # replaced by a warm one that has computed these tokens
            self.restart()
        news = [self._lost(loss) for loss in self._session.losses if loss.number > self._loss]
        if news:
            self._loss, self._route = self._session.losses[-1].number, []
        return [*news, *self.route(), *self._progress()]

    @staticmethod
    def _lost(loss: Any) -> dict[str, Any]:
        return {"lost": {"peer_id": loss.peer_id, "start": loss.start, "end": loss.end, "reason": loss.reason}}

    def route(self) -> list[dict[str, Any]]:
        """Return the route if there is one and it has changed."""
        route = self._entry.session.route
        if not route or route == self._route:
            return []
        self._route = route
        names = {view.peer_id: view.public_name for view in self._entry.model.state.servers()}
        spans = [{"peer_id": peer, "name": names.get(peer), "start": start, "end": end} for peer, start, end in route]
        return [{"route": spans}]

    def _progress(self) -> list[dict[str, Any]]:
        """Return how many of the tokens before the next one are processed; it can be generated once all are."""
        processed, total = self._session.position, len(self._session.token_ids)
        now = time.monotonic()
        if total - processed <= 1 or (processed, total) == self._prefill or now - self._prefill_at < PREFILL_PERIOD:
            return []
        self._prefill, self._prefill_at = (processed, total), now
        return [{"prefill": {"processed": processed, "total": total}}]
