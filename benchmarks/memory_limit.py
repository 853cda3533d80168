"""A limit on the memory of a program and its children, by the kernel's control groups, and what they used of it."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
# By version of control groups: the directory of all of them, the files of limit and peak, and their name in
# /proc/self/cgroup.
VERSIONS = {
    "1": (CGROUPS / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory"),
    "2": (CGROUPS, "memory.max", "memory.peak", ""),
}
CLEAR = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"


class NoLimit(Exception):
    """This machine does not let us limit memory."""


def version() -> str:
    """Return the version of control groups that limits memory here."""
    return "1" if (VERSIONS["1"][0] / VERSIONS["1"][1]).exists() else "2"


@contextlib.contextmanager
def limited_group(size: int) -> Iterator[Path]:
    """Make a control group below this process's own, with a limit, and remove it afterwards.

    A limit of the address space or of private memory (RLIMIT_AS, RLIMIT_DATA) would not do: the first counts mapped
    files whether they are in memory or not, the second not at all. A control group counts what is in memory, pages of
    files among it, and takes them away when there is no room.

    :param size: bytes
    :raises NoLimit: if this process may not
    """
    root, limit, _, name = VERSIONS[version()]
    rows = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next((path for _, controllers, path in rows if controllers == name), None)
    if own is None:
        raise NoLimit("no control group limits memory here")
    # In a container the name may be one of the host's, of which only the end is visible.
    base = root / own.lstrip("/")
    group = (base if base.is_dir() else root) / f"petals-chat-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(size))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        raise NoLimit(f"{group}: {error.strerror}") from error
    try:
        yield group
    finally:
        end(group)
        group.rmdir()


def end(group: Path) -> None:
    """Kill what the programs of a group have left behind, and wait until it has ended."""
    while pids := (group / "cgroup.procs").read_text().split():
        for pid in map(int, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def peak(group: Path) -> int:
    """Return the most bytes that a group's processes had in memory, together with the pages of files they read."""
    return int((group / VERSIONS[version()][2]).read_text())


def run_in(group: Path, command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a group, and return what it printed."""
    starter = [sys.executable, "-c", CLEAR, str(group / "cgroup.procs"), sys.executable, *command]
    return subprocess.run(starter, stdout=subprocess.PIPE, text=True, check=True, **options)  # type: ignore[call-overload]


def forget(directory: Path) -> None:
    """Take the files below a directory out of memory: pages count for the group that has read them first."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def free_disk(directory: Path) -> int:
    """Return the bytes that are free where a directory is, or will be."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return shutil.disk_usage(existing).free
