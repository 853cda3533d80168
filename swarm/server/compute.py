"""Compute a batch: gather the inputs of its pieces, run the blocks, and store the outputs with their steps."""

from collections.abc import Sequence

import swarm.compat  # noqa: F401

import torch

from swarm.server.blocks import Part, RaggedBlocks
from swarm.server.steps import Piece, Step

# Larger batches are bound by computation, not by memory.
DECODING_ROWS = 32


def threads_for(batch: Sequence[Piece], threads: int) -> int:
    """Return how many of ``threads`` threads should compute a batch.

    Decoding is bound by memory, so it is hardly slower on one core less, while the handlers, connections and clients of
    several sessions need a core as well.
    """
    decoding = len(batch) > 1 and sum(piece.size for piece in batch) <= DECODING_ROWS
    return max(1, threads - 1) if decoding else threads


def compute_batch(blocks: RaggedBlocks, batch: Sequence[Piece], first: int, last: int) -> None:
    """Compute the pieces of a batch by blocks [first, last) of the span. Store results in their steps and caches."""
    parts: list[Part] = []
    inputs: list[torch.Tensor] = []
    for piece in batch:
        step = piece.step
        if step.hypotheses is not None:
            step.session.cache.reorder(step.start, step.hypotheses)
            step.hypotheses = None  # a retry must not reorder it again
        rows = slice(piece.row, piece.row + piece.rows)
        start, end = step.done, step.done + piece.tokens
        for row, cache in enumerate(step.session.cache.sequences[rows], piece.row):
            prompts = remaining_prompts(step, row, blocks.device)
            parts.append(Part(cache, step.start + start, piece.tokens, prompts))
        inputs.append(step.hidden[rows, start:end].flatten(0, 1))
    hidden = torch.cat(inputs).to(blocks.device)
    outputs = blocks.forward(hidden, parts, first, last).cpu().split([piece.size for piece in batch])
    for piece, output in zip(batch, outputs, strict=True):
        store_output(piece, output)


def remaining_prompts(step: Step, row: int, device: torch.device) -> list[torch.Tensor | None] | None:
    """Return the rest of a sequence's deep prompts."""
    if step.prompts is None:
        return None
    return [None if prompt is None else prompt[row, step.done :].to(device) for prompt in step.prompts]


def store_output(piece: Piece, output: torch.Tensor) -> None:
    """Store a piece's output in its step, and update the step's progress.

    :param output: [sequences times tokens, hidden size]
    """
    step = piece.step
    start, end = step.done, step.done + piece.tokens
    step.hidden[piece.row : piece.row + piece.rows, start:end] = output.view(piece.rows, piece.tokens, -1)
    if step.rows < step.session.rows:  # one sequence stands for all of the session's
        step.session.cache.spread(step.start + start, step.start + end)
    step.turn += piece.size
    step.width, step.row = piece.tokens, piece.row + piece.rows
    if step.row == step.rows:
        step.done, step.width, step.row = end, 0, 0
