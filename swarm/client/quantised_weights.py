"""A head's weights in 8 bits, with what each row lost by it: made once, in pieces, and kept in the cache directory."""

import hashlib
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, fields
from pathlib import Path

import swarm.compat  # noqa: F401

import numpy as np
import numpy.typing as npt
import torch

from swarm.client.head_kernels import BLOCK, GROUP, LANES, quantise_rows
from swarm.places import publish

log = logging.getLogger(__name__)

VERSION = 1  # of what is kept; increment it when that changes
PIECE = 1024  # rows that are quantised at a time: with BLOOM's, 14 MB
SAMPLES = 4096  # places by which weights are known
CHECKED_ROWS = 64  # that are quantised again when a kept copy is opened
CACHE_LIMIT = 16 * 2**30  # bytes of all kept copies; BLOOM-176B's takes 3.7 GB
SPARE = 2**30  # bytes that remain free on the disk
KEPT = "heads"  # directory below the cache directory

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class QuantisedWeights:
    """Codes that stand for weights (they times scales), and what is lost. Rows and columns are padded with zeros."""

    codes: Array  # [padded rows, padded columns], int8
    scales: Array  # [padded rows, blocks of columns], float32
    errors: Array  # [padded rows], float32: at least the L2 norm of the weights less those that the codes stand for
    norms: Array  # [padded rows], float32: at least that of either

    @classmethod
    def make(cls, shape: tuple[int, ...], array: Callable[[str, tuple[int, ...], str], Array]) -> "QuantisedWeights":
        """Make one that is to be filled.

        :param shape: of the weights
        :param array: makes an array of zeros with this name, shape and dtype
        """
        rows, columns = -(-shape[0] // GROUP) * GROUP, -(-shape[1] // LANES) * LANES
        return cls(
            array("codes", (rows, columns), "int8"),
            array("scales", (rows, -(-columns // BLOCK)), "float32"),
            array("errors", (rows,), "float32"),
            array("norms", (rows,), "float32"),
        )


def raw(weight: torch.Tensor) -> Array:
    """Return weights as the kernels take them; nothing is copied."""
    kinds = {torch.bfloat16: torch.int16, torch.float16: torch.uint16, torch.float32: torch.float32}
    return weight.view(kinds[weight.dtype]).numpy()


def quantise(weights: Array, into: QuantisedWeights, pool: Executor) -> None:
    """Quantise all rows, a piece at a time."""

    def fill(first: int) -> None:
        last = min(len(weights), first + PIECE)
        errors, norms = np.empty(last - first), np.empty(last - first)
        quantise_rows(weights, first, last, into.codes[first:last], into.scales[first:last], errors, norms)
        into.errors[first:last], into.norms[first:last] = _above(errors), _above(norms)

    list(pool.map(fill, range(0, len(weights), PIECE)))


def _above(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return float32 that are no less than these sums, whose own rounding is far below a millionth."""
    return np.nextafter((values * (1 + 1e-6)).astype(np.float32), np.float32(np.inf))


def quantised(weight: torch.Tensor, cache_dir: Path | None, identity: str, pool: Executor) -> QuantisedWeights:
    """Return the quantised copy of a head's weights: a kept one, or a new one, which is kept if there is room.

    :param weight: [vocabulary, hidden size], bfloat16, float16 or float32
    :param cache_dir: None: nothing is kept
    :param identity: of the files that the weights are from: another text whenever they may have changed
    """
    weights = raw(weight)
    if cache_dir is not None:
        target = cache_dir / KEPT / _key(weights, identity)
        try:
            if target.exists() and not _is_whole(weights, target):
                shutil.rmtree(target)
            if not target.exists():
                _keep(weights, target, pool)
            return _open(target)
        except OSError as error:
            log.warning("The head's weights in 8 bits are not kept: %s", error)
    made = QuantisedWeights.make(weights.shape, lambda name, shape, dtype: np.zeros(shape, dtype))
    quantise(weights, made, pool)
    return made


def _key(weights: Array, identity: str) -> str:
    digest = hashlib.sha256(f"{VERSION} {BLOCK} {weights.dtype} {weights.shape} {identity}".encode())
    for row in range(0, len(weights), max(1, len(weights) // SAMPLES)):
        digest.update(weights[row, :LANES].tobytes())
    return digest.hexdigest()[:32]


def _open(target: Path) -> QuantisedWeights:
    """Map a kept copy into memory: what is not used goes when there is too little."""
    return QuantisedWeights(*(np.load(target / f"{row.name}.npy", mmap_mode="r") for row in fields(QuantisedWeights)))


def _is_whole(weights: Array, target: Path) -> bool:
    """Whether a kept copy can be read, and is of these weights, as far as some rows tell."""
    try:
        found = _open(target)
    except ValueError:
        return False
    for row in range(0, len(weights), max(1, len(weights) // CHECKED_ROWS)):
        again = QuantisedWeights.make((1, weights.shape[1]), lambda name, shape, dtype: np.zeros(shape, dtype))
        quantise_rows(weights, row, row + 1, again.codes, again.scales, np.empty(1), np.empty(1))
        if not (again.codes[0] == found.codes[row]).all() or not (again.scales[0] == found.scales[row]).all():
            return False
    return True


def _keep(weights: Array, target: Path, pool: Executor) -> None:
    """Write a quantised copy into ``target``, which appears whole.

    :raises OSError: if it cannot be written, or there is too little room
    """
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if target.exists():  # another process made it meanwhile
            return
        size = int(weights.shape[0] * weights.shape[1] * 1.05)
        _make_room(target.parent, size)
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:

            def array(name: str, shape: tuple[int, ...], dtype: str) -> Array:
                return np.lib.format.open_memmap(partial / f"{name}.npy", "w+", dtype, shape)

            made = QuantisedWeights.make(weights.shape, array)
            quantise(weights, made, pool)
            for row in fields(made):
                getattr(made, row.name).flush()
            publish(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _make_room(directory: Path, size: int) -> None:
    """Delete the copies that were made longest ago until there is room for another one.

    :raises OSError: if there is too little room on the disk
    """
    others = sorted((it for it in directory.iterdir() if it.is_dir()), key=lambda it: it.stat().st_mtime)
    sizes = {it: sum(file.stat().st_size for file in it.iterdir()) for it in others}
    while others and sum(sizes[it] for it in others) + size > CACHE_LIMIT:
        shutil.rmtree(others.pop(0), ignore_errors=True)
    if shutil.disk_usage(directory).free < size + SPARE:
        raise OSError(f"{directory} has too little room for {size / 2**30:.1f} GiB")
