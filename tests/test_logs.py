"""A message is one line of the log, whatever clients send."""

import logging
import sys

import pytest
from flask import Flask

from config import Settings
from tests.support.client import call
from tests.support.processes import listening
from web.logs import Formatter, set_up_logging

FORGED = "x\n2026-01-01 00:00:00,000 CRITICAL [-] petals_chat: FORGED"


def line(message: str, *args: object, **more: object) -> str:
    record = logging.LogRecord("petals_chat", logging.INFO, "", 0, message, args, None)
    vars(record).update(more)
    return Formatter("%(levelname)s %(name)s: %(message)s").format(record)


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"])
def test_no_line_ends(end: str) -> None:
    found = line("GET %s", f"/a{end}b")
    assert len(found.splitlines()) == 1 and found.startswith("INFO petals_chat: GET /a\\")


@pytest.mark.parametrize("steering", ["\x1b[31m", "\x9b31m", "\x07", "\x08", "\x00", "\x7f", "\u202e", "\u2066"])
def test_terminals_are_not_steered(steering: str) -> None:
    assert steering not in line("%s", steering)


def test_other_text_stays() -> None:
    assert line("Grüße, 你好 🌸\tda") == "INFO petals_chat: Grüße, 你好 🌸\tda"


def test_tracebacks_keep_their_lines_and_forge_none() -> None:
    try:
        raise ValueError(FORGED + "\x1b[31m")
    except ValueError:
        found = line("request failed", exc_info=sys.exc_info(), stack_info="Stack:\n  x")
    first, *others = found.splitlines()
    assert first == "INFO petals_chat: request failed"
    assert len(others) > 4 and all(other.startswith("| ") for other in others)
    assert "| 2026-01-01 00:00:00,000 CRITICAL [-] petals_chat: FORGED\\x1b[31m" in others
    assert any('File "' in other for other in others)


def test_no_server_logs_query_strings(caplog: pytest.LogCaptureFixture) -> None:
    set_up_logging(Settings())
    with listening(Flask("empty")) as url, caplog.at_level(logging.DEBUG):
        assert call(url, "/x?inputs=a+secret+prompt")[0] == 404
    assert "secret" not in caplog.text
