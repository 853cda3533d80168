"""What a server replies to a client: hidden states, its abilities, whether it is alive."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.proto import runtime_pb2

from swarm.wire.packing import read_integer, read_metadata, read_number, read_text
from swarm.wire.pushes import MAX_NUMBER, read_unreachable
from swarm.wire.tensors import FLOATING, is_finite, read_tensor
from swarm.wire.text import Malformed, quoted

# Room in a reply beside its tensors: names of dtypes, metadata, or the text of an error.
SLACK = 64 * 2**10  # bytes
MAX_POSITION = 2**62  # of a token


@dataclass(frozen=True)
class Abilities:
    """What a server of this project can do beyond petals; see ``swarm.server.handler``."""

    rewind: bool = False
    spread: bool = False
    # Hashes of the model that it serves, see ``swarm.weights.fingerprint``; None: it does not say.
    config: str | None = None
    weights: str | None = None
    earliest: int = 0  # position to which the session can go back, beside 0, if it can at all


@dataclass(frozen=True)
class StepNews:
    """What a server of this project says of a step that it answers."""

    pushed: bool = False  # whether it took the inputs from another server
    unreachable: Sequence[str] = ()  # peers that it could not pass a step on to


def reply_limit(shape: Sequence[int]) -> int:
    """Return the largest size in bytes of a reply with hidden states of this shape."""
    return 4 * math.prod(shape) + SLACK


def read_hidden(tensors: Sequence[runtime_pb2.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Return the hidden states in a server's reply.

    :param shape: their required shape
    :raises Malformed: if they are missing, of another shape or dtype, or not finite
    """
    if len(tensors) != 1:
        raise Malformed(f"it answers with {len(tensors)} tensors instead of 1")
    (tensor,) = tensors
    if tuple(tensor.size) != tuple(shape):
        raise Malformed(f"it answers with shape {quoted(list(tensor.size))} to {list(shape)}")
    if tensor.dtype not in FLOATING:
        raise Malformed(f"it answers with dtype {quoted(tensor.dtype)}")
    hidden = read_tensor(tensor)
    if not is_finite(hidden):
        raise Malformed("it answers with hidden states that are not finite")
    return hidden


def read_abilities(metadata: bytes, before: Abilities = Abilities()) -> Abilities:
    """Return the server's abilities from a reply.

    :param before: what earlier replies of the session have said; what this one does not mention is unchanged
    :raises Malformed: if the metadata cannot be read
    """
    reported = read_metadata(metadata)
    rewind, spread = reported.get("rewind", before.rewind), reported.get("spread", before.spread)
    if type(rewind) is not bool or type(spread) is not bool:
        raise Malformed(f"it reports abilities {quoted(reported)}")
    earliest = read_integer(reported.get("earliest", before.earliest), "earliest", 0, MAX_POSITION)
    model = reported.get("model") or {}
    if not isinstance(model, dict):
        raise Malformed(f"it reports a model {quoted(model)}")
    config, weights = _hash(model, "config", before.config), _hash(model, "weights", before.weights)
    return Abilities(rewind, spread, config, weights, earliest)


def read_step_id(metadata: bytes) -> int | None:
    """Return the number of the step that a reply answers; None: it does not say.

    :raises Malformed: if that cannot be read
    """
    number = read_metadata(metadata).get("step_id")
    return None if number is None else read_integer(number, "step_id", 0, MAX_NUMBER)


def read_news(metadata: bytes) -> StepNews:
    """Return what a reply says of its step.

    :raises Malformed: if that cannot be read
    """
    reported = read_metadata(metadata)
    return StepNews(reported.get("pushed") is True, read_unreachable(reported.get("unreachable") or ()))


def _hash(model: Mapping[str, Any], name: str, before: str | None) -> str | None:
    return before if model.get(name) is None else read_text(model[name], name)


def read_silence(info: bytes) -> float:
    """Return for how many seconds the computing process has been silent, from a server's ``rpc_info``.

    :raises Malformed: if that is not a number of seconds
    """
    return read_number(read_metadata(info).get("silent_for", 0.0), "silent_for")
