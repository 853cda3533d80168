"""What can go wrong between this program and a swarm. Nothing here knows HTTP: errors.py maps these to responses.

SwarmError
 ├── ModelUnavailable       the model's files are unavailable or broken
 ├── ModelMismatch          a server computes something other than this model
 ├── SwarmUnreachable       no initial peer answers
 │    └── ClockOff          this machine's clock differs from that of a peer
 ├── BlocksMissing          no server holds some of the blocks
 ├── CacheFull              servers hold the blocks but have no attention cache left
 ├── SwarmTimeout           a step took longer than its limit
 ├── SessionLengthExceeded  more tokens than the session was opened for
 ├── TokenizerBusy          too many long texts are being turned into tokens
 ├── SessionClosed          the session was closed, or lost beyond recovery
 └── Cancelled              the caller asked to stop
"""

from collections.abc import Sequence


class SwarmError(Exception):
    """The base of all errors that the swarm package raises deliberately."""


class ModelUnavailable(SwarmError):
    """The model's files are unavailable or broken. The message names the model."""


class ModelMismatch(SwarmError):
    """A server's answer does not fit the model: wrong shape, or blocks of another model under the same prefix."""


class SwarmUnreachable(SwarmError):
    """None of the initial peers could be reached."""


class ClockOff(SwarmUnreachable):
    """This machine's clock differs too much from that of a peer: what one announces has ended already for the other."""


class BlocksMissing(SwarmError):
    """No server holds some of the model's blocks."""

    def __init__(self, model: str, blocks: Sequence[int]) -> None:
        self.blocks = tuple(blocks)
        super().__init__(f"no server holds {format_blocks(self.blocks)} of {model}")


class CacheFull(SwarmError):
    """The servers that hold the blocks have no room for the session's attention cache."""


class SwarmTimeout(SwarmError):
    """The swarm did not answer within the limit."""


class SessionLengthExceeded(SwarmError):
    """More tokens than the session was opened for."""


class TokenizerBusy(SwarmError):
    """Too many long texts are being turned into tokens."""


class SessionClosed(SwarmError):
    """The session was closed, or lost beyond recovery."""


class Cancelled(SwarmError):
    """The caller asked to stop."""


def format_blocks(blocks: Sequence[int]) -> str:
    """Write block numbers as ranges: ``[0, 1, 2, 5]`` becomes ``"blocks 0-2, 5"``."""
    ranges: list[list[int]] = []
    for block in sorted(blocks):
        if ranges and block == ranges[-1][1] + 1:
            ranges[-1][1] = block
        else:
            ranges.append([block, block])
    noun = "block" if len(blocks) == 1 else "blocks"
    return f"{noun} " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
