"""Texts of peers: what may be shown of them, and the one error for whatever a peer sends that cannot be used."""

import reprlib

# A line of a log, and of a chat page.
MAX_TEXT = 200  # characters
MAX_NAME = 100  # characters of a server's name, a version, a session's id


class Malformed(ValueError):
    """What a peer has sent cannot be used. The message says why, in words that are safe to log and to show."""


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Return a peer's text as one line of printable characters; others are escaped, and what is too long is cut."""
    head = text[: limit + 1]
    escaped = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in head)
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def quoted(value: object) -> str:
    """Return what is seen of a peer's value in a message: short, and printable."""
    return clean(reprlib.repr(value))
