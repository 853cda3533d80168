"""What the log looks like: one line for each message, whatever is in it."""

import logging
import re

from flask import g

from config import Settings

# What ends a line or steers a terminal: C0 and C1 controls, the separators of lines, and marks that turn text around.
CONTROLS = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
IN_TRACEBACKS = re.compile(CONTROLS.pattern.replace("\x0a-", "\x0b-"))


class RequestIdFilter(logging.Filter):
    """Puts the id of the current request into each log record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = g.get("request_id", "-") if g else "-"
        return True


class Formatter(logging.Formatter):
    """Writes control characters as escapes, so that no text of a client's begins a line or colours it.

    A traceback keeps its lines, but each begins with a bar, for an error's text may have lines as well.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escape(super().formatMessage(record))

    def formatException(self, ei) -> str:  # type: ignore[no-untyped-def]
        return barred(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return barred(super().formatStack(stack_info))


def escape(text: str, controls: re.Pattern[str] = CONTROLS) -> str:
    return controls.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def barred(lines: str) -> str:
    return "\n".join(f"| {escape(line, IN_TRACEBACKS)}" for line in lines.split("\n"))


def is_no_request(record: logging.LogRecord) -> bool:
    """Keep out the lines of Werkzeug's server for each request: they have its query string, which may hold a prompt."""
    return not str(record.msg).endswith('"%s" %s %s')


def set_up_logging(settings: Settings) -> None:
    """Log to standard error, each line with its request's id."""
    handler = logging.StreamHandler()
    handler.addFilter(RequestIdFilter())
    handler.setFormatter(Formatter("%(asctime)s %(levelname)s [%(request_id)s] %(name)s: %(message)s"))
    logging.basicConfig(level=settings.LOG_LEVEL, handlers=[handler])
    logging.getLogger("werkzeug").addFilter(is_no_request)
    for own in logging.getLogger("gunicorn.error").handlers:  # it reports requests that it cannot read
        if (old := own.formatter) is not None:
            own.setFormatter(Formatter(old._fmt, old.datefmt))
