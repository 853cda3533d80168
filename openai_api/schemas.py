"""What the OpenAI API takes and gives, as pydantic models: they check requests and make the OpenAPI document.

Numbers have the bounds of OpenAI's reference where it states any; those that equal the HTTP API's are from its table.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from errors import InvalidParameter
from generation.parameters import (
    MAX_NAME,
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_STOP_SEQUENCES,
    MAX_TOKENS,
    PARAMETERS,
    SMALLEST_FACTOR,
)
from models.catalog import State
from swarm.tokenization import MAX_TEXT

# Each answer takes attention cache for the whole prompt.
MAX_CHOICES = 16
# Each is a session of its own; this many answers of the default length take some seconds even on slow servers.
MAX_PROMPTS = 256
MAX_TOP_LOGPROBS = 20
MAX_TOKEN_ID = 2**31 - 1
# Ids in one list: 16 times the longest session, so that a client that sends more than fits learns how much, and few
# enough to be decoded and written within a moment.
MAX_TOKEN_IDS = 2**17
# OpenAI's.
MAX_BIAS = 300
# Each takes some tokens of a session, and the longest has 8192.
MAX_MESSAGES = 4096
# Programs make a part of each file or paragraph; they are joined.
MAX_PARTS = 1024

# Parameters of this and of similar APIs that would change the answer and are not there: each with the values, beside
# null, false, nothing and empty, that ask for what happens anyway.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "function_call": ("none", "auto"),
    "functions": (),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (),
    "json_schema": (),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "n_predict": (),
    "reasoning_effort": (),
    "repeat_penalty": (1,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": (),
    "tfs_z": (1,),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "top_a": (0,),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "xtc_probability": (0,),
}


def bounds_of(name: str) -> Any:
    """Return the bounds that a parameter has in all APIs."""
    return Field(**PARAMETERS[name].bounds)


# Names of a union's members: pydantic puts them into an error's place, where they only distract.
A_TEXT, TEXTS, IDS, LISTS_OF_IDS, A_LIST = "a text", "texts", "token ids", "lists of token ids", "a list"
TAGS = frozenset((A_TEXT, TEXTS, IDS, LISTS_OF_IDS, A_LIST))

Text = Annotated[str, Field(description="Valid Unicode.")]
Name = Annotated[str, StringConstraints(max_length=MAX_NAME)]
StopText = Annotated[str, StringConstraints(max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
# Of each list the first wrong item is reported, and no more are looked for.
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKEN_IDS, fail_fast=True)]


def text_or_list(value: Any) -> str | None:
    """Return which of the two a value is meant to be."""
    return A_TEXT if isinstance(value, str) else A_LIST if isinstance(value, list) else None


def kind_of_prompt(value: Any) -> str | None:
    """Return what a prompt is meant to be, by its first item."""
    if not isinstance(value, list):
        return A_TEXT if isinstance(value, str) else None
    if not value:
        return None
    return TEXTS if isinstance(value[0], str) else LISTS_OF_IDS if isinstance(value[0], list) else IDS


def choice_of(kind: Any, words: str) -> Any:
    """Return what chooses the member of a union, so that an error is that of the one that was meant.

    :param words: the message if it is none
    """
    return Discriminator(kind, custom_error_type="union", custom_error_message=f"Input should be {words}")


def check_bias(value: Any) -> Any:
    """Refuse too many entries, and keys that are no token ids, before anything is done for each."""
    if isinstance(value, dict):
        if len(value) > MAX_BIAS:
            raise PydanticCustomError("bias_too_long", f"at most {MAX_BIAS} tokens can have a bias, not {len(value)}")
        if not all(re.fullmatch("[0-9]{1,10}", name) for name in value):
            raise PydanticCustomError("bias_key", "keys should be token ids (whole numbers)")
    return value


class Request(BaseModel):
    """Checked as JSON: no text is taken for a number, and what is not known here is ignored or refused by name."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    @classmethod
    def read(cls, data: bytes) -> Any:
        """Read a request body.

        :raises InvalidParameter: naming the parameter
        """
        try:
            request = cls.model_validate_json(data)
        except ValidationError as error:
            raise first_problem(error) from None
        for name, harmless in REFUSED.items():
            value = (request.model_extra or {}).get(name)
            if value and value not in harmless:
                raise InvalidParameter(f"{name} is not supported, and the answer would differ: omit it", name)
        return request


def first_problem(error: ValidationError) -> InvalidParameter:
    """Turn pydantic's errors into ours, which reports the first."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"] if part not in TAGS)
    if not place:
        return InvalidParameter(f"the body must be a JSON object in UTF-8: {problem['msg']}")
    return InvalidParameter(f"{place}: {problem['msg']}", place.split(".")[0])


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = Field(None, description="Send a last chunk with the usage.")


class Sampling(Request):
    """What chat and text completions have in common."""

    model: Name | None = Field(None, description="Default: the default model of the server.")
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = Field(
        None, description="Longest answer, in tokens."
    )
    # From 0, which OpenAI's clients send for greedy answers; beyond 100, every token of a vocabulary is as likely.
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="0: always the likeliest token. Default: as on the chat page for this model."
    )
    top_p: Annotated[float, bounds_of("top_p")] | None = Field(None, description="Default: as on the chat page.")
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = Field(
        None, description="0 or -1: all tokens, the default."
    )
    min_p: Annotated[float, bounds_of("min_p")] | None = Field(None, description="Default 0.")
    repetition_penalty: Annotated[float, Field(ge=SMALLEST_FACTOR, le=1000)] | None = Field(
        None, description="As in Transformers; on tokens of prompt and answer. Default 1."
    )
    presence_penalty: Annotated[float, bounds_of("presence_penalty")] | None = Field(None, description="Default 0.")
    frequency_penalty: Annotated[float, bounds_of("frequency_penalty")] | None = Field(None, description="Default 0.")
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIAS),
            BeforeValidator(check_bias),
        ]
        | None
    ) = Field(None, description="Numbers by token id, added to the logits.")
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = Field(
        None, description="The same seed and request give the same answer. Choices get seeds that follow each other."
    )
    stop: (
        Annotated[
            Annotated[StopText, Tag(A_TEXT)]
            | Annotated[list[StopText], Field(max_length=MAX_STOP_SEQUENCES, fail_fast=True), Tag(A_LIST)],
            choice_of(text_or_list, "a text or a list of texts"),
        ]
        | None
    ) = Field(None, description="Texts that end the answer; they are not part of it.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="Answers to each prompt, which is computed once. Default 1."
    )
    stream: bool | None = Field(None, description="Send the answer as it is made, as server-sent events.")
    stream_options: StreamOptions | None = None
    user: Text | None = Field(None, description="Ignored.")


class ContentPart(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Annotated[
            Annotated[Text, Tag(A_TEXT)]
            | Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag(A_LIST)],
            choice_of(text_or_list, "a text or a list of parts that are text"),
        ]
        | None
    ) = None
    name: Text | None = Field(None, description="Ignored.")

    def plain(self) -> dict[str, str]:
        """Return role and text."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(Sampling):
    """A chat completion."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(
        None, description="The newer name of max_tokens. Default: as many as there is room for."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class CompletionRequest(Sampling):
    """A completion of texts or token ids."""

    prompt: Annotated[
        Annotated[Text, Tag(A_TEXT)]
        | Annotated[TokenIds, Tag(IDS)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag(TEXTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag(LISTS_OF_IDS)],
        choice_of(kind_of_prompt, "a text, a list of token ids or a list of either, and not an empty list"),
    ] = Field(description="A text, a list of token ids, or a list of either.")
    echo: bool | None = Field(
        None, description="Begin the answer with the prompt; with logprobs, those of the prompt too."
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="Tell the log-probabilities of the tokens, and of so many likeliest ones."
    )


def prompts_of(body: CompletionRequest) -> list[str] | list[list[int]]:
    """Return the prompts of a request, all of them texts or all of them token ids."""
    prompt: Any = body.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class TokenizeRequest(Request):
    """Text to tokens."""

    model: Name | None = None
    content: Annotated[Text, StringConstraints(max_length=MAX_TEXT)] = Field(description="The text.")
    add_special: bool | None = Field(None, description="Add the tokens that texts of the model begin with.")
    with_pieces: bool | None = Field(
        None, description=f"Tell the text of each token, of which there may be {MAX_TOKEN_IDS}."
    )


class DetokenizeRequest(Request):
    """Tokens to text."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)]


class TemplateRequest(Request):
    """A conversation to the text that the model reads."""

    model: Name | None = None
    messages: Messages
    add_generation_prompt: bool | None = Field(None, description="End where the answer begins. Default true.")


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Tokens that a session of an earlier request had processed already.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: State
    max_model_len: int | None = Field(description="Longest prompt and answer together, in tokens; null while it loads.")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class TokenPiece(BaseModel):
    id: int
    piece: str | list[int] = Field(description="The token's text, or its bytes where they are no text.")


class Tokens(BaseModel):
    tokens: list[int] | list[TokenPiece]
    count: int
    max_model_len: int


class Content(BaseModel):
    content: str


class Prompt(BaseModel):
    prompt: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """A failure of the OpenAI API."""

    error: ErrorDetail
