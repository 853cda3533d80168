"""Request parameters: parsed once, at the edge, into frozen objects. Knows nothing of HTTP, WebSockets or models."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_args, get_type_hints

from errors import InvalidParameter

# More and longer ones than anyone needs, few and short enough to look for after every token.
MAX_STOP_SEQUENCES, MAX_STOP_LENGTH = 64, 1024  # sequences, characters each
# Of models, which may be paths, and of sessions.
MAX_NAME = 4096  # characters
# Logits are divided by these; smaller ones make them overflow.
SMALLEST_FACTOR = 1e-6
# Far more than any model takes, and few enough digits to be written into a message.
MAX_TOKENS = 10**15
MAX_SEED = 2**63 - 1  # what a PyTorch generator takes


Value = TypeVar("Value")


@dataclass(frozen=True)
class Parameter:
    """What a request may say about one parameter."""

    name: str
    kind: type  # bool, int, float, str, or tuple for several texts
    meaning: str
    minimum: float | None = None
    maximum: float | None = None  # of a text: characters
    above: float | None = None

    @property
    def bounds(self) -> dict[str, Any]:
        """The bounds of a number by pydantic's names, for ``Field``."""
        named = {"ge": self.minimum, "le": self.maximum, "gt": self.above}
        return {name: bound for name, bound in named.items() if bound is not None}

    def read(self, values: Mapping[str, Any]) -> Any:
        """Read the value; None if it is not there.

        :raises InvalidParameter: naming the parameter and what it should be
        """
        if self.kind is bool:
            return get_bool(values, self.name)
        if self.kind is int:
            return get_int(values, self.name, minimum=self.minimum, maximum=self.maximum)
        if self.kind is float:
            return get_float(values, self.name, minimum=self.minimum, maximum=self.maximum, above=self.above)
        if self.kind is str:
            return get_text(values, self.name, maximum=self.maximum) or None
        return get_texts(values, self.name)


def parameter(default: Value, meaning: str, **bounds: float) -> Value:
    """Make a row of ``GenerationParams``.

    :param bounds: minimum, maximum or above, as of ``Parameter``
    """
    row: Any = field(default=default, metadata={"meaning": meaning, **bounds})  # a type checker sees the default
    return row


@dataclass(frozen=True)
class GenerationParams:
    """What to generate: one row per parameter, from which its reader, the HTTP API's schema and its checks are made.

    Sampling parameters that are None are the model's own, as in Transformers' ``generate``.
    """

    inputs: str = parameter("", "New input; may be left out when a session is continued.")
    plain_between: tuple[str, ...] = parameter(
        (),
        "Two texts: what stands in inputs between the first and the second is plain text, without special tokens.",
        maximum=MAX_STOP_LENGTH,
    )
    max_length: int | None = parameter(None, "Tokens, prefix included.", minimum=1, maximum=MAX_TOKENS)
    max_new_tokens: int | None = parameter(
        None, "Tokens to generate; exactly one of this and max_length is required.", minimum=1, maximum=MAX_TOKENS
    )
    max_answer_tokens: int | None = parameter(
        None, "With stop_sequence: tokens of all rounds together.", minimum=1, maximum=MAX_TOKENS
    )
    do_sample: bool = parameter(False, "Default false: always the likeliest token.")
    temperature: float | None = parameter(None, "What logits are divided by.", minimum=SMALLEST_FACTOR)
    top_k: int | None = parameter(None, "Draw from this many likeliest tokens; 0: from all.", minimum=0)
    top_p: float | None = parameter(
        None, "Draw from the likeliest tokens that together have this probability.", minimum=0.0, maximum=1.0
    )
    min_p: float | None = parameter(
        None,
        "Leave out tokens less likely than this share of the likeliest one's probability.",
        minimum=0.0,
        maximum=1.0,
    )
    repetition_penalty: float | None = parameter(
        None, "Above 1: tokens of prompt and answer become less likely.", minimum=SMALLEST_FACTOR
    )
    presence_penalty: float = parameter(
        0.0, "Subtracted from the logits of tokens that the answer has already.", minimum=-2.0, maximum=2.0
    )
    frequency_penalty: float = parameter(
        0.0, "Subtracted from a token's logit for each time that the answer has it.", minimum=-2.0, maximum=2.0
    )
    # Only the OpenAI API takes these two.
    logit_bias: tuple[tuple[int, float], ...] = ()  # added to the logits of tokens
    logprobs: int | None = None  # report the log-probability of each token and of this many likeliest ones
    seed: int | None = parameter(None, "Makes sampling repeatable.", minimum=0, maximum=MAX_SEED)
    max_time: float | None = parameter(None, "Seconds after which the answer ends as it is.", above=0.0)
    stop_sequence: str | None = parameter(None, "Generate in rounds until this text.", maximum=MAX_STOP_LENGTH)
    extra_stop_sequences: tuple[str, ...] = parameter((), "More texts that end the answer.", maximum=MAX_STOP_LENGTH)

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        """All texts that end generation."""
        first = (self.stop_sequence,) if self.stop_sequence else ()
        return (*first, *self.extra_stop_sequences)


def _rows() -> Iterator[Parameter]:
    hints = get_type_hints(GenerationParams)
    for row in fields(GenerationParams):
        if row.metadata:
            kind = next(kind for kind in (get_args(hints[row.name]) or (hints[row.name],)) if kind is not type(None))
            yield Parameter(row.name, tuple if row.default == () else kind, **row.metadata)


# What requests of the HTTP and WebSocket APIs may hold.
PARAMETERS: Mapping[str, Parameter] = {row.name: row for row in _rows()}


def parse_generation(values: Mapping[str, Any]) -> GenerationParams:
    """Read the parameters of a generation.

    :raises InvalidParameter: naming the parameter and what it should be
    """
    given: dict[str, Any] = {}
    for name, row in PARAMETERS.items():
        if (value := row.read(values)) is not None:
            given[name] = value
    params = GenerationParams(**given)
    if params.plain_between and (len(params.plain_between) != 2 or len({*params.plain_between}) != 2):
        raise InvalidParameter("plain_between must be two different texts")
    if (params.max_length is None) == (params.max_new_tokens is None):
        raise InvalidParameter("exactly one of max_length and max_new_tokens is required")
    return params


def with_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters; missing and empty ones come from ``defaults``."""
    return {**defaults, **{name: value for name, value in values.items() if value is not None and value != ""}}


def require_int(values: Mapping[str, Any], name: str, *, minimum: int) -> int:
    """Read a whole number that must be there."""
    value = get_int(values, name, minimum=minimum)
    if value is None:
        raise InvalidParameter(f"{name} is required")
    return value


def require_text(values: Mapping[str, Any], name: str) -> str:
    """Read a text that must be there."""
    value = get_text(values, name, maximum=MAX_NAME)
    if not value:
        raise InvalidParameter(f"{name} is required")
    return value


def get_text(values: Mapping[str, Any], name: str, *, maximum: float | None = None) -> str | None:
    """Read a text, of at most this many characters; None if it is not there."""
    value = values.get(name)
    if value is None:
        return None
    text = _text(name, value)
    if maximum is not None and len(text) > maximum:
        raise InvalidParameter(f"{name} takes at most {maximum} characters, not {len(text)}")
    return text


def get_texts(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Read a list of texts; a single text counts as a list of one. Empty texts are left out."""
    value = values.get(name)
    if value is None:
        return ()
    items = [item for item in (value if isinstance(value, list) else [value]) if item != ""]
    texts = tuple(_text(name, item) for item in items[: MAX_STOP_SEQUENCES + 1])
    if len(texts) > MAX_STOP_SEQUENCES or any(len(text) > MAX_STOP_LENGTH for text in texts):
        raise InvalidParameter(f"{name} takes at most {MAX_STOP_SEQUENCES} texts of {MAX_STOP_LENGTH} characters each")
    return texts


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidParameter(f"{name} must be a text, not {_describe(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidParameter(f"{name} is not valid Unicode: it has half of a surrogate pair") from None
    return value


def get_bool(values: Mapping[str, Any], name: str) -> bool:
    """Read a truth value, written 0/1 or true/false; false if it is not there."""
    value = values.get(name)
    if value is None or value == "":
        return False
    if isinstance(value, bool):
        return value
    known = {"0": False, "1": True, "false": False, "true": True}
    text = str(value).strip().lower()
    if not isinstance(value, (str, int)) or text not in known:
        raise InvalidParameter(f"{name} must be 0, 1, true or false, not {_describe(value)}")
    return known[text]


def get_int(
    values: Mapping[str, Any], name: str, *, minimum: float | None = None, maximum: float | None = None
) -> int | None:
    """Read a whole number; None if it is not there."""
    value = values.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON knows no difference between 16 and 16.0
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            raise InvalidParameter(f"{name} must be a whole number, not {_describe(value)}") from None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParameter(f"{name} must be a whole number, not {_describe(value)}")
    _check_range(name, value, minimum, maximum, None)
    return value


def get_float(
    values: Mapping[str, Any],
    name: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> float | None:
    """Read a finite number; None if it is not there."""
    value = values.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InvalidParameter(f"{name} must be a number, not {_describe(value)}")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise InvalidParameter(f"{name} must be a number, not {_describe(value)}") from None
    if not math.isfinite(number):
        raise InvalidParameter(f"{name} must be a finite number, not {_describe(value)}")
    _check_range(name, number, minimum, maximum, above)
    return number


def _check_range(name: str, number: float, minimum: float | None, maximum: float | None, above: float | None) -> None:
    if minimum is not None and number < minimum:
        raise InvalidParameter(f"{name} must be at least {minimum}, not {_describe(number)}")
    if maximum is not None and number > maximum:
        raise InvalidParameter(f"{name} must be at most {maximum}, not {_describe(number)}")
    if above is not None and number <= above:
        raise InvalidParameter(f"{name} must be greater than {above}, not {_describe(number)}")


def _describe(value: Any) -> str:
    """Say what a value is, for a message. Only numbers are shown: anything else may be private."""
    if isinstance(value, str):
        return f"a text of {len(value)} character{'s' * (len(value) != 1)}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # Python refuses to write integers of thousands of digits.
        return str(value) if isinstance(value, float) or value.bit_length() < 200 else "a number of that many digits"
    return {bool: "true or false", list: "a list", dict: "an object", type(None): "null"}.get(type(value), "that")
