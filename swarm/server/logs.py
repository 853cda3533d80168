"""What a server logs, and what it leaves out: everyday events for which petals and hivemind print tracebacks."""

import logging

import swarm.compat  # noqa: F401

from petals.server.memory_cache import AllocationFailed


def is_abandoned_step(record: logging.LogRecord) -> bool:
    """Whether a record tells of a step whose session was closed before its turn came.

    That is what a cancelled answer looks like to a server, and no reason for an error with a traceback in the log.
    """
    return bool(record.exc_info and isinstance(record.exc_info[1], KeyError) and "attempting to recover" in record.msg)


def shorten_refusal(record: logging.LogRecord) -> bool:
    """Leave the traceback out of a record that tells of a session for which there was no attention cache.

    On a busy server that is an everyday answer; its clients ask again, once a second and more often.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, AllocationFailed):
        record.msg, record.args, record.exc_info = "a session was refused: %s", (error,), None
    return True
