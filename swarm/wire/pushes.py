"""Steps that servers pass on to one another: how a client labels a step, and what permits a push.

The fields are those of petals' ``rpc_inference`` and ``rpc_push``, used more strictly. A session that takes pushes has
a random name and a random key, which its client tells its server alone. A step has a number, larger than those before.
For each server that a step is pushed to there is a permit, which the client makes with the key: nobody else can, and
for no other step. So a server that has left a session's chain, or was never in it, can push nothing into the session.
"""

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swarm.wire.announcements import MAX_BLOCKS
from swarm.wire.packing import read_integer, read_text
from swarm.wire.text import Malformed, quoted

# p2pd carries calls of up to 4 MiB, this program's metadata included. Larger outputs are not pushed.
MAX_PUSH = 2**22 - 2**16  # bytes
MAX_HOPS = 256  # servers after one
MAX_NUMBER = 2**62  # of a step, or of a token
KEY_BYTES, PERMIT_BYTES = 16, 16


@dataclass(frozen=True)
class Hop:
    """A server that a step is passed on to."""

    peer_id: str  # in base58
    session_id: str  # of the client's session there
    start: int
    end: int  # it computes blocks [start, end)
    permit: bytes

    def packed(self) -> tuple[str, str, int, int, bytes]:
        """Return the hop as a message holds it: petals' four fields, and the permit."""
        return (self.peer_id, self.session_id, self.start, self.end, self.permit)


@dataclass(frozen=True)
class Label:
    """What a client says of a step, beside its inputs."""

    number: int  # of the step
    start: int | None  # position of its first token; None: where the session is
    hops: tuple[Hop, ...] = ()  # the servers after this one, in order


def make_permit(key: bytes, number: int, start: int, tokens: int) -> bytes:
    """Return what permits to push one step into one session.

    :param key: of the session
    :param start: position of the step's first token
    """
    return hmac.digest(key, b"%d %d %d" % (number, start, tokens), "sha256")[:PERMIT_BYTES]


def check_permit(permit: object, key: bytes, label: Label, tokens: int) -> None:
    """Refuse a push that the session's client has not permitted.

    :raises Malformed: if the permit is for another step or session, or no permit
    """
    start = -1 if label.start is None else label.start
    if not isinstance(permit, bytes) or not hmac.compare_digest(permit, make_permit(key, label.number, start, tokens)):
        raise Malformed("this step may not be pushed into this session")


def read_label(metadata: Mapping[str, Any]) -> Label | None:
    """Return the label of a step; None if it has none, as those of petals' own clients.

    :raises Malformed: if it cannot be read
    """
    number, start = metadata.get("step_id"), metadata.get("start_from_position")
    if type(number) is not int:
        return None
    return Label(
        read_integer(number, "step_id", 0, MAX_NUMBER),
        None if start is None else read_integer(start, "start_from_position", 0, MAX_NUMBER),
        read_hops(metadata.get("next_servers") or ()),
    )


def read_hops(value: object) -> tuple[Hop, ...]:
    """Return the servers that a step is passed on to.

    :raises Malformed: if they cannot be read
    """
    if not isinstance(value, list | tuple) or len(value) > MAX_HOPS:
        raise Malformed(f"next_servers must be a list of at most {MAX_HOPS}")
    return tuple(map(_read_hop, value))


def _read_hop(value: object) -> Hop:
    match value:
        case [peer_id, session_id, start, end, bytes(permit)] if len(permit) == PERMIT_BYTES:
            first = read_integer(start, "the first block", 0, MAX_BLOCKS - 1)
            last = read_integer(end, "the last block", first + 1, MAX_BLOCKS)
            return Hop(read_text(peer_id, "a peer id"), read_text(session_id, "session_id"), first, last, permit)
    raise Malformed(f"{quoted(value)} is no server to pass a step on to")


def read_key(value: object) -> bytes | None:
    """Return the key of a session that takes pushes; None if it has none.

    :raises Malformed: if it is too short, or no bytes
    """
    if value is None:
        return None
    if not isinstance(value, bytes) or len(value) != KEY_BYTES:
        raise Malformed(f"push_key must be {KEY_BYTES} bytes")
    return value


def read_unreachable(value: object) -> Sequence[str]:
    """Return the peers that a server could not pass a step on to, from its reply.

    :raises Malformed: if they cannot be read
    """
    if not isinstance(value, list | tuple) or len(value) > MAX_HOPS:
        raise Malformed(f"unreachable must be a list of at most {MAX_HOPS} peers")
    return [read_text(peer, "a peer id") for peer in value]
