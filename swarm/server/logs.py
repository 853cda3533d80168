"""Log filters for everyday events for which petals and hivemind print tracebacks."""

import logging

import swarm.compat  # noqa: F401

from petals.server.memory_cache import AllocationFailed


def is_abandoned_step(record: logging.LogRecord) -> bool:
    """Whether a record reports a step whose session was closed before its turn.

    A cancelled answer looks like this to a server; it deserves no error with a traceback.
    """
    return bool(record.exc_info and isinstance(record.exc_info[1], KeyError) and "attempting to recover" in record.msg)


def shorten_refusal(record: logging.LogRecord) -> bool:
    """Drop the traceback from the record of a session that was refused for lack of attention cache.

    Busy servers refuse sessions all the time; clients retry once a second or more often.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, AllocationFailed):
        record.msg, record.args, record.exc_info = "a session was refused: %s", (error,), None
    return True
