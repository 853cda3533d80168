"""Where this machine lets the program keep files: caches, temporary files, and the sockets among them.

Libraries look at these places when they are loaded. So nothing is imported here but the standard library, and what is
done here is done first.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

# Bytes that the name of a socket may have: sun_path of sockaddr_un, less the zero at its end.
SOCKET_NAME = 107 if sys.platform == "linux" else 103
# Of the sockets that are made among the temporary files, p2pd's have the longest names.
LONGEST_SOCKET = "/hivemind-p2pclient-0123456789a.sock"
REMEDY = "set CACHE_DIR, or --cache-dir of a server, to a directory that can be written"
CODE = Path(__file__).resolve().parent


class PlaceUnusable(Exception):
    """A directory that files must be written to is missing, or cannot be written. The message names the setting."""


def can_write(directory: Path) -> bool:
    """Whether files can be written in a directory, which may have to be made first."""
    directory = directory.absolute()
    existing = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


def default_cache_dir() -> Path:
    """Return the default directory of prepared models: ``chat-petals`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    :raises PlaceUnusable: if there is no home directory
    """
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "chat-petals"
    try:
        return Path.home() / ".cache" / "chat-petals"
    except RuntimeError:
        raise PlaceUnusable(f"there is no home directory for a cache: {REMEDY}") from None


def named_cache_dir(name: str) -> Path:
    """Return the cache directory of this name; of none, the default one.

    :raises PlaceUnusable: if it is in a home directory, and there is none
    """
    try:
        return Path(name).expanduser() if name else default_cache_dir()
    except RuntimeError:
        raise PlaceUnusable(f"CACHE_DIR={name} is in a home directory that does not exist") from None


def settle_home(cache_dir: Path | None) -> None:
    """Give this process a home directory, if it has none, or one that is not there: our cache directory.

    Libraries keep caches of their own in it, and petals cannot be loaded without one.

    :param cache_dir: None: the default, if there is one
    """
    if _has_home():
        return
    if cache_dir is None and (named := os.environ.get("XDG_CACHE_HOME")):
        cache_dir = Path(named) / "chat-petals"
    if cache_dir is not None:
        os.environ["HOME"] = str(cache_dir.absolute())


def _has_home() -> bool:
    try:
        cache = Path.home() / ".cache"
    except RuntimeError:
        return False
    return os.path.isdir(cache) or can_write(cache)  # one that can only be read may hold models of the hub


def settle_petals(cache_dir: Path) -> None:
    """Let petals keep its cache in ours, if it cannot keep it in the home directory. Its servers do not load without.

    :raises PlaceUnusable: if neither can be written
    """
    place = Path(os.environ.get("PETALS_CACHE") or Path.home() / ".cache" / "petals")
    if can_write(place):
        return
    if "PETALS_CACHE" in os.environ or not can_write(cache_dir):
        raise PlaceUnusable(f"neither {place} nor {cache_dir} can be written: {REMEDY}")
    os.environ["PETALS_CACHE"] = str(cache_dir.absolute() / "petals")


def settle_compiled(cache_dir: Path) -> None:
    """Let Numba keep what it compiles in our cache directory, if it cannot keep it beside the code."""
    if not can_write(CODE / "server" / "__pycache__") and can_write(cache_dir):
        os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir.absolute() / "numba"))


def settle_temporary_files() -> None:
    """Make all libraries keep temporary files in one directory: Python and PyTorch look for it in different ways.

    :raises PlaceUnusable: if none can be written there, or sockets cannot be made there
    """
    name = next((name for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)), None)
    directory = os.path.abspath(os.environ[name] if name else "/tmp")
    called = f"{name}={os.environ[name]}" if name else directory
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise PlaceUnusable(
            f"{called} cannot hold temporary files: {error.strerror}; set TMPDIR to a directory that can"
        ) from None
    room = SOCKET_NAME - len(LONGEST_SOCKET)
    if len(os.fsencode(directory)) > room:
        raise PlaceUnusable(f"{called} is too long for the sockets in it: TMPDIR may have {room} bytes")
    os.environ["TMPDIR"] = directory


def publish(partial: Path, target: Path) -> None:
    """Give a directory of files its final name once all of it is on disk; what has the name by then is replaced.

    Most of its content is never checked again.

    :raises OSError: if that fails
    """
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
