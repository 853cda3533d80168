"""Check messages before they enter a batch, where a bad one would fail all of its sessions."""

from collections.abc import Sequence
from typing import Any

from swarm.server.attention_cache import AttentionCache
from swarm.server.channel import Opening, StepRequest
from swarm.server.steps import Session


def is_number(value: Any, low: int, high: int) -> bool:
    """Whether a value is an integer of [low, high); a float or a bool is not."""
    return type(value) is int and low <= value < high


def check_opening(opening: Opening, cache: AttentionCache, windows: Sequence[int | None]) -> None:
    """Refuse a session that cannot be computed.

    :param windows: of the server's blocks, see ``RaggedBlocks``
    :raises ValueError: says why
    """
    first, last, num_blocks = opening.first, opening.last, len(windows)
    if not (is_number(first, 0, num_blocks) and is_number(last, first + 1, num_blocks + 1)):
        raise ValueError(f"there are no blocks [{first}, {last}) among {num_blocks}")
    descriptor = cache.descriptor
    if descriptor.windows != tuple(windows[first:last]) or not descriptor.rows:
        raise ValueError(f"attention cache like {descriptor} does not fit blocks [{first}, {last})")


def check_step(request: StepRequest, session: Session, hidden_size: int) -> None:
    """Refuse a step that does not fit its session: it would fail others too. Handlers give better messages.

    :raises ValueError: says what does not fit
    """
    blocks, rows, max_length = session.last - session.first, session.rows, session.cache.descriptor.max_length
    if len(request.shape) != 3 or not all(type(size) is int for size in request.shape):
        raise ValueError(f"hidden states of shape {request.shape} are not [sequences, tokens, hidden size]")
    sequences, tokens, size = request.shape
    if sequences not in (1, rows) or tokens < 1 or size != hidden_size:
        raise ValueError(f"hidden states of shape {list(request.shape)} are not [{rows}, tokens, {hidden_size}]")
    if not is_number(request.start, 0, max_length - tokens + 1):
        raise ValueError(f"{tokens} tokens from position {request.start!r} do not fit {max_length}")
    if not session.reach.allows(request.start):
        raise ValueError(f"what tokens from position {request.start} see is overwritten")
    if request.hypotheses is not None and not (
        len(request.hypotheses) == rows and all(is_number(number, 0, rows) for number in request.hypotheses)
    ):
        raise ValueError(f"hypotheses are not {rows} numbers of the session's sequences")
    if request.prompts is not None:
        if len(request.prompts) != blocks:
            raise ValueError(f"there are deep prompts of {len(request.prompts)} blocks, not of {blocks}")
        for prompt in request.prompts:
            if prompt is not None and (prompt.ndim != 3 or len(prompt) < sequences or prompt.shape[2] != hidden_size):
                raise ValueError(f"deep prompts of shape {list(prompt.shape)} do not fit {sequences} sequences")
