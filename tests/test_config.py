"""Settings from the environment, each type rightly and wrongly; models and how they are talked to; the machine."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from config import Settings, listening_address
from errors import ConfigError
from generation.parameters import parse_generation
from models.catalog import DIALOGUE, KNOWN_MODELS, ChatFormat, ModelConfig, configured
from swarm import weights
from tests.test_multiaddr import PEER

FIELDS = dataclasses.fields(Settings)
KEY_SETTINGS = [field.name for field in FIELDS if field.metadata.get("never_empty")]
DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"


def refusal(**environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Settings.from_environment(environ)
    (name,) = environ
    assert name in str(caught.value)
    return str(caught.value)


def test_defaults() -> None:
    settings = Settings.from_environment({})
    assert settings == Settings()
    assert settings.default_model == DEFAULT
    assert settings.INITIAL_PEERS == ()
    assert settings.SESSION_TIMEOUT == 300
    assert [model.name for model in configured(settings.MODELS)] == [DEFAULT]


@pytest.mark.parametrize("name", [field.name for field in FIELDS if field.name not in KEY_SETTINGS])
def test_empty_is_as_if_not_set(name: str) -> None:
    assert Settings.from_environment({name: ""}) == Settings.from_environment({name: "  "}) == Settings()


@pytest.mark.parametrize("name", KEY_SETTINGS)
@pytest.mark.parametrize("text", ["", " ", ",", " , ,", "\n"])
def test_keys_that_are_none(name: str, text: str) -> None:
    """As of a secret that was not there: everybody would be let in."""
    if "," not in text or name == "API_KEYS":
        assert "names no key" in refusal(**{name: text})


def test_page() -> None:
    assert Settings().page == "open"
    assert Settings(API_KEYS=("x",)).page == Settings(API_KEYS_FILE="x").page == "key"
    assert Settings(API_KEYS=("x",), PAGE="open").page == "open"
    assert Settings(PAGE="off").page == "off"
    assert "is not one of open, key, off" in refusal(PAGE="closed")
    assert "needs keys" in refusal(PAGE="key")


def test_other_variables_do_not_matter() -> None:
    assert Settings.from_environment({"PATH": "/bin", "max_sessions": "x", "default_model": "x"}) == Settings()


VALUES: dict[type, tuple[str, Any]] = {
    bool: ("true", True),
    int: ("7", 7),
    float: ("7.5", 7.5),
    str: ("some text", "some text"),
    tuple: ("a, b", ("a", "b")),
}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_each_setting_can_be_set(field: dataclasses.Field) -> None:
    text, value = VALUES[type(field.default)]
    special: dict[str, tuple[str, Any]] = {
        "DEFAULT_MODEL_NAME": (DEFAULT, DEFAULT),
        "TORCH_DTYPE": ("bfloat16", "bfloat16"),
        "LOG_LEVEL": ("DEBUG", "DEBUG"),
        "NON_PUBLIC_MODELS": (DEFAULT, (DEFAULT,)),
        "PAGE": ("off", "off"),
        "DRAFTING": ("off", "off"),
        "DRAFT_MODELS": (f"{DEFAULT}=tiny", (f"{DEFAULT}=tiny",)),
        "INITIAL_PEERS": (f"{PEER}, {PEER}", (PEER, PEER)),
        "SWARM_HOST_MADDRS": ("/ip4/0.0.0.0/tcp/0", ("/ip4/0.0.0.0/tcp/0",)),
        "TRUSTED_PROXIES": ("127.0.0.1, 10.0.0.0/8", ("127.0.0.1", "10.0.0.0/8")),
    }
    text, value = special.get(field.name, (text, value))
    settings = Settings.from_environment({field.name: text})
    assert getattr(settings, field.name) == value
    assert type(getattr(settings, field.name)) is type(value)
    assert settings == dataclasses.replace(Settings(), **{field.name: value})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("LOG_TEXTS", "1", True),
        ("LOG_TEXTS", " Yes ", True),
        ("LOG_TEXTS", "TRUE", True),
        ("LOG_TEXTS", "0", False),
        ("LOG_TEXTS", "no", False),
        ("LOG_TEXTS", "False", False),
        ("MAX_SESSIONS", " 5\n", 5),
        ("SESSION_TIMEOUT", "5", 5.0),
        ("SESSION_TIMEOUT", "1e3", 1000.0),
        ("MODELS", "one", ("one",)),
        ("MODELS", " one ,, , two,", ("one", "two")),
        ("INITIAL_PEERS", "public", ("public",)),
        ("CACHE_DIR", " /some/place ", "/some/place"),
        ("DEVICE", "cuda:1", "cuda:1"),
    ],
)
def test_values(name: str, text: str, value: Any) -> None:
    parsed = getattr(Settings.from_environment({name: text}), name)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("LOG_TEXTS", "maybe", "bool"),
        ("LOG_TEXTS", "2", "bool"),
        ("MAX_SESSIONS", "many", "int"),
        ("MAX_SESSIONS", "1.5", "int"),
        ("MAX_SESSIONS", "1e3", "int"),
        ("MAX_SESSIONS", "1,5", "int"),
        ("MAX_SESSIONS", "9" * 5000, "int"),
        ("SESSION_TIMEOUT", "5 minutes", "float"),
        ("SESSION_TIMEOUT", "1,5", "float"),
    ],
    ids=lambda value: value[:20],
)
def test_wrong_type(name: str, text: str, kind: str) -> None:
    assert refusal(**{name: text}) == f"{name}={text} is not of type {kind}"


@pytest.mark.parametrize(
    "name", ["MAX_SESSIONS", "SESSION_TIMEOUT", "REQUEST_TIMEOUT", "MAX_BODY_BYTES", "UPDATE_PERIOD"]
)
@pytest.mark.parametrize("text", ["0", "-1"])
def test_bounds_are_positive(name: str, text: str) -> None:
    assert "must be greater than zero" in refusal(**{name: text})


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("MAX_QUEUE", "-1", "must not be negative"),
        ("RESUME_TIMEOUT", "-0.5", "must not be negative"),
        ("SERVER_THREADS", "-3", "must not be negative"),
        ("INITIAL_PEERS", f"{PEER}, example.org", "example.org is no multiaddr"),
        ("INITIAL_PEERS", f"{PEER}...", "is no multiaddr"),
        ("INITIAL_PEERS", "/ip4/192.0.2.1/tcp/31330", ": it must end with /p2p/ and the peer's id"),
        ("INITIAL_PEERS", f"{PEER},public", "public stands for peers of its own"),
        ("SWARM_HOST_MADDRS", "/ip4/0.0.0.0/tcp/99999", ": 99999 is no port from 0 to 65535"),
        ("SWARM_HOST_MADDRS", "0.0.0.0", "0.0.0.0 is no multiaddr"),
        ("ALLOWED_HOSTS", "https://chat.example.org", "is no name of a host"),
    ],
)
def test_what_can_never_work_is_refused(name: str, text: str, reason: str) -> None:
    assert reason in refusal(**{name: text})


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", [field.name for field in FIELDS if type(field.default) is float])
def test_numbers_are_finite(name: str, text: str) -> None:
    """A wait of NaN seconds never ends or never begins, and threads cannot wait for infinitely many."""
    refusal(**{name: text})


def test_bounds_stand_in_the_rows() -> None:
    """Each bound of a row is looked at: a value beyond it is refused, whatever the setting is called."""
    for field in FIELDS:
        if field.metadata.get("above_zero"):
            assert "must be greater than zero" in refusal(**{field.name: "0"})
        elif type(field.default) in (int, float):
            assert getattr(Settings.from_environment({field.name: "0"}), field.name) == 0
        if field.metadata.get("choices"):
            assert " is not one of " in refusal(**{field.name: "something else"})
        if field.metadata.get("each"):
            assert field.metadata["each"].words in refusal(**{field.name: "/fine, *, not fine"})


def test_at_least_one_model() -> None:
    refusal(MODELS=" , ")


@pytest.mark.parametrize("text", ["LOUD", "debug info"])
def test_log_level(text: str) -> None:
    refusal(LOG_LEVEL=text)


def test_default_model_is_one_of_the_models() -> None:
    message = refusal(DEFAULT_MODEL_NAME="gpt2")
    assert message == f"DEFAULT_MODEL_NAME=gpt2 is not one of MODELS={DEFAULT}"
    settings = Settings.from_environment({"DEFAULT_MODEL_NAME": "two", "MODELS": "one,two"})
    assert settings.default_model == "two"
    assert Settings.from_environment({"MODELS": "one,two"}).default_model == "one"


def test_models_that_are_not_public_are_served() -> None:
    assert refusal(DRAFT_MODELS="gpt2=tiny") == "DRAFT_MODELS names gpt2, which MODELS does not"
    assert "it must name two models" in refusal(DRAFT_MODELS=f"{DEFAULT}=")
    message = refusal(NON_PUBLIC_MODELS=f"{DEFAULT},gpt2")
    assert message == "NON_PUBLIC_MODELS names gpt2, which MODELS does not"


def test_dtype_is_known() -> None:
    assert "is not one of auto, float32, bfloat16, float16" in refusal(TORCH_DTYPE="int8")
    for name in ("auto", "float32", "bfloat16", "float16"):
        assert Settings.from_environment({"TORCH_DTYPE": name}).TORCH_DTYPE == name
        assert name == "auto" or isinstance(getattr(torch, name), torch.dtype)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().MAX_SESSIONS = 5  # type: ignore[misc]


# Where the app listens


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [
        ("", "", "127.0.0.1:5000"),
        (" 0.0.0.0 ", " 80 ", "0.0.0.0:80"),
        ("localhost", "0", "127.0.0.1:0"),
        ("::", "8080", "[::]:8080"),
        ("::1", "65535", "[::1]:65535"),
        ("[::1]", "1", "[::1]:1"),
    ],
)
def test_where_the_app_listens(host: str, port: str, address: str) -> None:
    assert listening_address({"HOST": host, "PORT": port}) == address
    assert listening_address({}) == "127.0.0.1:5000"


@pytest.mark.parametrize("port", ["65536", "99999", "-1", "x", "5000.0", "1" * 5000, "٣"])
def test_ports_out_of_range(port: str) -> None:
    with pytest.raises(ConfigError, match="^PORT=.* is no port: it must be a number from 0 to 65535$"):
        listening_address({"PORT": port})


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "0:0", "a..b", "fe80::1%no-such-card"])
def test_addresses_of_other_machines(host: str) -> None:
    with pytest.raises(ConfigError, match="^HOST=.* is no address of this machine: "):
        listening_address({"HOST": host})


# Models


CHATS = [*KNOWN_MODELS.values(), ModelConfig("any/other", DIALOGUE)]


@pytest.mark.parametrize("model", CHATS, ids=lambda model: model.name)
def test_chat_formats(model: ModelConfig) -> None:
    assert model.chat.user.count("{text}") == 1
    for part in (model.chat.begin, model.chat.turn_end, *model.chat.stop):
        assert "{text}" not in part
    assert model.chat.stop and all(model.chat.stop)
    assert model.chat.turn_end
    # What a system prompt makes of the first turn is, with the model's own one, what a context begins with.
    assert (model.chat.first.count("{system}"), model.chat.first.count("{text}")) == (1, 1)
    if model.chat.system:
        assert model.chat.first.replace("{system}", model.chat.system) == model.chat.begin + model.chat.user
    else:
        assert model.chat.begin == ""
    # A stop sequence ends the answer, not the person's turn before it: the next turn must begin with what it was.
    turn = model.chat.turn_end + model.chat.user
    assert any(turn.startswith(stop) for stop in model.chat.stop)


@pytest.mark.parametrize("model", CHATS, ids=lambda model: model.name)
def test_what_the_page_asks_for_is_accepted(model: ModelConfig) -> None:
    params = parse_generation(
        {**model.generation, "max_new_tokens": 1, "stop_sequence": "\n", "extra_stop_sequences": list(model.chat.stop)}
    )
    assert params.do_sample and params.temperature and params.top_p
    assert model.session_length == 2048  # what a stock server takes


def test_known_models_go_by_their_names() -> None:
    assert all(name == model.name for name, model in KNOWN_MODELS.items())
    assert DEFAULT in KNOWN_MODELS


def test_models_keep_their_order_and_unknown_ones_are_talked_to_as_in_a_script() -> None:
    models = configured(("/my/model", "bigscience/bloomz"))
    assert models == [ModelConfig("/my/model", DIALOGUE), KNOWN_MODELS["bigscience/bloomz"]]


def test_chat_format_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DIALOGUE.begin = ""  # type: ignore[misc]
    assert ChatFormat("{text}", "", (), "") == ChatFormat("{text}", "", (), "")


# The machine


@pytest.fixture(params=[True, False], ids=["cuda", "no cuda"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    return request.param


def test_device(cuda: bool) -> None:
    assert Settings().device() == ("cuda" if cuda else "cpu")
    assert Settings(DEVICE="cpu").device() == "cpu"
    assert Settings(DEVICE="cuda:1").device() == "cuda:1"


@pytest.mark.parametrize(
    ("capability", "on_cpu"),
    [
        ("AVX512", "bfloat16"),
        ("AVX512_VNNI", "bfloat16"),
        ("AVX2", "float32"),
        ("DEFAULT", "float32"),
        ("NO AVX", "float32"),
    ],
)
def test_dtype(cuda: bool, capability: str, on_cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert Settings().torch_dtype() == ("auto" if cuda else on_cpu)
    assert Settings(DEVICE="cpu").torch_dtype() == on_cpu
    assert Settings(DEVICE="cuda:1").torch_dtype() == "auto"
    for name in ("auto", "float32", "float16"):
        assert Settings(TORCH_DTYPE=name).torch_dtype() == name


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings(CACHE_DIR="~/models").cache_dir == tmp_path / "models"
    assert Settings(CACHE_DIR="/models").cache_dir == Path("/models")
    assert Settings().cache_dir == weights.default_cache_dir()
