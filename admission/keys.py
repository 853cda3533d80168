"""API keys and their limits, as the operator's settings list them."""

import hashlib
import json
import logging
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config import Settings
from errors import ConfigError

log = logging.getLogger(__name__)

SHORT_KEY = 16  # characters; shorter ones are likely to be words
KEY_FIELDS = {
    "key": str,
    "name": str,
    "models": list,
    "requests_per_minute": int,
    "tokens_per_minute": int,
    "concurrent": int,
}


@dataclass(frozen=True)
class Limits:
    """How much a caller may use. 0 where there is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0  # of prompts and answers together
    concurrent: int = 0  # answers computed at a time


@dataclass(frozen=True)
class Key:
    """An API key: what it allows."""

    name: str
    digest: bytes  # SHA-256 of the key: digests are equally long, so that comparing them reveals nothing
    models: tuple[str, ...] | None  # that it may use; None: all that are public
    limits: Limits


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def default_limits(settings: Settings) -> Limits:
    """Return the limits of keys and callers without their own."""
    return Limits(settings.KEY_REQUESTS_PER_MINUTE, settings.KEY_TOKENS_PER_MINUTE, settings.KEY_CONCURRENT)


def read_keys(settings: Settings) -> Sequence[Key]:
    """Return the keys of ``API_KEYS`` and ``API_KEYS_FILE``.

    :raises ConfigError: naming what is wrong with the file, and nothing of a key
    """
    entries: list[object] = [{"key": key} for key in settings.API_KEYS]
    if settings.API_KEYS_FILE:
        entries += read_file(settings.API_KEYS_FILE)
        if not entries:
            raise ConfigError(f"API_KEYS_FILE={settings.API_KEYS_FILE} holds no keys: the APIs would be open to all")
    keys = [read_key(entry, number, settings) for number, entry in enumerate(entries, 1)]
    if len({key.name for key in keys}) < len(keys) or len({key.digest for key in keys}) < len(keys):
        raise ConfigError("API_KEYS and API_KEYS_FILE: a key or a name occurs twice")
    return keys


def read_file(name: str) -> list[object]:
    """Return what a file of keys lists.

    :raises ConfigError: if it is not a list
    """
    path = Path(name).expanduser()
    try:
        found = json.loads(path.read_text())
        if path.stat().st_mode & stat.S_IROTH:
            log.warning("API_KEYS_FILE=%s can be read by every user of this machine: chmod o-r it", name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"API_KEYS_FILE={name} cannot be read as JSON: {error}") from error
    if not isinstance(found, list):
        raise ConfigError(f"API_KEYS_FILE={name} must hold a list of keys")
    return found


def read_key(entry: object, number: int, settings: Settings) -> Key:
    """Read one key.

    :raises ConfigError: if it is wrong
    """
    where = f"API key {number}"
    if not isinstance(entry, dict) or not entry.get("key"):
        raise ConfigError(f'{where} must be an object with a "key"')
    for name, value in entry.items():
        if name not in KEY_FIELDS:
            raise ConfigError(f"{where} has an unknown field {name!r}; the known ones are {', '.join(KEY_FIELDS)}")
        if not isinstance(value, KEY_FIELDS[name]) or isinstance(value, bool):
            raise ConfigError(f"{where}: {name} must be of type {KEY_FIELDS[name].__name__}")
    key, otherwise = entry["key"], default_limits(settings)
    if re.search(r"^\s|\s$|[\x00-\x1f\x7f]", key):  # a header could not carry it
        raise ConfigError(f"{where} must not begin or end with a space, or contain control characters")
    limits = Limits(**{name: entry.get(name, value) for name, value in vars(otherwise).items()})
    if min(vars(limits).values()) < 0:
        raise ConfigError(f"{where}: limits must not be negative")
    digest = hash_key(key)
    name = entry.get("name") or digest.hex()[:8]
    if len(key) < SHORT_KEY:
        log.warning("the API key %r is short: of fewer than %d characters it may be guessed", name, SHORT_KEY)
    models = tuple(map(str, entry["models"])) if "models" in entry else None
    return Key(name, digest, models, limits)
