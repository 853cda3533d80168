"""Every failure has a status, a code and one body; its traceback shows this project's frames and nothing else."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

import errors
import swarm.errors
from errors import ApiError, InvalidParameter, describe, error_body, log_failure, own_traceback
from generation.parameters import parse_generation
from swarm.errors import BlocksMissing, SwarmError, format_blocks

ROOT = Path(__file__).resolve().parent.parent

# What clients may rely on: (status, code, Retry-After in seconds or None).
ANSWERS: dict[str, tuple[int, str, int | None]] = {
    "InvalidParameter": (400, "invalid_parameter", None),
    "Unauthorized": (401, "invalid_api_key", None),
    "ModelNotAllowed": (403, "model_not_allowed", None),
    "OriginNotAllowed": (403, "origin_not_allowed", None),
    "SessionNotFound": (404, "session_not_found", None),
    "ModelNotFound": (404, "model_not_found", None),
    "RequestTimeout": (408, "request_timeout", None),
    "WrongModel": (409, "wrong_model", None),
    "RequestTooLarge": (413, "request_too_large", None),
    "HostNotAllowed": (421, "host_not_allowed", None),
    "TooLong": (422, "too_long", None),
    "TooManySessions": (429, "too_many_sessions", 5),
    "TooManyRequests": (429, "too_many_requests", 5),
    "ModelNotReady": (503, "model_not_ready", 5),
    "ShuttingDown": (503, "shutting_down", 10),
    "Overloaded": (503, "overloaded", 5),
    "TimedOut": (504, "timed_out", None),
    "ModelUnavailable": (503, "model_unavailable", None),
    "ModelMismatch": (503, "model_mismatch", None),
    "SwarmUnreachable": (503, "swarm_unreachable", 30),
    "ClockOff": (503, "swarm_unreachable", 30),
    "BlocksMissing": (503, "blocks_missing", 30),
    "CacheFull": (503, "cache_full", 10),
    "SwarmTimeout": (504, "swarm_timeout", None),
    "SessionLengthExceeded": (422, "too_long", None),
    "TokenizerBusy": (429, "too_many_requests", 5),
    "SessionClosed": (404, "session_not_found", None),
    "Cancelled": (499, "cancelled", None),
}


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    for subclass in kind.__subclasses__():
        if not subclass.__module__.startswith("tests."):
            yield subclass
            yield from subclasses(subclass)


def make(kind: type[Exception]) -> Exception:
    return BlocksMissing("some/model", [2, 3]) if kind is BlocksMissing else kind("what happened")


KINDS = [*subclasses(ApiError), *subclasses(SwarmError)]


def test_all_errors_are_known() -> None:
    assert sorted(kind.__name__ for kind in KINDS) == sorted(ANSWERS)
    defined = {kind for kind in vars(swarm.errors).values() if isinstance(kind, type) and issubclass(kind, SwarmError)}
    assert set(errors.SWARM_ERRORS) == defined - {SwarmError}


@pytest.mark.parametrize("kind", KINDS)
def test_answer_to_an_error(kind: type[Exception]) -> None:
    error = make(kind)
    status, code, message, retry_after = describe(error)
    assert (status, code, retry_after) == ANSWERS[kind.__name__]
    assert message == str(error) != ""
    assert status == 499 or HTTPStatus(status) >= 400
    assert re.fullmatch("[a-z_]+", code)


@pytest.mark.parametrize("kind", KINDS)
def test_subclass_of_an_error_is_answered_like_it(kind: type[Exception]) -> None:
    special = type("Special", (kind,), {"__module__": __name__, "__init__": lambda self: None})
    status, code, _, retry_after = describe(special())
    assert (status, code, retry_after) == ANSWERS[kind.__name__]


@pytest.mark.parametrize("kind", KINDS)
def test_documented(kind: type[Exception]) -> None:
    tree = errors.__doc__ if issubclass(kind, ApiError) else swarm.errors.__doc__
    lines = [line for line in (tree or "").splitlines() if f"── {kind.__name__} " in line]
    assert len(lines) == 1, f"{kind.__name__} is not in its module's docstring"
    if issubclass(kind, ApiError):
        status, _, retry_after = ANSWERS[kind.__name__]
        assert lines[0].endswith(f" {status}, with Retry-After" if retry_after else f" {status}")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("bad"), "ValueError: bad"),
        (SwarmError("odd"), "SwarmError: odd"),
        (KeyError("key"), "KeyError: 'key'"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
    ],
)
def test_anything_else_is_an_internal_error(error: BaseException, message: str) -> None:
    assert describe(error) == (500, "internal_error", message, None)


def test_api_error_itself() -> None:
    assert describe(ApiError("odd")) == (500, "internal_error", "odd", None)
    own = ApiError("I am a teapot")
    own.status, own.code, own.retry_after = 418, "teapot", 7  # as app.py does with Werkzeug's errors
    assert describe(own) == (418, "teapot", "I am a teapot", 7)
    assert describe(ApiError("odd"))[0] == 500


def caught(action: Callable[[], Any]) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    pytest.fail("it did not fail")


def test_body() -> None:
    error = caught(lambda: parse_generation({}))
    body = error_body(error, "request-7")
    assert body == {
        "ok": False,
        "error": {
            "code": "invalid_parameter",
            "message": "exactly one of max_length and max_new_tokens is required",
        },
        "traceback": own_traceback(error),
        "request_id": "request-7",
    }
    json.dumps(body)


def test_body_of_an_internal_error() -> None:
    body = error_body(caught(lambda: [][0]), "")
    assert body["error"] == {"code": "internal_error", "message": "IndexError: list index out of range"}
    assert body["traceback"].splitlines()[-1] == "IndexError: list index out of range"


# Tracebacks


def frames(trace: str) -> list[tuple[str, str]]:
    """Return (file, function) of each frame."""
    return re.findall(r'^  File "(.*)", line \d+, in (.*)$', trace, flags=re.MULTILINE)


def test_traceback_has_own_frames_only() -> None:
    trace = own_traceback(caught(lambda: parse_generation({"max_length": "x"})))
    assert frames(trace) == [
        ("tests/test_errors.py", "caught"),
        ("tests/test_errors.py", "<lambda>"),
        ("generation/parameters.py", "parse_generation"),
        ("generation/parameters.py", "read"),
        ("generation/parameters.py", "get_int"),
    ]
    lines = trace.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "errors.InvalidParameter: max_length must be a whole number, not a text of 1 character"
    assert "    action()" in lines  # the source line of each frame


@pytest.mark.parametrize(
    "action",
    [
        lambda: json.loads("{"),
        lambda: re.compile("("),
        lambda: __import__("no_such_module"),
        lambda: exec("1 / 0"),
        lambda: exec(compile("1 / 0", str(ROOT / ".venv" / "lib" / "package.py"), "exec")),
        lambda: exec(compile("1 / 0", sys.prefix + "/lib/package.py", "exec")),
        lambda: exec(compile("1 / 0", "/elsewhere" + str(ROOT / "app.py"), "exec")),
        lambda: subprocess.run(["/nowhere/program"]),
    ],
)
def test_traceback_hides_others_and_where_they_are(action: Callable[[], Any]) -> None:
    trace = own_traceback(caught(action))
    assert [file for file, _ in frames(trace)] == ["tests/test_errors.py"] * 2
    shown = "\n".join(trace.splitlines()[:-1])  # less the message, which may name what the caller asked for
    for place in (str(ROOT), sys.prefix, sys.base_prefix, os.path.dirname(json.__file__), "site-packages"):
        assert place not in shown


def test_traceback_of_an_error_that_was_not_raised() -> None:
    assert own_traceback(ValueError("x")) == "Traceback (most recent call last):\nValueError: x\n"


def test_traceback_of_a_chain_is_that_of_its_last() -> None:
    def fail() -> None:
        try:
            json.loads("{")
        except ValueError as error:
            raise errors.InvalidParameter("not JSON") from error

    trace = own_traceback(caught(fail))
    assert [function for _, function in frames(trace)] == ["caught", "fail"]
    assert trace.count("Traceback") == 1


FAIL = """
import errors
from generation import parameters
try:
    parameters.parse_generation({})
except Exception as error:
    print(errors.own_traceback(error))
"""


def test_traceback_in_a_checkout_behind_a_symbolic_link(tmp_path: Path) -> None:
    """Deployments often run the current release through a link."""
    link = tmp_path / "current"
    link.symlink_to(ROOT)
    child = subprocess.run(
        [sys.executable, "-c", FAIL],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(link)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert frames(child.stdout) == [("generation/parameters.py", "parse_generation")], child.stderr


# The swarm's messages


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        ([3], "block 3"),
        ([0, 1, 2, 5], "blocks 0-2, 5"),
        ([7, 5, 6], "blocks 5-7"),
        ([1, 3], "blocks 1, 3"),
        (range(70), "blocks 0-69"),
    ],
)
def test_format_blocks(blocks: list[int], text: str) -> None:
    assert format_blocks(blocks) == text
    assert str(BlocksMissing("org/model", blocks)) == f"no server holds {text} of org/model"
    assert BlocksMissing("org/model", blocks).blocks == tuple(blocks)


# What is logged


@pytest.mark.parametrize(
    ("error", "level", "message", "traced"),
    [
        (ValueError("bad"), "ERROR", "request failed", True),
        (InvalidParameter("no"), "INFO", "request refused: invalid_parameter: no", False),
        (
            BlocksMissing("tiny", [2, 3]),
            "INFO",
            f"request refused: blocks_missing: {BlocksMissing('tiny', [2, 3])}",
            False,
        ),
    ],
)
def test_only_our_own_faults_are_logged_with_a_traceback(
    caplog: pytest.LogCaptureFixture, error: Exception, level: str, message: str, traced: bool
) -> None:
    with caplog.at_level(logging.INFO):
        log_failure(logging.getLogger("test"), "request", error)
    (record,) = caplog.records
    assert (record.levelname, record.getMessage(), bool(record.exc_info)) == (level, message, traced)
