"""What requests of the OpenAI API may hold, and how those that hold something else are refused. Needs no server."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from errors import InvalidParameter
from generation.parameters import MAX_NAME, MAX_STOP_SEQUENCES
from openai_api.reading import logit_bias
from openai_api.schemas import (
    MAX_BIAS,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_PROMPTS,
    MAX_TOKEN_IDS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from swarm.tokenization import MAX_TEXT

ASK = {"role": "user", "content": "x"}
MOST: list[tuple[Any, str, Any, Any]] = [  # as many as there may be, and one more
    (CompletionRequest, "prompt", [1] * MAX_TOKEN_IDS, [1]),
    (CompletionRequest, "prompt", ["x"] * MAX_PROMPTS, ["x"]),
    (CompletionRequest, "prompt", [[1]] * MAX_PROMPTS, [[1]]),
    (CompletionRequest, "stop", ["x"] * MAX_STOP_SEQUENCES, ["x"]),
    (CompletionRequest, "model", "x" * MAX_NAME, "x"),
    (ChatRequest, "messages", [ASK] * MAX_MESSAGES, [ASK]),
    (DetokenizeRequest, "tokens", [1] * MAX_TOKEN_IDS, [1]),
    (TokenizeRequest, "content", "x" * MAX_TEXT, "x"),
]


def read(kind: Any, **body: Any) -> Any:
    required: dict[Any, Any] = {CompletionRequest: {"prompt": "x"}, ChatRequest: {"messages": [ASK]}}
    return kind.read(json.dumps(required.get(kind, {}) | body).encode())


def refusal(kind: Any, **body: Any) -> str:
    with pytest.raises(InvalidParameter) as caught:
        read(kind, **body)
    assert caught.value.param == str(caught.value).partition(":")[0].partition(".")[0]
    return str(caught.value)


@pytest.mark.parametrize(("kind", "name", "most", "more"), MOST)
def test_bounds(kind: Any, name: str, most: Any, more: Any) -> None:
    read(kind, **{name: most})
    assert f"should have at most {len(most)} " in refusal(kind, **{name: most + more})


def test_bounds_of_parts_and_of_bias() -> None:
    part = {"type": "text", "text": "x"}
    read(ChatRequest, messages=[{"role": "user", "content": [part] * MAX_PARTS}])
    assert f"at most {MAX_PARTS}" in refusal(
        ChatRequest, messages=[{"role": "user", "content": [part] * (MAX_PARTS + 1)}]
    )
    read(CompletionRequest, logit_bias={str(i): 0.5 for i in range(MAX_BIAS)})
    assert refusal(CompletionRequest, logit_bias={str(i): 0.5 for i in range(1500)}) == (
        "logit_bias: at most 300 tokens can have a bias, not 1500"
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt: Input should be a text, a list of token ids or a list of either, and not an empty list"),
        (5, "prompt: Input should be a text, a list of token ids or a list of either, and not an empty list"),
        (["a", [1]], "prompt.1: Input should be a valid string"),
        ([1, -1], "prompt.1: Input should be greater than or equal to 0"),
        ([[1], [2, "x"]], "prompt.1.1: Input should be a valid integer"),
        ([True], "prompt.0: Input should be a valid integer"),
    ],
)
def test_what_is_wrong_with_a_prompt(prompt: Any, message: str) -> None:
    assert refusal(CompletionRequest, prompt=prompt) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image_url", "image_url": {}}], "messages.0.content.0.type: Input should be 'text'"),
        ([{"type": "text"}], "messages.0.content.0.text: Field required"),
        (5, "messages.0.content: Input should be a text or a list of parts that are text"),
    ],
)
def test_what_is_wrong_with_a_message(content: Any, message: str) -> None:
    assert refusal(ChatRequest, messages=[{"role": "user", "content": content}]) == message


@pytest.mark.parametrize("key", ["a secret", "-1", "1.5", "٣", "9" * 5000, ""])
def test_keys_of_the_bias_are_not_quoted(key: str) -> None:
    assert refusal(CompletionRequest, logit_bias={key: 1}) == "logit_bias: keys should be token ids (whole numbers)"


class Counted:
    """A tokenizer that counts how often its size is asked for."""

    asked = 0

    @property
    def size(self) -> int:
        self.asked += 1
        return 5000


def test_bias_is_checked_as_a_whole() -> None:
    model: Any = SimpleNamespace(tokenizer=Counted(), head=SimpleNamespace(vocab_size=4000))
    body = read(CompletionRequest, logit_bias={str(3999 - i): 0.5 for i in range(MAX_BIAS)})
    assert logit_bias(body, model) == tuple((3999 - i, 0.5) for i in range(MAX_BIAS))
    assert model.tokenizer.asked == 1
    with pytest.raises(InvalidParameter, match="4000 is not a token of this model, which has 4000"):
        logit_bias(read(CompletionRequest, logit_bias={"1": 1, "4000": 1}), model)
