"""What can go wrong with a request, the status of each, and the one body that reports every failure.

ApiError                        a failure with a code, a status and a message for the client
 ├── InvalidParameter           400
 ├── Unauthorized               401
 ├── ModelNotAllowed            403
 ├── OriginNotAllowed           403
 ├── SessionNotFound            404
 ├── ModelNotFound              404
 ├── RequestTimeout             408
 ├── WrongModel                 409
 ├── RequestTooLarge            413
 ├── HostNotAllowed             421
 ├── TooLong                    422
 ├── TooManySessions            429, with Retry-After
 ├── TooManyRequests            429, with Retry-After
 ├── ModelNotReady              503, with Retry-After
 ├── ShuttingDown               503, with Retry-After
 ├── Overloaded                 503, with Retry-After
 └── TimedOut                   504
ConfigError                     a setting is wrong: the program does not start
"""

import logging
import traceback
from pathlib import Path
from typing import Any

from swarm import errors as swarm_errors

ROOT = Path(__file__).parent  # not resolved: frames have the path that was imported


class ConfigError(Exception):
    """A setting is wrong. The message names it."""


class ApiError(Exception):
    """A failure that is reported to the client."""

    status = 500
    code = "internal_error"
    retry_after: int | None = None  # seconds

    def __init__(self, message: str = "", param: str | None = None) -> None:
        """Make an error.

        :param param: the parameter that is wrong, if any
        """
        super().__init__(message)
        self.param = param


class InvalidParameter(ApiError):
    """A parameter is missing, of the wrong type or out of range."""

    status, code = 400, "invalid_parameter"


class Unauthorized(ApiError):
    """An API key is needed, or the one that was sent is unknown."""

    status, code = 401, "invalid_api_key"


class ModelNotAllowed(ApiError):
    """The model is not served to this caller."""

    status, code = 403, "model_not_allowed"


class OriginNotAllowed(ApiError):
    """The request was sent for a page of a site that may not use this app."""

    status, code = 403, "origin_not_allowed"


class SessionNotFound(ApiError):
    """No such inference session: never opened, closed or expired."""

    status, code = 404, "session_not_found"


class ModelNotFound(ApiError):
    """No such model is served here."""

    status, code = 404, "model_not_found"


class RequestTimeout(ApiError):
    """The client took too long to send its request."""

    status, code = 408, "request_timeout"


class WrongModel(ApiError):
    """The session was opened for another model."""

    status, code = 409, "wrong_model"


class RequestTooLarge(ApiError):
    """The body is larger than the limit."""

    status, code = 413, "request_too_large"


class HostNotAllowed(ApiError):
    """The app was asked by a name that is not its own."""

    status, code = 421, "host_not_allowed"


class TooLong(ApiError):
    """More tokens than the model or the session allows."""

    status, code = 422, "too_long"


class TooManySessions(ApiError):
    """All sessions are taken."""

    status, code, retry_after = 429, "too_many_sessions", 5


class TooManyRequests(ApiError):
    """A limit on requests, tokens or concurrent answers is reached, or too many requests wait."""

    status, code, retry_after = 429, "too_many_requests", 5


class ModelNotReady(ApiError):
    """The model is still loading, or failed to load."""

    status, code, retry_after = 503, "model_not_ready", 5


class ShuttingDown(ApiError):
    """The program is ending and takes no new requests."""

    status, code, retry_after = 503, "shutting_down", 10


class Overloaded(ApiError):
    """There are more connections or requests than there is room for."""

    status, code, retry_after = 503, "overloaded", 5


class TimedOut(ApiError):
    """A session was busy with another request or connection for too long."""

    status, code = 504, "timed_out"


# What the swarm raises: (status, code, Retry-After in seconds or None).
SWARM_ERRORS: dict[type[Exception], tuple[int, str, int | None]] = {
    swarm_errors.ModelUnavailable: (503, "model_unavailable", None),
    swarm_errors.ModelMismatch: (503, "model_mismatch", None),
    swarm_errors.SwarmUnreachable: (503, "swarm_unreachable", 30),
    swarm_errors.ClockOff: (503, "swarm_unreachable", 30),
    swarm_errors.BlocksMissing: (503, "blocks_missing", 30),
    swarm_errors.CacheFull: (503, "cache_full", 10),
    swarm_errors.SwarmTimeout: (504, "swarm_timeout", None),
    swarm_errors.SessionLengthExceeded: (422, "too_long", None),
    swarm_errors.TokenizerBusy: (429, "too_many_requests", 5),
    swarm_errors.SessionClosed: (404, "session_not_found", None),
    swarm_errors.Cancelled: (499, "cancelled", None),  # nginx's status for a client that is gone: nobody reads it
}


def describe(error: BaseException) -> tuple[int, str, str, int | None]:
    """Return (status, code, message, Retry-After in seconds or None) of any exception."""
    if isinstance(error, ApiError):
        return error.status, error.code, str(error), error.retry_after
    for kind, (status, code, retry_after) in SWARM_ERRORS.items():
        if isinstance(error, kind):
            return status, code, str(error), retry_after
    return 500, "internal_error", f"{type(error).__name__}: {error}", None


def is_ours(error: BaseException) -> bool:
    """Whether a failure is a fault of this program, and not of a request or of the swarm."""
    return describe(error)[0] >= 500 and not isinstance(error, (ApiError, swarm_errors.SwarmError))


def log_failure(log: logging.Logger, what: str, error: BaseException) -> None:
    """Log a failure: with its traceback if it is ours, otherwise as one line. Call it where the error is handled."""
    if is_ours(error):
        log.error("%s failed", what, exc_info=error)
    else:
        _, code, message, _ = describe(error)
        log.info("%s refused: %s: %s", what, code, message)


def error_body(error: BaseException, request_id: str, *, traced: bool = True) -> dict[str, Any]:
    """Return the body that reports a failure to a client.

    :param traced: whether the traceback has frames, or is only the line that names the error
    """
    _, code, message, _ = describe(error)
    return {
        "ok": False,
        "error": {"code": code, "message": message},
        "traceback": own_traceback(error) if traced else "".join(traceback.format_exception_only(error)),
        "request_id": request_id,
    }


def own_traceback(error: BaseException) -> str:
    """Return the traceback cut down to this project's own frames, with paths relative to the project."""
    lines = ["Traceback (most recent call last):\n"]
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts:
            lines.append(f'  File "{path.relative_to(ROOT)}", line {frame.lineno}, in {frame.name}\n    {frame.line}\n')
    lines += traceback.format_exception_only(type(error), error)
    return "".join(lines)
