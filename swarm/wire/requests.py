"""What a client asks of a server: to open an inference session, to compute a step, and petals' other calls."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.compression import serialize_torch_tensor
from hivemind.proto import runtime_pb2
from petals.utils.misc import DUMMY, DUMMY_INT64

from swarm.wire.packing import read_integer, read_metadata, read_number, read_text
from swarm.wire.pushes import read_key
from swarm.wire.tensors import check_tensor, is_finite, read_tensor
from swarm.wire.text import Malformed, quoted

# This program asks for 16 rows at most; the beams and batches of petals' clients are small. All rows of a session share
# a batch with other sessions' steps, which wait for them.
MAX_ROWS = 64
# A session that waits longer for attention cache holds up those that would fit; this program's clients retry anyway.
MAX_PATIENCE = 10.0  # seconds
MAX_ARGUMENTS = 8  # per request: hidden states, deep prompts, hypotheses, and any that petals may add
# What follows the hidden states of a step that has nothing else.
NO_PROMPTS_AND_HYPOTHESES = (serialize_torch_tensor(DUMMY), serialize_torch_tensor(DUMMY_INT64))


@dataclass(frozen=True)
class SessionRequest:
    """What the first request of an inference session asks for."""

    max_length: int  # tokens
    batch_size: int  # sequences
    alloc_timeout: float  # seconds to wait for attention cache
    session_id: str | None
    adapter: str
    # Which tensors of a step are the hidden states, deep prompts and hypotheses; None: in that order.
    arguments: tuple[int, ...] | None
    push_key: bytes | None = None  # see ``swarm.wire.pushes``; None: as stock clients


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a session's step."""

    start: int  # position of the first token
    hidden: torch.Tensor  # [1 or sequences, tokens, hidden size]
    prompts: torch.Tensor | None  # [blocks, sequences, tokens, hidden size]
    hypotheses: list[int] | None  # for each sequence, the one it continues


def split_uids(text: str, known: Mapping[str, Any], delimiter: str) -> tuple[str, ...]:
    """Return the names of the blocks that a request is for.

    :param known: the blocks served here
    :raises Malformed: if the request names none, unknown ones, or one twice
    """
    uids = text.split(delimiter, len(known))
    for uid in uids:
        if uid not in known:
            raise Malformed(f"Remote peer does not serve {quoted(uid)}")
    if len(set(uids)) < len(uids):
        raise Malformed("a request names a block twice")
    return tuple(uids)


def read_session(request: runtime_pb2.ExpertRequest, longest: int) -> SessionRequest:
    """Return what the first request of a session asks for.

    :param longest: tokens of the longest session that the server accepts
    :raises Malformed: if it asks for something impossible
    """
    metadata = read_metadata(request.metadata)
    max_length = metadata.get("max_length")
    if type(max_length) is not int or not 0 <= max_length <= longest:
        # The words are petals': clients recognise the error by them.
        raise Malformed(f"Cannot allocate KV cache for {quoted(max_length)} tokens, max = {longest}")
    patience = read_number(metadata.get("alloc_timeout", 0.0), "alloc_timeout")
    session_id = metadata.get("session_id")
    push_key = read_key(metadata.get("push_key"))
    if push_key is not None and session_id is None:
        raise Malformed("a session with a push_key must have a session_id")
    adapter = metadata.get("active_adapter") or ""
    arguments = read_arguments(metadata.get("args_structure"), len(request.tensors))
    batch_size = 1
    if request.tensors:
        hidden = request.tensors[arguments[0] if arguments else 0]
        batch_size = read_integer(next(iter(hidden.size), None), "the number of sequences", 1, MAX_ROWS)
    return SessionRequest(
        max_length,
        batch_size,
        min(patience, MAX_PATIENCE),
        None if session_id is None else read_text(session_id, "session_id"),
        read_text(adapter, "active_adapter"),
        arguments,
        push_key,
    )


def read_arguments(structure: object, count: int) -> tuple[int, ...] | None:
    """Return the tensors' numbers in the order of the arguments, from petals' ``args_structure``.

    :param count: how many tensors there are
    :raises Malformed: unless it is what petals' clients send: placeholders of tensors, and no keywords
    """
    if structure is None:
        return None
    match structure:
        case [list() | tuple() as marks, dict() as keywords] if not keywords and 1 <= len(marks) <= MAX_ARGUMENTS:
            return tuple(_tensor_number(mark, count) for mark in marks)
    raise Malformed(f"arguments cannot be structured as {quoted(structure)}")


def _tensor_number(mark: object, count: int) -> int:
    digits = mark[3:] if isinstance(mark, bytes) and mark.startswith(b"__T") else b""
    if not digits.isdigit() or len(digits) > 2 or int(digits) >= count:
        raise Malformed(f"there is no tensor {quoted(mark)} among {count}")
    return int(digits)


def read_step(
    request: runtime_pb2.ExpertRequest,
    metadata: Mapping[str, Any],
    session: SessionRequest,
    *,
    position: int,
    num_blocks: int,
    hidden_size: int,
    earliest: int = 0,
) -> StepInputs:
    """Return the inputs of a session's step.

    :param metadata: the request's
    :param position: how many tokens the session has
    :param earliest: see ``rewound``
    :raises Malformed: if it does not fit the session
    """
    if len(request.tensors) > MAX_ARGUMENTS:
        raise Malformed(f"a step brings {len(request.tensors)} tensors")
    tensors = [read_tensor(tensor) for tensor in request.tensors]
    if session.arguments is not None:
        if max(session.arguments) >= len(tensors):
            raise Malformed(f"a step brings only {len(tensors)} tensors")
        tensors = [tensors[number] for number in session.arguments]
    if len(tensors) < 3:
        raise Malformed(f"a step brings {len(tensors)} of 3: hidden states, deep prompts, hypotheses")
    hidden, prompts, hypotheses = tensors[:3]
    check_inputs(hidden, prompts, hypotheses, (num_blocks, session.batch_size, hidden_size))
    start = rewound(position, metadata.get("start_from_position"), earliest)
    check_room(start, hidden.shape[1], session.max_length)
    if not _is_dummy(prompts) and prompts.shape[2] > session.max_length:
        raise Malformed(f"deep prompts of {prompts.shape[2]} tokens exceed the session's {session.max_length}")
    return StepInputs(
        start, hidden, None if _is_dummy(prompts) else prompts, None if _is_dummy(hypotheses) else hypotheses.tolist()
    )


def _is_dummy(tensor: torch.Tensor) -> bool:
    """Whether a tensor is petals' placeholder for none."""
    return tensor.numel() == 0


def rewound(position: int, wanted: object, earliest: int = 0) -> int:
    """Return the position at which a step begins.

    :param position: how many tokens the session has
    :param earliest: the first position, beside 0, to which the session can go back; blocks with a sliding window have
        overwritten what the tokens before it would see
    :raises Malformed: if it is beyond the session's position, or too far back
    """
    if wanted is None:
        return position
    if type(wanted) is not int or not 0 <= wanted <= position:
        raise Malformed(f"cannot start from position {quoted(wanted)}: the session has {position} tokens")
    if 0 < wanted < earliest:
        raise Malformed(f"cannot go back to position {wanted}: what its token sees is kept from {earliest} on")
    return wanted


def check_room(position: int, length: int, max_length: int) -> None:
    """Refuse tokens that exceed the session's attention cache.

    :raises Malformed: with the numbers
    """
    if position + length > max_length:
        raise Malformed(
            f"Maximum length exceeded: {position} tokens and {length} more exceed the session's {max_length}"
        )


def check_inputs(
    hidden: torch.Tensor, prompts: torch.Tensor, hypotheses: torch.Tensor, sizes: tuple[int, int, int]
) -> None:
    """Refuse inputs that do not fit the session: in a batch they would make others' steps fail too.

    :param sizes: blocks and sequences of the session, hidden size
    :raises Malformed: naming what does not fit
    """
    num_blocks, batch_size, hidden_size = sizes
    if hidden.ndim != 3 or hidden.shape[0] not in (1, batch_size) or hidden.shape[2] != hidden_size:
        shape = quoted(list(hidden.shape))
        raise Malformed(f"hidden states of shape {shape} are not [{batch_size}, tokens, {hidden_size}]")
    if not hidden.is_floating_point() or not is_finite(hidden):
        raise Malformed("hidden states must be finite numbers")
    if not _is_dummy(prompts):
        wanted = (num_blocks, batch_size, hidden_size)
        if prompts.ndim != 4 or (*prompts.shape[:2], prompts.shape[3]) != wanted:
            sizes_wanted = f"[{num_blocks}, {batch_size}, tokens, {hidden_size}]"
            raise Malformed(f"deep prompts of shape {quoted(list(prompts.shape))} are not {sizes_wanted}")
        if not prompts.is_floating_point() or not is_finite(prompts):
            raise Malformed("deep prompts must be finite numbers")
    if not _is_dummy(hypotheses):
        numbers = hypotheses.tolist() if hypotheses.ndim == 1 and hypotheses.dtype == torch.int64 else []
        if len(numbers) != batch_size or not all(0 <= number < batch_size for number in numbers):
            raise Malformed(f"hypotheses must be {batch_size} numbers of the session's sequences")


def check_call(request: runtime_pb2.ExpertRequest) -> None:
    """Check the parts of a request that petals itself will read.

    :raises Malformed: if they cannot be read
    """
    if len(request.tensors) > MAX_ARGUMENTS:
        raise Malformed(f"a request brings {len(request.tensors)} tensors")
    for tensor in request.tensors:
        check_tensor(tensor)
    read_arguments(read_metadata(request.metadata).get("args_structure"), len(request.tensors))
