"""Texts from peers: what may be shown of them, and the one error for any data from a peer that cannot be used."""

import reprlib

# One line of a log or a chat page.
MAX_TEXT = 200  # characters
MAX_NAME = 100  # characters of a server's name, a version, a session's id


class Malformed(ValueError):
    """What a peer has sent cannot be used. The message says why, in text that is safe to log and show."""


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Return a peer's text as one line of printable characters; others are escaped, and excess length is cut."""
    head = text[: limit + 1]
    escaped = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in head)
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def quoted(value: object) -> str:
    """Return a peer's value as a message shows it: short and printable."""
    return clean(reprlib.repr(value))
