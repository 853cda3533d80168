"""Request parameters: as the text of a query string or form, as JSON types, and in every wrong form."""

import dataclasses
import math
import re
from typing import Any

import pytest

from errors import InvalidParameter
from generation.parameters import (
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_STOP_SEQUENCES,
    MAX_TOKENS,
    PARAMETERS,
    GenerationParams,
    get_bool,
    get_float,
    get_int,
    get_text,
    get_texts,
    parse_generation,
    require_int,
    require_text,
)
from openai_api.schemas import Sampling
from tests.support.processes import ROOT
from web.schemas import GenerateRequest

# Python reads and writes integers of at most this many digits.
DIGITS = 4300
WHOLE_NUMBERS = ("max_length", "max_new_tokens", "top_k", "seed")
NUMBERS = ("temperature", "top_p", "repetition_penalty")
TEXTS = ("inputs", "plain_between", "stop_sequence", "extra_stop_sequences")
NOT_A_NUMBER = [
    True,
    False,
    [],
    [1],
    {},
    {"a": 1},
    "abc",
    "\ud800",
    "NaN",
    math.nan,
    "inf",
    math.inf,
    "-inf",
    -math.inf,
]


def short(value: Any) -> str:
    """Name a test by its value, of which some are very long."""
    return repr(value)[:20]


def parse(**values: Any) -> GenerationParams:
    """Parse parameters; a length is added if there is none."""
    if not {"max_length", "max_new_tokens"} & set(values):
        values["max_new_tokens"] = 1
    return parse_generation(values)


def refusal(name: str, value: Any) -> str:
    with pytest.raises(InvalidParameter) as caught:
        parse(**{name: value})
    message = str(caught.value)
    assert message.startswith(name)
    assert len(message) < 200
    message.encode()  # it goes into a response
    return message


def test_defaults() -> None:
    assert parse_generation({"max_new_tokens": 5}) == GenerationParams(max_new_tokens=5)
    params = parse_generation({"max_length": 5})
    assert dataclasses.asdict(params) == {
        "inputs": "",
        "max_length": 5,
        "max_new_tokens": None,
        "max_answer_tokens": None,
        "do_sample": False,
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "min_p": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": (),
        "logprobs": None,
        "repetition_penalty": None,
        "seed": None,
        "max_time": None,
        "stop_sequence": None,
        "extra_stop_sequences": (),
        "plain_between": (),
    }


@pytest.mark.parametrize(
    ("name", "as_text", "as_json", "expected"),
    [
        ("inputs", "Hi é 🐝\n", "Hi é 🐝\n", "Hi é 🐝\n"),
        ("max_length", "16", 16, 16),
        ("max_length", "1", 1.0, 1),
        ("max_new_tokens", " 16 ", 16.0, 16),
        ("do_sample", "0", 0, False),
        ("do_sample", "1", 1, True),
        ("do_sample", "false", False, False),
        ("do_sample", "True", True, True),
        ("temperature", "0.7", 0.7, 0.7),
        ("temperature", "2", 2, 2.0),
        ("temperature", "1e-3", 1e-3, 1e-3),
        ("top_k", "0", 0, 0),
        ("top_k", "40", 40, 40),
        ("top_p", "0", 0, 0.0),
        ("top_p", "0.9", 0.9, 0.9),
        ("top_p", "1", 1, 1.0),
        ("repetition_penalty", "1.2", 1.2, 1.2),
        ("repetition_penalty", "2", 2, 2.0),
        ("seed", "0", 0, 0),
        ("seed", str(MAX_SEED), MAX_SEED, MAX_SEED),
        ("stop_sequence", "\n", "\n", "\n"),
        ("extra_stop_sequences", "###", ["###"], ("###",)),
        ("extra_stop_sequences", "Human:", ["Human:", "", "👋"], None),
    ],
)
def test_text_and_json(name: str, as_text: str, as_json: Any, expected: Any) -> None:
    if expected is None:
        assert getattr(parse(**{name: as_text}), name) == ("Human:",)
        assert getattr(parse(**{name: as_json}), name) == ("Human:", "👋")
        return
    for value in (as_text, as_json):
        parsed = getattr(parse(**{name: value}), name)
        assert parsed == expected and type(parsed) is type(expected)


@pytest.mark.parametrize("empty", ["", None])
@pytest.mark.parametrize("name", [*WHOLE_NUMBERS[2:], *NUMBERS, *TEXTS, "do_sample"])
def test_empty_is_as_if_not_given(name: str, empty: str | None) -> None:
    assert parse(**{name: empty}) == GenerationParams(max_new_tokens=1)


@pytest.mark.parametrize("value", [*NOT_A_NUMBER, "1.5", 1.5, "1e3", "0x10", " ", "9" * (DIGITS + 1)], ids=short)
@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_not_a_whole_number(name: str, value: Any) -> None:
    assert "must be a whole number, not " in refusal(name, value)


@pytest.mark.parametrize("value", [*NOT_A_NUMBER, "1,5", " ", "0x1p3", "1e999", 10**400], ids=short)
@pytest.mark.parametrize("name", NUMBERS)
def test_not_a_number(name: str, value: Any) -> None:
    assert "number, not " in refusal(name, value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_length", [0, "0", -1, "-1", -5.0]),
        ("max_new_tokens", [0, "0", -1, "-1"]),
        ("top_k", [-1, "-1"]),
        ("seed", [-1, "-1", MAX_SEED + 1, str(MAX_SEED + 1)]),
        ("temperature", [0, "0", 0.0, "-0.0", -1, "-0.5"]),
        ("top_p", [-0.1, "-0.1", 1.0001, "2", 1e308]),
        ("repetition_penalty", [0, "0.0", -1.5, "-1e300"]),
    ],
)
def test_out_of_range(name: str, values: list[Any]) -> None:
    for value in values:
        assert " must be " in refusal(name, value)


@pytest.mark.parametrize("value", ["9" * DIGITS, int("9" * DIGITS), 1e308], ids=short)
@pytest.mark.parametrize("name", ["max_length", "max_new_tokens", "seed"])
def test_huge_number_is_refused_or_of_use(name: str, value: Any) -> None:
    """What is accepted is counted with and written into messages."""
    try:
        number = getattr(parse(**{name: value}), name)
    except InvalidParameter as error:
        assert len(str(error)) < 200
    else:
        str(number + 1_000_000)


@pytest.mark.parametrize(
    "value", ["yes", "2", 2, -1, 0.5, math.nan, [], [1], {}, " ", "\ud800", "9" * (DIGITS + 1)], ids=short
)
def test_not_a_truth_value(value: Any) -> None:
    assert "must be 0, 1, true or false, not " in refusal("do_sample", value)


@pytest.mark.parametrize("value", [0, 5, 1.5, math.nan, True, False, {}, {"a": "b"}, [1], ["a", None], [["a"]]])
@pytest.mark.parametrize("name", TEXTS)
def test_not_a_text(name: str, value: Any) -> None:
    assert "must be a text, not " in refusal(name, value)


@pytest.mark.parametrize("name", ["inputs", "stop_sequence"])
def test_list_is_not_a_text(name: str) -> None:
    assert refusal(name, ["a"]) == f"{name} must be a text, not a list"


@pytest.mark.parametrize("value", ["\ud800", "a\udfffb", "\udc00\ud800"])
@pytest.mark.parametrize("name", TEXTS)
def test_lone_surrogate(name: str, value: str) -> None:
    assert "half of a surrogate pair" in refusal(name, value)
    if name == "extra_stop_sequences":
        assert "half of a surrogate pair" in refusal(name, ["fine", value])


def test_neither_length_nor_both() -> None:
    for values in (
        {},
        {"inputs": "a"},
        {"max_length": "", "max_new_tokens": None},
        {"max_length": 5, "max_new_tokens": 5},
        {"max_length": "5", "max_new_tokens": "6"},
    ):
        with pytest.raises(InvalidParameter, match="exactly one of max_length and max_new_tokens"):
            parse_generation(values)
    assert parse_generation({"max_length": "", "max_new_tokens": "5"}).max_new_tokens == 5


def test_unknown_parameters_do_not_matter() -> None:
    assert parse(session_id="x", type="generate", model=5) == GenerationParams(max_new_tokens=1)


def test_bounds_of_stop_sequences() -> None:
    most = [f"{i:04d}" + "x" * (MAX_STOP_LENGTH - 4) for i in range(MAX_STOP_SEQUENCES)]
    assert parse(extra_stop_sequences=[*most, ""]).extra_stop_sequences == tuple(most)
    for value in ([*most, "x"], ["x" * (MAX_STOP_LENGTH + 1)], "x" * (MAX_STOP_LENGTH + 1)):
        assert "takes at most 64 texts of 1024 characters" in refusal("extra_stop_sequences", value)


@pytest.mark.parametrize("value", ["a", ["a"], ["a", "a"], ["a", ""], ["a", "b", "c"]])
def test_plain_between_is_two_texts(value: Any) -> None:
    assert parse(plain_between=["a", "b"]).plain_between == ("a", "b")
    assert refusal("plain_between", value) == "plain_between must be two different texts"


def test_all_stop_sequences() -> None:
    assert parse().stop_sequences == ()
    assert parse(extra_stop_sequences=["a", "b"]).stop_sequences == ("a", "b")
    assert parse(stop_sequence="c").stop_sequences == ("c",)
    assert parse(stop_sequence="c", extra_stop_sequences=["a", "b"]).stop_sequences == ("c", "a", "b")


@pytest.mark.parametrize("value", [["a secret"], {"a secret": "a secret"}, "a secret", True, [["a secret"]]], ids=short)
@pytest.mark.parametrize("name", [*WHOLE_NUMBERS, *NUMBERS, *TEXTS, "do_sample"])
def test_values_are_not_quoted(name: str, value: Any) -> None:
    """Messages are logged; texts are not, unless that is wanted."""
    try:
        parse(**{name: value})
    except InvalidParameter as error:
        assert "secret" not in str(error) and str(error).startswith(name)
    else:
        assert name in TEXTS and value in ("a secret", ["a secret"]) or value is True


def test_what_a_wrong_value_is() -> None:
    assert refusal("top_k", "x" * 100_000) == "top_k must be a whole number, not a text of 100000 characters"
    assert refusal("inputs", {"a": 1}) == "inputs must be a text, not an object"
    assert refusal("inputs", 5) == "inputs must be a text, not 5"
    assert refusal("top_k", 1.5) == "top_k must be a whole number, not 1.5"
    assert refusal("extra_stop_sequences", ["a", None]) == "extra_stop_sequences must be a text, not null"


def test_long_stop_sequence() -> None:
    assert parse(stop_sequence="x" * MAX_STOP_LENGTH).stop_sequence == "x" * MAX_STOP_LENGTH
    assert refusal("stop_sequence", "x" * (MAX_STOP_LENGTH + 1)) == (
        "stop_sequence takes at most 1024 characters, not 1025"
    )


def test_required() -> None:
    assert require_int({"n": "5"}, "n", minimum=1) == 5
    assert require_text({"t": "x"}, "t") == "x"
    for values in ({}, {"n": None, "t": None}, {"n": "", "t": ""}):
        with pytest.raises(InvalidParameter, match="n is required"):
            require_int(values, "n", minimum=1)
        with pytest.raises(InvalidParameter, match="t is required"):
            require_text(values, "t")
    with pytest.raises(InvalidParameter, match="n must be at least 1, not 0"):
        require_int({"n": 0}, "n", minimum=1)


def test_optional() -> None:
    assert get_text({}, "a") is None and get_text({"a": ""}, "a") == ""
    assert get_texts({}, "a") == () and get_texts({"a": []}, "a") == ()
    assert get_bool({}, "a") is False
    assert get_int({}, "a") is None and get_int({"a": "-5"}, "a") == -5
    assert get_float({}, "a") is None and get_float({"a": "-5"}, "a") == -5.0


def test_parameters_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse().inputs = "x"  # type: ignore[misc]


# One row per parameter


DOCUMENTS = [
    file for file in (ROOT / "README.md", ROOT / "docs/http-api.md", ROOT / "docs/websocket-api.md") if file.exists()
]
SCHEMA = GenerateRequest.model_json_schema()["properties"]


def number(name: str) -> dict[str, Any]:
    """What the OpenAPI document says of a parameter that is a number."""
    (schema,) = [kind for kind in SCHEMA[name]["anyOf"] if kind["type"] in ("number", "integer")]
    return schema


def test_every_parameter_has_a_row_or_is_of_the_openai_api_alone() -> None:
    names = {field.name for field in dataclasses.fields(GenerationParams)}
    assert set(PARAMETERS) == names - {"logit_bias", "logprobs"} == set(SCHEMA) - {"model", "session_id"}
    assert all(row.meaning and SCHEMA[name]["description"] == row.meaning for name, row in PARAMETERS.items())


@pytest.mark.parametrize("name", [name for name, row in PARAMETERS.items() if row.kind in (int, float)])
def test_bounds_are_the_same_to_the_reader_and_in_the_schema(name: str) -> None:
    row, schema = PARAMETERS[name], number(name)
    assert schema["type"] == {int: "integer", float: "number"}[row.kind]
    for bound, key, beyond in (
        (row.minimum, "minimum", -1),
        (row.maximum, "maximum", 1),
        (row.above, "exclusiveMinimum", 0),
    ):
        assert schema.get(key) == bound
        if bound is None:
            continue
        assert f"{name} must be " in refusal(name, bound + beyond)
        if key != "exclusiveMinimum":
            assert getattr(parse(**{name: bound}), name) == bound


@pytest.mark.parametrize("name", ["top_p", "min_p", "presence_penalty", "frequency_penalty"])
def test_bounds_of_the_openai_api_that_are_the_same(name: str) -> None:
    (schema,) = [kind for kind in Sampling.model_json_schema()["properties"][name]["anyOf"] if kind["type"] == "number"]
    assert (schema["minimum"], schema["maximum"]) == (PARAMETERS[name].minimum, PARAMETERS[name].maximum)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_stands_in_a_table_of_the_documents(name: str) -> None:
    rows = [line for file in DOCUMENTS for line in file.read_text().splitlines() if line.startswith("|")]
    assert any(re.match(rf"\| [^|]*`{name}`", line) for line in rows)


def bounds_in_words(name: str) -> str:
    """As the documents state them."""
    row = PARAMETERS[name]
    if row.kind in (str, tuple):
        return f"at most {row.maximum} characters"
    if row.above is not None:
        return f"above {row.above:g}"
    words: dict[float, str] = {MAX_TOKENS: "10^15", MAX_SEED: "2^63 - 1"}
    numbers = [words.get(bound) or f"{bound:g}" for bound in (row.minimum, row.maximum) if bound is not None]
    return " to ".join(numbers) if len(numbers) == 2 else f"at least {numbers[0]}"


@pytest.mark.parametrize("name", [name for name, row in PARAMETERS.items() if row.bounds])
def test_bounds_stand_in_the_documents(name: str) -> None:
    text = " ".join(" ".join(file.read_text().split()) for file in DOCUMENTS)
    assert f"`{name}` {bounds_in_words(name)}" in text


def test_fields_of_the_page_lie_within_the_bounds() -> None:
    """The page's form offers no number that the reader refuses, but for 0 as temperature, which turns sampling off."""
    fields = re.findall(r'\("(\w+)", "[^"]+", ([\d.]+), ([\d.]+), ', (ROOT / "templates/index.html").read_text())
    assert {"temperature", "top_p", "top_k", "repetition_penalty", "seed"} <= {name for name, *_ in fields}
    for name, least, most in fields:
        for value in (least, most):
            assert (name, value) == ("temperature", "0") or getattr(parse(**{name: value}), name) == float(value)
