"""A server's identity and addresses: one that founded its swarm keeps both across restarts."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import swarm.compat  # noqa: F401

from hivemind import P2P

from swarm.options import ServerOptions

# Passed on across a restart, if the server founded its swarm: its private key (hexadecimal) and the addresses it
# listens on, where others look for it.
IDENTITY, MADDRS = "SWARM_SERVER_IDENTITY", "SWARM_SERVER_MADDRS"
ALL_ADDRESSES = ("/ip4/0.0.0.0/tcp/0",)


@contextlib.contextmanager
def identity_file(options: ServerOptions) -> Iterator[str | None]:
    """Provide a file with the server's private key while p2pd starts; None if any key will do.

    Others know a server that founded its swarm by its key, so it needs the same one after a restart.
    """
    if options.identity_path or options.initial_peers:
        yield options.identity_path
        return
    with tempfile.TemporaryDirectory(prefix="petals-chat-") as directory:
        path = Path(directory, "identity")
        if IDENTITY in os.environ:
            path.touch(mode=0o600)
            path.write_bytes(bytes.fromhex(os.environ[IDENTITY]))
        else:
            P2P.generate_identity(str(path))
            os.environ[IDENTITY] = path.read_bytes().hex()
        yield str(path)


def listening_maddrs(options: ServerOptions) -> list[str]:
    """Return the addresses to listen on: those from before a restart, or else the requested ones."""
    return os.environ.get(MADDRS, "").split() or list(options.host_maddrs or ALL_ADDRESSES)


def remember_maddrs(host_maddrs: Sequence[str], visible_maddrs: Sequence[object]) -> None:
    """Make this process listen on the same port after a restart, if the port was free to choose.

    :param visible_maddrs: where others reach it now
    """
    ports = re.search(r"/tcp/(\d+)", " ".join(map(str, visible_maddrs)))
    if ports:
        os.environ[MADDRS] = " ".join(re.sub(r"/tcp/0(?=/|$)", ports[0], maddr) for maddr in host_maddrs)
