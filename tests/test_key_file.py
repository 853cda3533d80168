"""The file of a private key: nobody else can read it, and both who found a swarm write it."""

import os
import stat
import tempfile
from pathlib import Path

import pytest
from hivemind.p2p import PeerID

from swarm.client.membership import Swarm
from swarm.errors import SwarmUnreachable
from swarm.key_file import key_file
from swarm.options import ServerOptions
from swarm.server import identity


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files are."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_only_the_owner_can_read_a_key_and_nothing_of_it_stays(place: Path) -> None:
    mask = os.umask(0)
    try:
        with key_file(b"secret") as path:
            assert path.read_bytes() == b"secret" and path.is_relative_to(place)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    finally:
        os.umask(mask)
    assert list(place.iterdir()) == []


def test_a_key_file_is_never_open_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before its key is in it, either."""
    modes = []
    really_open = os.open

    def note(path: str, flags: int, mode: int = 0o777, **options: int) -> int:
        if Path(path).name == "identity" and flags & os.O_CREAT:
            modes.append((mode, bool(flags & os.O_EXCL)))
        return really_open(path, flags, mode, **options)

    monkeypatch.setattr(os, "open", note)
    with key_file(b"secret"):
        assert modes == [(0o600, True)]


def test_half_a_key_is_not_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def read_only(path: str, flags: int, mode: int = 0o777, **options: int) -> int:
        file = really_open(path, flags, mode, **options)
        if Path(path).name != "identity":
            return file
        os.close(file)
        return really_open(path, os.O_RDONLY)  # so that nothing can be written

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError), key_file(b"secret"):
        pytest.fail("a file was told of")
    assert list(place.iterdir()) == []


def test_a_server_that_founded_its_swarm_keeps_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(identity.IDENTITY, "")
    monkeypatch.delenv(identity.IDENTITY)
    found = []
    for _ in range(2):  # the second time, it begins again
        with identity.identity_file(ServerOptions("some/model")) as path:
            assert path is not None
            found.append(PeerID.from_identity(Path(path).read_bytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "path"),
    [
        (ServerOptions("some/model", initial_peers=("/ip4/192.0.2.1/tcp/1",)), None),
        (ServerOptions("some/model", identity_path="its/own"), "its/own"),
    ],
)
def test_other_servers_need_no_key_of_this_program(
    options: ServerOptions, path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(identity.IDENTITY, raising=False)
    with identity.identity_file(options) as found:
        assert found == path
    assert identity.IDENTITY not in os.environ


def test_the_first_peer_is_given_its_key_in_such_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def start(failure: str, given_up: object, **options: object) -> None:
        path = Path(str(options["identity_path"]))
        given.append((path.read_bytes(), stat.S_IMODE(path.stat().st_mode)))
        raise SwarmUnreachable(failure)

    monkeypatch.setattr("swarm.client.membership.Node", start)
    swarm = Swarm(host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    with pytest.raises(SwarmUnreachable, match="cannot listen"):
        swarm._start()
    assert given == [(swarm._identity, 0o600)]
