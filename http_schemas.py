"""What the HTTP API takes and gives, for the OpenAPI document.

``parameters`` reads requests: it takes texts for numbers as well, since query strings and forms have nothing else.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from parameters import MAX_SEED, MAX_STOP_LENGTH, MAX_STOP_SEQUENCES, MAX_TOKENS, SMALLEST_FACTOR

Stop = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
Flag = bool | Literal[0, 1]


class GenerateRequest(BaseModel):
    """Exactly one of max_length and max_new_tokens is required; inputs are, but to go on with a session."""

    model: str | None = Field(None, description="Default: the default model of the server.")
    session_id: str | None = Field(None, description="A session that was opened: go on from its tokens.")
    inputs: str | None = None
    max_length: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(None, description="Tokens, prefix included.")
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_answer_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    do_sample: Flag | None = Field(None, description="Default false: always the likeliest token.")
    temperature: Annotated[float, Field(ge=SMALLEST_FACTOR)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=SMALLEST_FACTOR)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    max_time: Annotated[float, Field(gt=0)] | None = Field(None, description="Seconds.")
    stop_sequence: str | None = Field(None, description="Generate until this text.")
    extra_stop_sequences: Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_SEQUENCES)] | None = None


class OpenRequest(BaseModel):
    """Open an inference session."""

    max_length: Annotated[int, Field(ge=1)] = Field(description="Tokens, prefix included.")
    model: str | None = None


class CloseRequest(BaseModel):
    """Close an inference session."""

    session_id: Annotated[str, Field(min_length=1)]


class Outputs(BaseModel):
    ok: Literal[True]
    outputs: str


class SessionId(BaseModel):
    ok: Literal[True]
    session_id: str


class Closed(BaseModel):
    ok: Literal[True]


class SessionCount(BaseModel):
    open: int
    max: int


class Health(BaseModel):
    ok: Literal[True]
    sessions: SessionCount


class ModelState(BaseModel):
    state: Literal["loading", "ready", "blocks_missing", "failed"]
    message: str


class Readiness(BaseModel):
    ready: bool
    models: dict[str, ModelState]


class FailureDetail(BaseModel):
    code: str
    message: str


class Failure(BaseModel):
    """A failure of the HTTP API."""

    ok: Literal[False]
    error: FailureDetail
    traceback: str
    request_id: str
