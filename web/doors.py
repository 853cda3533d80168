"""Doors: what holds for all paths of a part of the app. Each part names its own, and the app puts them together."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Failure = Callable[[BaseException], tuple[dict[str, Any], int]]  # the body that reports a failure, and its status


@dataclass(frozen=True)
class Door:
    """The paths of one part of the app. A path belongs to the door that names it, or the longest beginning of it."""

    paths: tuple[str, ...]  # one that ends with a slash stands for all that begin with it, another for itself
    for_programs: bool = True  # failures are reported as JSON; people get pages
    cross_origin: bool = True  # other sites' pages may use it, within CORS_ORIGINS
    needs_key: bool = False  # if there are any API keys
    for_own_pages: bool = False  # the app's own pages may use a token or a cookie in place of a key
    active: tuple[str, ...] = ()  # paths that change something although they are asked for with GET
    free: tuple[str, ...] = ()  # paths that cost nothing, and are not counted as requests
    quiet: bool = False  # asked for so often that only failures are worth a line of the log
    failure: Failure | None = None  # how a failure is reported; None: as in ``errors.error_body``


class Doors:
    """All doors of an app."""

    def __init__(self, *doors: Door) -> None:
        """:raises ValueError: if two doors have the same path"""
        found = sorted(((path, door) for door in doors for path in door.paths), key=lambda pair: -len(pair[0]))
        if len(dict(found)) < len(found):
            raise ValueError("two doors have the same path")
        self._by_length: Sequence[tuple[str, Door]] = found

    def __iter__(self) -> Iterator[Door]:
        return iter(dict.fromkeys(door for _, door in self._by_length))

    def of(self, path: str) -> Door:
        """Return the door of a path; a path without a route has one too, for its 404.

        :raises LookupError: if no door has a beginning of it
        """
        for own, door in self._by_length:
            if path == own or (own.endswith("/") and path.startswith(own)):
                return door
        raise LookupError(f"{path} belongs to no door")

    def cross_origin_paths(self) -> str:
        """Return a regular expression of the paths that other sites' pages may use."""
        doors = (door for door in self if door.cross_origin)
        return "|".join(re.escape(path) + ("" if path.endswith("/") else "$") for door in doors for path in door.paths)
