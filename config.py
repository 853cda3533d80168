"""The settings: one row each, with type, default, bound and unit. The environment variable of the same name sets it."""

import dataclasses
import functools
import math
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from admission.addresses import Network, parse_networks
from errors import ConfigError
from swarm.multiaddr import PUBLIC, check_listening, check_peer
from swarm.places import REMEDY, PlaceUnusable, can_write, named_cache_dir, settle_petals, settle_temporary_files

Value = TypeVar("Value")


@dataclass(frozen=True)
class Form:
    """How each member of a list is written."""

    check: Callable[[str], None]  # raises ValueError, saying what is wrong
    words: str  # says what a member is that is written otherwise


def _check_host(text: str) -> None:
    if not re.fullmatch(r"(?a)\*|[\w.-]+", text):
        raise ValueError("it may have letters, digits, dots and hyphens only")


def _check_pair(text: str) -> None:
    if not all(text.partition("=")):
        raise ValueError("it must name two models")


PAIR = Form(_check_pair, "no pair of models, such as bigscience/bloomz=bigscience/bloom-560m")
PEER = Form(check_peer, "no multiaddr, such as /ip4/192.0.2.1/tcp/31330/p2p/12D3...")
LISTENING = Form(check_listening, "no multiaddr to listen on, such as /ip4/0.0.0.0/tcp/31330")
HOST = Form(_check_host, "no name of a host, without scheme, port and path")


def setting(
    default: Value,
    *,
    above_zero: bool = False,
    choices: tuple[str, ...] = (),
    each: Form | None = None,
    never_empty: bool = False,
) -> Value:
    """Make a row of ``Settings`` that has a bound of its own.

    :param above_zero: zero makes no sense either
    :param choices: allowed texts, beside its default
    :param never_empty: it protects something: an empty value is a mistake, such as a missing secret
    """
    metadata = {"above_zero": above_zero, "choices": choices, "each": each, "never_empty": never_empty}
    row: Any = dataclasses.field(default=default, metadata=metadata)  # a type checker sees the default
    return row


def positive(default: Value) -> Value:
    """Make a row for a number for which zero makes no sense."""
    return setting(default, above_zero=True)


@dataclass(frozen=True)
class Settings:
    """All settings. Lists are comma-separated in the environment. Numbers must be finite, and not negative."""

    # What is served
    MODELS: tuple[str, ...] = ("HuggingFaceTB/SmolLM2-135M-Instruct",)  # hub names, directories, bundled names
    DEFAULT_MODEL_NAME: str = ""  # empty: the first of MODELS

    # The swarm
    # Multiaddrs to join, or "public"; empty: an embedded private swarm
    INITIAL_PEERS: tuple[str, ...] = setting((), each=PEER)
    # Where the embedded swarm listens
    SWARM_HOST_MADDRS: tuple[str, ...] = setting(("/ip4/127.0.0.1/tcp/0",), each=LISTENING)
    UPDATE_PERIOD: float = positive(10.0)  # seconds between two readings of who serves what
    RECOVERY_TIMEOUT: float = 60.0  # seconds an answer waits for lost blocks to be served again
    STEP_TIMEOUT: float = 120.0  # seconds a live server may take for one step
    HISTORY_MB: int = 1024  # MiB kept to restore lost spans; beyond it, sessions are restored from their token ids

    # Computation
    DEVICE: str = ""  # for embeddings, head and embedded servers: cpu, cuda, ...; empty: by what the machine has
    TORCH_DTYPE: str = setting("", choices=("auto", "float32", "bfloat16", "float16"))  # empty: by what the machine has
    ATTN_CACHE_TOKENS: int = 0  # tokens of attention cache of each embedded server; 0: by the machine's memory
    SERVER_THREADS: int = 0  # threads of each embedded server's operators; 0: one per core
    CLIENT_THREADS: int = 1  # threads of this program's operators; they compete with the embedded servers' for cores
    # Whether several tokens of an answer are computed at once where that is faster: what has followed the last ones
    # earlier in the text is tried together with them. The answers are the same.
    DRAFTING: str = setting("auto", choices=("auto", "off"))
    # Models of the same tokenizer as MODEL, which this program runs itself to draft for it: MODEL=DRAFT_MODEL
    DRAFT_MODELS: tuple[str, ...] = setting((), each=PAIR)
    CACHE_DIR: str = ""  # where prepared models are kept; empty: the user's cache directory

    # Bounds
    MAX_SESSIONS: int = positive(64)  # inference sessions open at a time
    SESSION_TIMEOUT: float = positive(300.0)  # seconds after which an unused session is closed
    # Answers computed at a time; up to this many, servers that batch gain speed
    MAX_CONCURRENT_GENERATIONS: int = positive(64)
    MAX_QUEUE: int = 32  # requests that may wait for a session, or for their answer's turn; each takes a thread
    MAX_WAITING_PER_SESSION: int = 4  # requests that may wait for one busy session; each takes a thread
    QUEUE_TIMEOUT: float = 30.0  # seconds that each may wait, for these and for attention cache on the servers
    # Sessions of finished answers are kept for requests that continue them; they make room when it is needed.
    WARM_SESSIONS: int = 32  # at a time; 0: none
    WARM_TOKENS: int = 32_768  # tokens of attention cache that they may hold together; a chat holds 2048
    WARM_TIMEOUT: float = 240.0  # seconds; stock servers end sessions that are idle for 300
    REQUEST_TIMEOUT: float = positive(600.0)  # seconds a request may wait for its session to be free
    RESUME_TIMEOUT: float = 60.0  # seconds a resumable session, and an answer in it, continues without its connection
    SEND_TIMEOUT: float = positive(30.0)  # seconds a WebSocket client may take no data before it is given up
    MAX_BODY_BYTES: int = positive(1_048_576)  # bytes of a request body or WebSocket message
    # HTTP connections at a time: each takes a file, and up to 5 MB if its client is slow
    MAX_CONNECTIONS: int = positive(1000)
    REQUEST_READ_TIMEOUT: float = positive(15.0)  # seconds in which a request must come; large bodies have longer

    # Who may use it
    # Keys of the APIs; without them and without a file, no key is needed
    API_KEYS: tuple[str, ...] = setting((), never_empty=True)
    # JSON: a list of keys with names, models and limits; see docs/deployment.md
    API_KEYS_FILE: str = setting("", never_empty=True)
    KEY_REQUESTS_PER_MINUTE: int = 0  # of each key without a limit of its own; 0: no limit
    KEY_TOKENS_PER_MINUTE: int = 0  # tokens of prompts and answers, of each key without a limit of its own; 0: no limit
    KEY_CONCURRENT: int = 0  # answers computed at a time, of each key without a limit of its own; 0: no limit
    NON_PUBLIC_MODELS: tuple[str, ...] = ()  # of MODELS: only for the page, and for keys that name them
    # Signs the token that identifies our own pages; empty: a random one, so open pages must be reloaded after a restart
    SECRET_KEY: str = ""
    # Who may use the chat page; empty: who has a key, or everybody if there are none
    PAGE: str = setting("", choices=("open", "key", "off"))
    # Names that the app goes by, or "*"; empty: this machine's, or all: see docs/deployment.md
    ALLOWED_HOSTS: tuple[str, ...] = setting((), each=HOST)
    WEBSOCKET_ORIGINS: tuple[str, ...] = ("*",)  # origins whose pages may use the WebSocket API; its own page always
    TRUSTED_PROXIES: tuple[str, ...] = ()  # addresses and networks whose X-Forwarded-For is believed

    # Connections, shutdown and log
    SSE_KEEP_ALIVE: float = positive(5.0)  # seconds of silence after which a streamed answer sends a comment
    MAX_WEBSOCKETS: int = positive(512)  # open at a time; many systems let a program have 1024 files
    WEBSOCKET_PING_INTERVAL: float = positive(25.0)  # seconds; proxies often cut lines that are silent for 60
    CORS_ORIGINS: tuple[str, ...] = ("*",)  # origins whose pages may use the HTTP API
    SHUTDOWN_TIMEOUT: float = 20.0  # seconds that running answers have to finish when the program shuts down
    LOG_LEVEL: str = setting("INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    LOG_TEXTS: bool = False  # whether prompts and answers are logged
    TRACEBACKS: bool = True  # whether failures report the program's own frames, or only the error

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings that are set in the environment; the others keep their defaults.

        :raises ConfigError: naming the setting, if a value is not of its type
        """
        values = {
            row.name: _parse(row.name, environ[row.name], row.default)
            for row in dataclasses.fields(cls)
            if environ.get(row.name, "").strip()
        }
        for row in dataclasses.fields(cls):
            if row.metadata.get("never_empty") and row.name in environ and not values.get(row.name):
                raise ConfigError(
                    f"{row.name} is set, but names no key: everybody would be let in; unset it if that is meant"
                )
        settings = cls(**values)
        settings.check()
        return settings

    def check(self) -> None:
        """Refuse values out of their bounds, and settings that do not fit each other.

        :raises ConfigError: naming the setting
        """
        for row in dataclasses.fields(self):
            _check_row(row, getattr(self, row.name))
        if self.DEFAULT_MODEL_NAME and self.DEFAULT_MODEL_NAME not in self.MODELS:
            raise ConfigError(
                f"DEFAULT_MODEL_NAME={self.DEFAULT_MODEL_NAME} is not one of MODELS={','.join(self.MODELS)}"
            )
        if PUBLIC in self.INITIAL_PEERS and len(self.INITIAL_PEERS) > 1:
            raise ConfigError("INITIAL_PEERS: public stands for peers of its own, and cannot be beside others")
        if not self.MODELS:
            raise ConfigError("MODELS names no model")
        if self.PAGE == "key" and not (self.API_KEYS or self.API_KEYS_FILE):
            raise ConfigError("PAGE=key needs keys: set API_KEYS or API_KEYS_FILE")
        if unknown := set(self.draft_models) - set(self.MODELS):
            raise ConfigError(f"DRAFT_MODELS names {', '.join(sorted(unknown))}, which MODELS does not")
        if unknown := set(self.NON_PUBLIC_MODELS) - set(self.MODELS):
            raise ConfigError(f"NON_PUBLIC_MODELS names {', '.join(sorted(unknown))}, which MODELS does not")
        try:
            parse_networks(self.TRUSTED_PROXIES)
        except ValueError as error:
            raise ConfigError(f"TRUSTED_PROXIES: {error}") from None

    @functools.cached_property
    def trusted_proxies(self) -> tuple[Network, ...]:
        return parse_networks(self.TRUSTED_PROXIES)

    @property
    def page(self) -> str:
        """Who may use the chat page: open, key, off."""
        return self.PAGE or ("key" if self.API_KEYS or self.API_KEYS_FILE else "open")

    @property
    def draft_models(self) -> dict[str, str]:
        """The draft models, by the models for which they draft."""
        return {model: draft for model, _, draft in (pair.partition("=") for pair in self.DRAFT_MODELS)}

    @property
    def default_model(self) -> str:
        return self.DEFAULT_MODEL_NAME or self.MODELS[0]

    def check_machine(self) -> None:
        """Refuse what cannot work on this machine, as it is now.

        :raises ConfigError: naming the setting
        """
        from swarm.weights import is_to_be_prepared

        try:
            settle_temporary_files()
            cache_dir = self.cache_dir
            if not self.INITIAL_PEERS:  # it has servers of its own
                settle_petals(cache_dir)
        except PlaceUnusable as error:
            raise ConfigError(str(error)) from None
        waiting = [model for model in self.MODELS if is_to_be_prepared(model, cache_dir=cache_dir)]
        if waiting and not can_write(cache_dir):
            raise ConfigError(f"{waiting[0]} cannot be prepared in {cache_dir}: {REMEDY}")

    @property
    def cache_dir(self) -> Path:
        """Where prepared models are kept.

        :raises PlaceUnusable: if there is no home directory, and none is named
        """
        return named_cache_dir(self.CACHE_DIR)

    def device(self) -> str:
        """Return the device to compute on."""
        from swarm.hardware import pick_device

        return self.DEVICE or pick_device()

    def torch_dtype(self) -> str:
        """Return the dtype to compute in: on CUDA the checkpoint's, on a CPU what it is fast with."""
        from swarm.hardware import pick_dtype

        return self.TORCH_DTYPE or pick_dtype(self.device())


def listening_address(environ: Mapping[str, str] = os.environ) -> str:
    """Return where the app listens, as gunicorn writes it: ``127.0.0.1:5000``, ``[::]:5000``.

    :raises ConfigError: if ``HOST`` is no address of this machine, or ``PORT`` no port
    """
    host = environ.get("HOST", "").strip().removeprefix("[").removesuffix("]") or "127.0.0.1"
    port = environ.get("PORT", "").strip() or "5000"
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ConfigError(f"PORT={port} is no port: it must be a number from 0 to 65535")
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        # Of a name's addresses the IPv4 one: that is what "localhost" has meant here.
        family, kind, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"HOST={host} is no address of this machine: {reason}") from None
    return f"[{address[0]}]:{port}" if family == socket.AF_INET6 else f"{address[0]}:{port}"


def _parse(name: str, text: str, default: Any) -> Any:
    """Read a setting's text as the type of its default."""
    text = text.strip()
    try:
        if isinstance(default, bool):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        if isinstance(default, tuple):
            return tuple(part.strip() for part in text.split(",") if part.strip())
        return type(default)(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{name}={text} is not of type {type(default).__name__}") from None


def _check_row(row: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value that is out of its row's bounds.

    :raises ConfigError: naming the setting
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{row.name}={value} must be a finite number")
    if row.metadata.get("above_zero") and value <= 0:
        raise ConfigError(f"{row.name}={value} must be greater than zero")
    if isinstance(value, (int, float)) and value < 0:
        raise ConfigError(f"{row.name}={value} must not be negative")
    choices = row.metadata.get("choices")
    if choices and value not in (*choices, row.default):
        raise ConfigError(f"{row.name}={value} is not one of {', '.join(choices)}")
    form: Form | None = row.metadata.get("each")
    if form is None:
        return
    for member in value:
        try:
            form.check(member)
        except ValueError as error:
            raise ConfigError(f"{row.name}: {member} is {form.words}: {error}") from None
