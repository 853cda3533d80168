"""Request parameters: parsed once, at the edge, into frozen objects. Knows nothing of HTTP, WebSockets or models."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from errors import InvalidParameter

# More and longer ones than anybody needs, few and short enough to look for after every token.
MAX_STOP_SEQUENCES, MAX_STOP_LENGTH = 64, 1024  # sequences, characters each
# Of models, which may be paths, and of sessions.
MAX_NAME = 4096  # characters
# Logits are divided by these; smaller ones make them overflow.
SMALLEST_FACTOR = 1e-6
# Far more than any model takes, and few enough digits to be written into a message.
MAX_TOKENS = 10**15
MAX_SEED = 2**63 - 1  # what a PyTorch generator takes


@dataclass(frozen=True)
class GenerationParams:
    """What to generate. Sampling parameters that are None are the model's own, as in Transformers' ``generate``."""

    inputs: str = ""
    max_length: int | None = None  # tokens, prefix included
    max_new_tokens: int | None = None  # tokens; exactly one of the two is given
    max_answer_tokens: int | None = None  # of all rounds together, where there is a stop sequence
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None  # leave out tokens less likely than this part of the likeliest one's probability
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0  # taken from the logits of tokens that the answer has already
    frequency_penalty: float = 0.0  # the same, for each time that it has them
    logit_bias: tuple[tuple[int, float], ...] = ()  # added to the logits of tokens
    logprobs: int | None = None  # tell the log-probability of each token and of so many likeliest ones
    seed: int | None = None
    max_time: float | None = None  # seconds after which the answer ends as it is
    stop_sequence: str | None = None  # generate in rounds until this text
    extra_stop_sequences: tuple[str, ...] = ()

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        """All texts that end generation."""
        first = (self.stop_sequence,) if self.stop_sequence else ()
        return (*first, *self.extra_stop_sequences)


def parse_generation(values: Mapping[str, Any]) -> GenerationParams:
    """Read the parameters of a generation.

    :raises InvalidParameter: naming the parameter and what it should be
    """
    params = GenerationParams(
        inputs=get_text(values, "inputs") or "",
        max_length=get_int(values, "max_length", minimum=1, maximum=MAX_TOKENS),
        max_new_tokens=get_int(values, "max_new_tokens", minimum=1, maximum=MAX_TOKENS),
        max_answer_tokens=get_int(values, "max_answer_tokens", minimum=1, maximum=MAX_TOKENS),
        do_sample=get_bool(values, "do_sample"),
        temperature=get_float(values, "temperature", minimum=SMALLEST_FACTOR),
        top_k=get_int(values, "top_k", minimum=0),
        top_p=get_float(values, "top_p", minimum=0.0, maximum=1.0),
        min_p=get_float(values, "min_p", minimum=0.0, maximum=1.0),
        repetition_penalty=get_float(values, "repetition_penalty", minimum=SMALLEST_FACTOR),
        presence_penalty=get_float(values, "presence_penalty", minimum=-2.0, maximum=2.0) or 0.0,
        frequency_penalty=get_float(values, "frequency_penalty", minimum=-2.0, maximum=2.0) or 0.0,
        seed=get_int(values, "seed", minimum=0, maximum=MAX_SEED),
        max_time=get_float(values, "max_time", above=0.0),
        stop_sequence=get_text(values, "stop_sequence", maximum=MAX_STOP_LENGTH) or None,
        extra_stop_sequences=get_texts(values, "extra_stop_sequences"),
    )
    if (params.max_length is None) == (params.max_new_tokens is None):
        raise InvalidParameter("exactly one of max_length and max_new_tokens is required")
    return params


def with_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with those that are not given, or given as nothing, from ``defaults``."""
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


def get_text(values: Mapping[str, Any], name: str, *, maximum: int | None = None) -> str | None:
    """Read a text, of at most so many characters; None if it is not there."""
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
    values: Mapping[str, Any], name: str, *, minimum: int | None = None, maximum: int | None = None
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
    """Say what a value is, for a message. Only numbers are told: anything else may be what nobody else may read."""
    if isinstance(value, str):
        return f"a text of {len(value)} character{'s' * (len(value) != 1)}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # Python refuses to write integers of thousands of digits.
        return str(value) if isinstance(value, float) or value.bit_length() < 200 else "a number of that many digits"
    return {bool: "true or false", list: "a list", dict: "an object", type(None): "null"}.get(type(value), "that")
