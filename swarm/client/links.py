"""What is known of the ways between servers: which of them can pass steps on, and how soon what they pass on comes.

It is shared by all sessions of a model, on hivemind's event-loop thread.
"""

import collections
import time

import swarm.compat  # noqa: F401

from hivemind.p2p import PeerID

# A server that could not reach another one is asked again after this long: one of them may have moved.
UNREACHABLE_FOR = 1800.0  # seconds
MAX_LINKS = 10_000  # remembered; the ones unused for longest are forgotten
# Steps of more tokens are prompts', whose computing takes most of the time.
SHORT_STEP = 16  # tokens
# How much later than usual a reply may be before the client sends the step itself: in deviations, as TCP's timeout
# (RFC 6298), and in seconds, the time in which a busy machine lets a process wait.
DEVIATIONS, LEEWAY = 4.0, 0.01
GAIN = 0.125  # weight of the newest value


class Delay:
    """How long something usually takes: mean and mean deviation."""

    def __init__(self) -> None:
        self.mean: float | None = None  # seconds; None: not known
        self.deviation = 0.0

    def note(self, seconds: float) -> None:
        """Count one time that it took."""
        if self.mean is None:
            self.mean, self.deviation = seconds, seconds / 2
        else:
            self.deviation += GAIN * (abs(seconds - self.mean) - self.deviation)
            self.mean += GAIN * (seconds - self.mean)

    @property
    def limit(self) -> float:
        """Seconds after which it is late; 0: not known."""
        return 0.0 if self.mean is None else self.mean + DEVIATIONS * self.deviation + LEEWAY


class Link:
    """The way from one server to another."""

    def __init__(self) -> None:
        self._delays = (Delay(), Delay())  # of short steps, and of others
        self._works = [False, False]  # whether the last such step came by it
        self._unreachable_until = 0.0  # time.monotonic()

    @property
    def usable(self) -> bool:
        """Whether steps may be pushed along it."""
        return time.monotonic() >= self._unreachable_until

    def patience(self, tokens: int) -> float:
        """Return how many seconds to wait for a step that was pushed, before the client sends it itself.

        None at all while pushes do not arrive, or it is not known how long they take.
        """
        kind = tokens > SHORT_STEP
        return self._delays[kind].limit if self._works[kind] else 0.0

    def note_push(self, tokens: int, seconds: float) -> None:
        """Record a step that came by this way.

        :param seconds: between the replies of the two servers
        """
        kind = tokens > SHORT_STEP
        self._works[kind] = True
        self._delays[kind].note(max(0.0, seconds))

    def note_relay(self, tokens: int) -> None:
        """Record a step that the client sent first."""
        self._works[tokens > SHORT_STEP] = False

    def note_unreachable(self) -> None:
        """Record that the first server cannot reach the second."""
        self._unreachable_until = time.monotonic() + UNREACHABLE_FOR


class Links:
    """The ways between all servers."""

    def __init__(self) -> None:
        self._links: collections.OrderedDict[tuple[PeerID, PeerID], Link] = collections.OrderedDict()

    def between(self, first: PeerID, second: PeerID) -> Link:
        """Return the way from the first server to the second."""
        link = self._links.setdefault((first, second), Link())
        self._links.move_to_end((first, second))
        if len(self._links) > MAX_LINKS:
            self._links.popitem(last=False)
        return link
