"""The file in which p2pd reads a private key."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def key_file(key: bytes) -> Iterator[Path]:
    """Keep a private key in a file that only its owner can read, while p2pd starts.

    Nobody finds half a key: the directory has a random name, which is told when all is written.

    :raises OSError: if it cannot be written; then nothing of it is left
    """
    with tempfile.TemporaryDirectory(prefix="petals-chat-") as directory:
        path = Path(directory, "identity")
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o600), "wb") as file:
            file.write(key)
        yield path
