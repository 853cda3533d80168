"""The garbage collector, kept from objects that stay as long as the program: some 400,000 come with these libraries."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Do without the collector, as for imports: it looks at what stays again and again, a sixth of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def freeze() -> None:
    """Make the collector ignore all existing objects from now on.

    Scanning them all takes a fifth of a second or more, in which no token is made, and writes to them all, which ends
    their sharing with forked processes.
    """
    gc.collect()
    gc.freeze()
