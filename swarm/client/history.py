"""The inputs a span has received, kept so that other servers can recompute what is lost; and their memory budget."""

import itertools

import torch


class HistoryBudget:
    """Memory for recovery, shared by all sessions of a program. Used on the event-loop thread only."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes
        self.used = 0  # bytes


class History:
    """The inputs a span has received: all of them, or only the newest if older ones were dropped."""

    def __init__(self) -> None:
        self.length = 0  # tokens received
        self.size = 0  # bytes held
        self._dropped = 0  # tokens whose inputs are no longer held
        self._chunks: list[torch.Tensor] = []  # [1 or rows, tokens, hidden size] each

    @property
    def complete(self) -> bool:
        return self._dropped == 0

    def extend(self, hidden: torch.Tensor, end: int) -> None:
        """Append the part of ``hidden``, which ends with the token before ``end``, that is not here yet."""
        missing = end - self.length
        if missing > 0:
            self._push(hidden[:, hidden.shape[1] - missing :])
            self.length = end

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return the inputs of tokens [start, end), or of the first of them up to where the rows diverge."""
        last = self._chunks[-1]
        if (start, end) == (self.length - last.shape[1], self.length):
            return last  # the common case, a decoding step
        self._join()
        position = self._dropped
        for chunk in self._chunks:
            if start < position + chunk.shape[1]:
                return chunk[:, start - position : end - position]
            position += chunk.shape[1]
        raise IndexError(f"the history ends before token {start}")

    def _join(self) -> None:
        """Join the chunks that all rows share into one, and the others into another."""
        groups = [list(group) for _, group in itertools.groupby(self._chunks, key=lambda chunk: chunk.shape[0])]
        self._chunks = [torch.cat(group, dim=1) if len(group) > 1 else group[0] for group in groups]

    def truncate(self, length: int) -> None:
        """Forget the inputs of the tokens after the first ``length``."""
        if length >= self.length:
            return
        # From the end on, so that forgetting a few tokens costs no more than they are.
        while self._chunks and (begin := self.length - self._chunks[-1].shape[1]) >= length:
            self._pop()
            self.length = begin
        if self._chunks and self.length > length:
            chunk = self._pop()
            self._push(chunk[:, : chunk.shape[1] - (self.length - length)].clone())
        self.length = length
        self._dropped = min(self._dropped, length)

    def _push(self, chunk: torch.Tensor) -> None:
        self._chunks.append(chunk)
        self.size += chunk.numel() * chunk.element_size()

    def _pop(self) -> torch.Tensor:
        chunk = self._chunks.pop()
        self.size -= chunk.numel() * chunk.element_size()
        return chunk

    def drop(self) -> None:
        """Forget all inputs."""
        self._chunks.clear()
        self.size, self._dropped = 0, self.length
