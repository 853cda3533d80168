"""Machines on which the program cannot keep files where it would: it keeps them elsewhere, or says what to set."""

import functools
import logging
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hivemind.p2p import P2P

from config import Settings
from errors import ConfigError
from swarm import compiling, places
from swarm.places import LONGEST_SOCKET, SOCKET_NAME, PlaceUnusable
from tests.support.processes import GUNICORN, ROOT


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a user whom the system does not know, as in a container."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "PETALS_CACHE", "CACHE_DIR", "NUMBA_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Directories in which nothing can be written: root could, whatever their modes are."""
    found: set[Path] = set()
    access = os.access

    def may(path: Any, mode: int, **options: Any) -> bool:
        return Path(path) not in found and access(path, mode, **options)

    monkeypatch.setattr(os, "access", may)
    return found


def test_what_can_be_written(tmp_path: Path, locked: set[Path]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    locked.add(tmp_path / "locked")
    assert places.can_write(tmp_path) and places.can_write(tmp_path / "a" / "b")
    for name in ("file", "file/a", "locked", "locked/a/b"):
        assert not places.can_write(tmp_path / name)


def test_no_home(homeless: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlaceUnusable, match="^there is no home directory for a cache: set CACHE_DIR,"):
        places.default_cache_dir()
    with pytest.raises(PlaceUnusable, match="^CACHE_DIR=~/x is in a home directory that does not exist$"):
        places.named_cache_dir("~/x")
    places.settle_home(None)
    assert "HOME" not in os.environ
    places.settle_home(tmp_path / "cache")
    assert Path.home() == tmp_path / "cache"


def test_a_cache_that_is_named_replaces_a_home(homeless: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    places.settle_home(None)
    assert Path.home() == places.default_cache_dir() == tmp_path / "chat-petals"


def test_a_home_that_is_there_stays(homeless: None, tmp_path: Path, locked: set[Path]) -> None:
    for name in ("missing", "home"):
        os.environ["HOME"] = str(tmp_path / "locked" / name)
        (tmp_path / "locked").mkdir(exist_ok=True)
        locked.update((tmp_path / "locked", Path(os.environ["HOME"])))
        if name == "home":  # an image may hold models of the hub in it
            (tmp_path / "locked" / "home" / ".cache").mkdir(parents=True)
        places.settle_home(tmp_path / "cache")
        assert Path.home() == tmp_path / ("cache" if name == "missing" else "locked/home")


def test_petals_cache(homeless: None, tmp_path: Path, locked: set[Path]) -> None:
    os.environ["HOME"] = str(tmp_path)
    places.settle_petals(tmp_path / "cache")
    assert "PETALS_CACHE" not in os.environ
    locked.add(tmp_path)
    (tmp_path / "ours").mkdir()
    places.settle_petals(tmp_path / "ours")
    assert os.environ.pop("PETALS_CACHE") == str(tmp_path / "ours" / "petals")
    with pytest.raises(
        PlaceUnusable, match=f"^neither {tmp_path}/.cache/petals nor {tmp_path}/cache can be written: set "
    ):
        places.settle_petals(tmp_path / "cache")


def test_compiled_code(homeless: None, tmp_path: Path, locked: set[Path]) -> None:
    places.settle_compiled(tmp_path)
    assert "NUMBA_CACHE_DIR" not in os.environ
    locked.update((ROOT / "swarm" / "server", ROOT / "swarm" / "server" / "__pycache__"))
    places.settle_compiled(tmp_path)
    assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path / "numba")


def test_compiled_code_that_cannot_be_kept(caplog: pytest.LogCaptureFixture) -> None:
    def njit(cache: bool = False, **options: Any) -> Callable[[Any], Any]:
        if cache:
            raise RuntimeError("cannot cache function 'double': no locator available")
        return functools.lru_cache(maxsize=0)

    with caplog.at_level(logging.WARNING):
        assert compiling.kept(njit, lambda number: 2 * number)(21) == 42
    assert "no locator available; it is compiled at each start" in caplog.text


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Settle where temporary files are, if TMPDIR is a text."""
    for name in ("TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)

    def settle(text: str) -> None:
        monkeypatch.setenv("TMPDIR", text)
        places.settle_temporary_files()

    return settle


def test_temporary_files(temporary: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary(f"{tmp_path}/")
    assert os.environ["TMPDIR"] == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    temporary(".")
    assert os.environ["TMPDIR"] == str(tmp_path)
    temporary("")
    assert os.environ["TMPDIR"] == "/tmp"
    (tmp_path / "file").touch()
    for name, reason in (("missing", "No such file or directory"), ("file", "Not a directory")):
        with pytest.raises(
            PlaceUnusable, match=f"^TMPDIR={tmp_path}/{name} cannot hold temporary files: {reason}; set"
        ):
            temporary(f"{tmp_path}/{name}")
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setenv("TMP", str(tmp_path))
    places.settle_temporary_files()
    assert os.environ["TMPDIR"] == str(tmp_path)


def test_names_of_sockets_are_bounded(temporary: Callable[[str], None]) -> None:
    """To the byte. Those of p2pd are the longest."""
    assert f"/unix{tempfile.gettempdir()}/hivemind-" == P2P._UNIX_SOCKET_PREFIX
    room = SOCKET_NAME - len(LONGEST_SOCKET)
    with tempfile.TemporaryDirectory() as directory:
        longest = Path(directory, "x" * (room - len(directory) - 1))
        longest.mkdir()
        temporary(str(longest))
        with socket.socket(socket.AF_UNIX) as longest_socket:
            longest_socket.bind(f"{longest}{LONGEST_SOCKET}")
        longer = longest.with_name(f"{longest.name}x")
        longer.mkdir()
        with pytest.raises(PlaceUnusable, match=f"is too long for the sockets in it: TMPDIR may have {room} bytes$"):
            temporary(str(longer))


def test_a_model_that_cannot_be_prepared(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="SmolLM2-135M-Instruct cannot be prepared in .*/file/cache: set CACHE_DIR"):
        Settings(CACHE_DIR=str(tmp_path / "file" / "cache")).check_machine()
    Settings(CACHE_DIR=str(tmp_path / "file" / "cache"), MODELS=("/some/model",)).check_machine()


# Real starts


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        (
            "TMPDIR",
            "/nonexistent",
            "cannot hold temporary files: No such file or directory; set TMPDIR to a directory that can",
        ),
        ("PORT", "99999", "is no port: it must be a number from 0 to 65535"),
        ("HOST", "192.0.2.1", "is no address of this machine: Cannot assign requested address"),
        ("CACHE_DIR", f"{__file__}/cache", ""),
    ],
)
def test_gunicorn_ends_with_one_sentence(name: str, value: str, reason: str) -> None:
    result = subprocess.run(
        GUNICORN, cwd=ROOT, env={**os.environ, name: value}, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("Petals Chat cannot start: ") and name in result.stderr and reason in result.stderr


def test_a_user_without_home_and_with_a_checkout_that_is_not_theirs(tmp_path: Path) -> None:
    """A server is loaded; it would not be if its compiled code, or petals' cache, had no place."""
    if os.getuid() or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv to become another user")
    cache_dir = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        os.chown(cache_dir, 12345, 12345)
        may_read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # Python may be root's
        user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", *may_read]
        command = [*user, sys.executable, "-m", "swarm.server", "/nowhere/model"]
        environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
        run = functools.partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        refused = run(command)
        assert refused.returncode == 1
        assert refused.stderr.startswith("there is no home directory for a cache: set CACHE_DIR, or --cache-dir of a")
        loaded = run([*command, "--cache-dir", str(cache_dir)])
        assert (loaded.returncode, loaded.stderr) == (1, "/nowhere/model: no such directory\n")
        assert (cache_dir / "numba").is_dir()
    finally:
        shutil.rmtree(cache_dir)
