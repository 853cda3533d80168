"""A server's identity and addresses: one that founded its swarm keeps both across restarts."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence

import swarm.compat  # noqa: F401

from hivemind.proto import crypto_pb2
from hivemind.utils.crypto import RSAPrivateKey

from swarm.key_file import key_file
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
    if IDENTITY not in os.environ:
        os.environ[IDENTITY] = make_identity().hex()
    with key_file(bytes.fromhex(os.environ[IDENTITY])) as path:
        yield str(path)


def make_identity() -> bytes:
    """Return a new private key as p2pd reads it: an RSA key, since petals' server asks whether others have it already,
    for which hivemind can read no other kind.
    """
    data = RSAPrivateKey().to_bytes()
    return crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.RSA, data=data).SerializeToString()


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
