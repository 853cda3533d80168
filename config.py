"""Settings and models. Each setting is a name, a default and a unit; an environment variable of its name sets it."""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from admission.addresses import Network, parse_networks
from errors import ConfigError


@dataclass(frozen=True)
class ChatFormat:
    """How turns of a conversation become model input; ``{text}`` is what the person wrote."""

    user: str  # a turn of the person, up to where the model goes on
    turn_end: str  # between an answer and the next turn
    stop: tuple[str, ...]  # texts that end an answer
    first: str  # the first turn and what is before it, where there is a system prompt, ``{system}``
    system: str = ""  # the system prompt of chats that have none of their own

    @property
    def begin(self) -> str:
        """What is before the first turn, in chats that have no system prompt of their own."""
        return self.first.replace("{system}", self.system).removesuffix(self.user) if self.system else ""


@dataclass(frozen=True)
class ModelConfig:
    """A model to serve."""

    name: str  # hub name, local directory, or name of the bundled package
    chat: ChatFormat
    title: str = ""  # shown on the pages; default: the last part of the name
    size: str = ""  # parameters, as people say it; empty: counted once the model is loaded
    licence: str = ""  # of the weights; empty: not known here
    session_length: int = 2048  # tokens of a conversation on the page
    # How the page samples. Programs say what they want with each request.
    generation: Mapping[str, Any] = field(default_factory=lambda: {"do_sample": 1, "temperature": 0.7, "top_p": 0.9})

    @property
    def shown_title(self) -> str:
        return self.title or self.name.rstrip("/").rpartition("/")[2]

    @property
    def link(self) -> str | None:
        """Where to read about the model: its page on the hub, if it is one of the hub's."""
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.name, re.ASCII) or os.path.isdir(self.name):
            return None
        return f"https://huggingface.co/{self.name}"


CHATML = ChatFormat(
    user="<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
    turn_end="<|im_end|>\n",
    stop=("<|im_end|>",),
    first="<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
    system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)
# The BLOOM models know no roles; named turns, as in a script, work best. The name of the other side ends an answer.
DIALOGUE = ChatFormat(
    user="Human: {text}\n\nAI:",
    turn_end="\n\n",
    stop=("\n\nHuman:",),
    first="{system}\n\nHuman: {text}\n\nAI:",
    system="A conversation between a curious human and a friendly, knowledgeable AI assistant.",
)
# BLOOMZ was tuned to follow single instructions and ends its answers itself.
INSTRUCTION = ChatFormat(
    user="Question: {text}\n\nAnswer:",
    turn_end="\n\n",
    stop=("\n\nQuestion:",),
    first="{system}\n\nQuestion: {text}\n\nAnswer:",
)
FALCON = ChatFormat(
    user="User: {text}\nFalcon:",
    turn_end="\n",
    stop=("\nUser:",),
    first="System: {system}\nUser: {text}\nFalcon:",
)
LLAMA_2 = ChatFormat(
    user="[INST] {text} [/INST]",
    turn_end="</s><s>",
    stop=("</s>",),
    first="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{text} [/INST]",
)

BLOOM_LICENCE = "bigscience-bloom-rail-1.0"

# Settings that make no sense at zero.
POSITIVE = (
    "MAX_SESSIONS",
    "MAX_CONCURRENT_GENERATIONS",
    "SESSION_TIMEOUT",
    "REQUEST_TIMEOUT",
    "SEND_TIMEOUT",
    "MAX_BODY_BYTES",
    "MAX_CONNECTIONS",
    "REQUEST_READ_TIMEOUT",
    "UPDATE_PERIOD",
    "SSE_KEEP_ALIVE",
    "MAX_WEBSOCKETS",
    "WEBSOCKET_PING_INTERVAL",
)

# Settings that protect: set to nothing they are a mistake, such as a secret that was not there.
KEY_SETTINGS = ("API_KEYS", "API_KEYS_FILE")

# Models that are known by name: what they are and how they are talked to. Any other name works too, with DIALOGUE.
KNOWN_MODELS = {
    model.name: model
    for model in (
        # The temperature is low, as its makers advise, for the model is small and easily led astray; and of two
        # beginnings that are about as likely, as "The" and "L'" for the capital of France, only the likelier is taken.
        # Without the penalty its poems never end.
        ModelConfig(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            CHATML,
            size="135M",
            licence="Apache-2.0",
            generation={"do_sample": 1, "temperature": 0.2, "top_p": 0.6, "repetition_penalty": 1.1},
        ),
        ModelConfig("bigscience/bloom", DIALOGUE, size="176B", licence=BLOOM_LICENCE),
        ModelConfig("bigscience/bloomz", INSTRUCTION, size="176B", licence=BLOOM_LICENCE),
        ModelConfig("bigscience/bloom-7b1", DIALOGUE, size="7.1B", licence=BLOOM_LICENCE),
        ModelConfig("bigscience/bloom-560m", DIALOGUE, size="560M", licence=BLOOM_LICENCE),
        ModelConfig(
            "meta-llama/Llama-2-70b-chat-hf", LLAMA_2, size="70B", licence="Llama 2 Community License Agreement"
        ),
        ModelConfig("tiiuae/falcon-180B-chat", FALCON, size="180B", licence="Falcon-180B TII License"),
    )
}


@dataclass(frozen=True)
class Settings:
    """All settings. Lists are comma-separated in the environment."""

    # What is served
    MODELS: tuple[str, ...] = ("HuggingFaceTB/SmolLM2-135M-Instruct",)  # hub names, directories, bundled names
    DEFAULT_MODEL_NAME: str = ""  # empty: the first of MODELS
    # The swarm
    INITIAL_PEERS: tuple[str, ...] = ()  # multiaddrs to join, or "public"; empty: an embedded private swarm
    SWARM_HOST_MADDRS: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)  # where the embedded swarm listens
    UPDATE_PERIOD: float = 10.0  # seconds between two readings of who serves what
    RECOVERY_TIMEOUT: float = 60.0  # seconds an answer waits for lost blocks to be served again
    STEP_TIMEOUT: float = 120.0  # seconds a server that lives may take for one step
    HISTORY_MB: int = 1024  # MiB kept to restore lost spans; beyond it, sessions are restored from their token ids
    # Computation
    DEVICE: str = ""  # for embeddings, head and embedded servers: cpu, cuda, ...; empty: by what the machine has
    TORCH_DTYPE: str = ""  # auto, float32, bfloat16, float16; empty: by what the machine has
    ATTN_CACHE_TOKENS: int = 0  # tokens of attention cache of each embedded server; 0: by the machine's memory
    SERVER_THREADS: int = 0  # threads of each embedded server's operators; 0: one per core
    CLIENT_THREADS: int = 1  # threads of this program's operators; they compete with the embedded servers' for cores
    CACHE_DIR: str = ""  # where prepared models are kept; empty: the user's cache directory
    # Bounds
    MAX_SESSIONS: int = 64  # inference sessions open at a time
    SESSION_TIMEOUT: float = 300.0  # seconds after which an unused session is closed
    MAX_CONCURRENT_GENERATIONS: int = 64  # answers computed at a time; up to so many, servers that batch gain speed
    MAX_QUEUE: int = (
        32  # requests that may wait for a session, and as many for their answer's turn; each takes a thread
    )
    MAX_WAITING_PER_SESSION: int = 4  # requests that may wait for one busy session; each takes a thread
    QUEUE_TIMEOUT: float = 30.0  # seconds that each may wait, for these and for attention cache on the servers
    # Sessions of finished answers are kept, for who goes on from them; they make room when somebody needs it.
    WARM_SESSIONS: int = 32  # at a time; 0: none
    WARM_TOKENS: int = 32_768  # tokens of attention cache that they may hold together; a chat holds 2048
    WARM_TIMEOUT: float = 240.0  # seconds; stock servers end sessions that are idle for 300
    REQUEST_TIMEOUT: float = 600.0  # seconds a request may wait for its session to be free
    RESUME_TIMEOUT: float = 60.0  # seconds a resumable session, and an answer in it, goes on without its connection
    SEND_TIMEOUT: float = 30.0  # seconds a WebSocket client may take no data before it is given up
    MAX_BODY_BYTES: int = 1_048_576  # bytes of a request body or WebSocket message
    MAX_CONNECTIONS: int = 1000  # HTTP connections at a time: each takes a file, and up to 5 MB if its client is slow
    REQUEST_READ_TIMEOUT: float = 15.0  # seconds in which a request must come; large bodies have longer
    # Who may use it
    API_KEYS: tuple[str, ...] = ()  # keys of the APIs; empty, and no file either: no key is needed
    API_KEYS_FILE: str = ""  # JSON: a list of keys with names, models and limits; see docs/deployment.md
    KEY_REQUESTS_PER_MINUTE: int = 0  # of each key that says nothing else; 0: no limit
    KEY_TOKENS_PER_MINUTE: int = 0  # tokens of prompts and answers, of each key that says nothing else; 0: no limit
    KEY_CONCURRENT: int = 0  # answers computed at a time, of each key that says nothing else; 0: no limit
    NON_PUBLIC_MODELS: tuple[str, ...] = ()  # of MODELS: only for the page, and for keys that name them
    SECRET_KEY: str = ""  # signs what the page shows to be the page; empty: pages must be loaded anew after a restart
    PAGE: str = ""  # open, key, off: who may use the chat page; empty: who has a key, or everybody if there are none
    ALLOWED_HOSTS: tuple[str, ...] = ()  # names that the app goes by, or "*"; empty: see docs/deployment.md
    WEBSOCKET_ORIGINS: tuple[str, ...] = ("*",)  # origins whose pages may use the WebSocket API; its own page always
    TRUSTED_PROXIES: tuple[str, ...] = ()  # addresses and networks whose X-Forwarded-For is believed
    # Manners
    SSE_KEEP_ALIVE: float = 5.0  # seconds of silence after which a streamed answer sends a comment
    MAX_WEBSOCKETS: int = 512  # open at a time; many systems let a program have 1024 files
    WEBSOCKET_PING_INTERVAL: float = 25.0  # seconds; proxies often cut lines that are silent for 60
    CORS_ORIGINS: tuple[str, ...] = ("*",)  # origins whose pages may use the HTTP API
    SHUTDOWN_TIMEOUT: float = 20.0  # seconds that running answers have to finish when the program is told to end
    LOG_LEVEL: str = "INFO"  # DEBUG, INFO, WARNING, ERROR
    LOG_TEXTS: bool = False  # whether prompts and answers are logged
    TRACEBACKS: bool = True  # whether failures tell the program's own frames, or only the error

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings that are set in the environment; the others have their defaults.

        :raises ConfigError: if a value is not of the setting's type, naming it
        """
        values = {
            setting.name: _parse(setting.name, environ[setting.name], setting.default)
            for setting in dataclasses.fields(cls)
            if environ.get(setting.name, "").strip()
        }
        for name in KEY_SETTINGS:
            if name in environ and not values.get(name):
                raise ConfigError(
                    f"{name} is set, but names no key: everybody would be let in; unset it if that is meant"
                )
        settings = cls(**values)
        settings.check()
        return settings

    def check(self) -> None:
        """Refuse settings that do not fit each other.

        :raises ConfigError: naming the setting
        """
        if self.DEFAULT_MODEL_NAME and self.DEFAULT_MODEL_NAME not in self.MODELS:
            raise ConfigError(
                f"DEFAULT_MODEL_NAME={self.DEFAULT_MODEL_NAME} is not one of MODELS={','.join(self.MODELS)}"
            )
        if not self.MODELS:
            raise ConfigError("MODELS names no model")
        if self.LOG_LEVEL not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ConfigError(f"LOG_LEVEL={self.LOG_LEVEL} is not one of DEBUG, INFO, WARNING, ERROR")
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{setting.name}={value} must be a finite number")
            if isinstance(value, (int, float)) and value < 0 and setting.name not in POSITIVE:
                raise ConfigError(f"{setting.name}={value} must not be negative")
        if self.TORCH_DTYPE not in ("", "auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"TORCH_DTYPE={self.TORCH_DTYPE} is not one of auto, float32, bfloat16, float16")
        if self.PAGE not in ("", "open", "key", "off"):
            raise ConfigError(f"PAGE={self.PAGE} is not one of open, key, off")
        if self.PAGE == "key" and not (self.API_KEYS or self.API_KEYS_FILE):
            raise ConfigError("PAGE=key needs keys: set API_KEYS or API_KEYS_FILE")
        if unknown := set(self.NON_PUBLIC_MODELS) - set(self.MODELS):
            raise ConfigError(f"NON_PUBLIC_MODELS names {', '.join(sorted(unknown))}, which MODELS does not")
        for name in ("INITIAL_PEERS", "SWARM_HOST_MADDRS"):
            if wrong := [peer for peer in getattr(self, name) if not (peer.startswith("/") or peer == "public")]:
                raise ConfigError(f"{name}: {wrong[0]} is no multiaddr, such as /ip4/192.0.2.1/tcp/31330/p2p/12D3...")
        if wrong := [host for host in self.ALLOWED_HOSTS if not re.fullmatch(r"\*|[\w.-]+", host, re.ASCII)]:
            raise ConfigError(f"ALLOWED_HOSTS: {wrong[0]} is no name of a host, without scheme, port and path")
        try:
            parse_networks(self.TRUSTED_PROXIES)
        except ValueError as error:
            raise ConfigError(f"TRUSTED_PROXIES: {error}") from None
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be greater than zero")

    @functools.cached_property
    def trusted_proxies(self) -> tuple[Network, ...]:
        return parse_networks(self.TRUSTED_PROXIES)

    @property
    def page(self) -> str:
        """Who may use the chat page: open, key, off."""
        return self.PAGE or ("key" if self.API_KEYS or self.API_KEYS_FILE else "open")

    @property
    def default_model(self) -> str:
        return self.DEFAULT_MODEL_NAME or self.MODELS[0]

    @property
    def cache_dir(self) -> Path:
        from swarm.weights import default_cache_dir

        return Path(self.CACHE_DIR).expanduser() if self.CACHE_DIR else default_cache_dir()

    def models(self) -> list[ModelConfig]:
        """Return what to serve, in the order of ``MODELS``."""
        return [KNOWN_MODELS.get(name) or ModelConfig(name, DIALOGUE) for name in self.MODELS]

    def device(self) -> str:
        """Return the device to compute on."""
        from swarm.hardware import pick_device

        return self.DEVICE or pick_device()

    def torch_dtype(self) -> str:
        """Return the dtype to compute in: on CUDA the checkpoint's, on a CPU what it is fast with."""
        from swarm.hardware import pick_dtype

        return self.TORCH_DTYPE or pick_dtype(self.device())


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
