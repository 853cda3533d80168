"""What the HTTP API takes and gives, for the OpenAPI document.

``parameters`` reads requests: it takes texts for numbers as well, since query strings and forms have nothing else.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, create_model

from generation.parameters import MAX_NAME, MAX_STOP_LENGTH, MAX_STOP_SEQUENCES, PARAMETERS, Parameter
from models.catalog import State

Stop = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
Name = Annotated[str, Field(max_length=MAX_NAME)]
Flag = bool | Literal[0, 1]


def accepted(parameter: Parameter) -> Any:
    """Return the type of a parameter's values, and of null, with its bounds."""
    if parameter.kind is tuple:
        return Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_SEQUENCES)] | None
    if parameter.kind is bool:
        return Flag | None
    if parameter.kind is str:
        return (Stop if parameter.maximum else str) | None
    return Annotated[parameter.kind, Field(**parameter.bounds)] | None


_FIELDS: dict[str, Any] = {
    "model": (Name | None, Field(None, description="Default: the default model of the server.")),
    "session_id": (Name | None, Field(None, description="A session that was opened: go on from its tokens.")),
    **{name: (accepted(row), Field(None, description=row.meaning)) for name, row in PARAMETERS.items()},
}

GenerateRequest = create_model(
    "GenerateRequest",
    __doc__="Exactly one of max_length and max_new_tokens is required; inputs are, but to go on with a session.",
    **_FIELDS,
)


class OpenRequest(BaseModel):
    """Open an inference session."""

    max_length: Annotated[int, Field(ge=1)] = Field(description="Tokens, prefix included.")
    model: Name | None = None


class CloseRequest(BaseModel):
    """Close an inference session."""

    session_id: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


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
    state: State = Field(
        description="rejoining: this program has lost its swarm; stale: it has not read it for long; "
        "failed: it could not be loaded, its server cannot start, or it does not answer; it is tried again."
    )
    message: str
    view_age: float | None = Field(description="Seconds since it was read which servers there are; null: not yet.")
    answer_age: float | None = Field(description="Seconds since servers last computed a step; null: not yet.")


class Readiness(BaseModel):
    ready: bool = Field(description="Whether all models are ready.")
    models: dict[str, ModelState]
    others: int = Field(description="How many models there are that the caller may not use.")
    loops: dict[str, float] = Field(
        description="What runs in the background, and the seconds since its last good turn; of several, the most."
    )


class ServerInfo(BaseModel):
    """What a server of the swarm announced last."""

    peer_id: str
    name: str | None = Field(description="What its owner calls it.")
    start: int
    end: int = Field(description="It serves the blocks from start up to, but not including, end.")
    throughput: float = Field(description="Requests per second, as announced.")
    cache_tokens_left: int | None = Field(
        description="Free attention cache, in keys and values of a token in a block: a token takes two for each block."
    )
    torch_dtype: str | None
    version: str | None = Field(description="Of petals.")
    ping: float | None = Field(description="Seconds there and back; null: not measured, or it does not answer.")


class PageFormat(BaseModel):
    """Turns of a conversation; {text} is a question, {system} the system prompt."""

    user: str = Field(description="A turn, up to where the answer begins.")
    turn_end: str = Field(description="Between an answer and the next turn.")
    stop: list[str] = Field(description="Texts that end an answer.")
    first: str = Field(description="The first turn, with a system prompt.")
    system: str = Field(description="The system prompt of chats that have none of their own.")
    alone: str = Field(description="The first turn, without a system prompt; empty: as the others.")


class DraftingInfo(BaseModel):
    """How tokens are drafted for a model's answers."""

    model: str | None = Field(description="What drafts beside the text itself; null: nothing.")
    error: str | None = Field(description="Why the model that was to draft does not.")
    drafted: int = Field(description="Tokens so far.")
    taken: int = Field(description="How many of them the answers have.")


class ModelInfo(BaseModel):
    name: str
    title: str
    state: State
    message: str
    progress: Annotated[float, Field(ge=0, le=1)] | None = Field(description="While it loads, where it is known.")
    size: str | None = Field(description="Parameters, as people say it.")
    parameters: int | None = Field(description="Counted once the model is loaded.")
    licence: str | None
    link: str | None = Field(description="Where to read about the model.")
    context_length: int | None = Field(description="Tokens of the longest session.")
    chat: PageFormat | None = Field(description="How the chat page writes conversations for the model.")
    num_blocks: int | None
    blocks: list[int] = Field(description="For each block the number of servers that hold it.")
    drafting: DraftingInfo | None = Field(description="null: nothing is drafted.")
    servers: list[ServerInfo]


class SwarmReport(BaseModel):
    ok: Literal[True]
    time: float = Field(description="Seconds since 1970.")
    initial_peers: list[str] = Field(description="Multiaddrs by which other machines join the swarm, or public.")
    sessions: SessionCount
    models: list[ModelInfo]


class FailureDetail(BaseModel):
    code: str
    message: str


class Failure(BaseModel):
    """A failure of the HTTP API."""

    ok: Literal[False]
    error: FailureDetail
    traceback: str
    request_id: str
