"""What a request of the OpenAI API asks for: prompts as tokens, parameters, lengths; and what is refused."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errors import InvalidParameter
from generation.lengths import chat_length, check_length, stateless_length
from generation.parameters import MAX_SEED, SMALLEST_FACTOR, GenerationParams
from models.catalog import ModelConfig
from models.chat_template import ChatPrompt, apply_template
from openai_api.answers import Task
from openai_api.schemas import ChatRequest, CompletionRequest, Sampling, prompts_of

if TYPE_CHECKING:
    from swarm.client.model import SwarmModel

# Of a completion without max_tokens, as at OpenAI.
DEFAULT_MAX_TOKENS = 16
# Tokens and log-probabilities that one request may ask for: 200 MB while they are written as JSON, of chats 400 MB.
MAX_VALUES = 1_000_000


def read_chat(body: ChatRequest, config: ModelConfig, model: "SwarmModel") -> ChatPrompt:
    """Return a conversation as the model reads it.

    :raises InvalidParameter, TooLong: see ``apply_template``
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidParameter("top_logprobs needs logprobs to be true", "top_logprobs")
    return apply_template(config, model.tokenizer, [message.plain() for message in body.messages])


def chat_task(body: ChatRequest, config: ModelConfig, model: "SwarmModel", chat: ChatPrompt) -> tuple[Task, int]:
    """Return what is to be computed for a chat, and how many values the answer may report.

    :raises InvalidParameter, TooLong: if it is nothing, or too much
    """
    token_ids = model.tokenizer.encode(chat.marked, chat.add_special_tokens, room=model.max_length, marked=True)
    if not token_ids:
        raise InvalidParameter("these messages give an empty prompt with the model's chat template", "messages")
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if wanted == 0:
        raise InvalidParameter("max_tokens must be at least 1", "max_tokens")
    length = chat_length(len(token_ids), wanted, min(config.session_length, model.max_length), model.max_length)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = sampling(body, config, model, chat.stop, logprobs)
    open_ended, wanted = wanted is None, wanted or length - len(token_ids)
    choices = body.n or 1
    if choices > 1:
        length = len(token_ids) + wanted  # nothing continues several rows
    num_values = check_work(len(token_ids) + wanted, choices, logprobs)
    return Task(token_ids, wanted, length, params, choices, open_ended=open_ended), num_values


def completion_tasks(body: CompletionRequest, config: ModelConfig, model: "SwarmModel") -> tuple[list[Task], int]:
    """Return what is to be computed for each prompt of a completion, and how many values the answers may report.

    :raises InvalidParameter, TooLong: if it is nothing, or too much
    """
    wanted = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if not wanted and not body.echo:
        raise InvalidParameter("max_tokens must be at least 1, unless echo is true", "max_tokens")
    params = sampling(body, config, model, (), body.logprobs)
    scored = bool(body.echo) and body.logprobs is not None
    prompts = encode_prompts(model, prompts_of(body))
    num_values = check_work(sum(map(len, prompts)) + wanted * len(prompts), body.n or 1, body.logprobs)
    tasks = []
    for token_ids in prompts:
        check_length(len(token_ids), wanted, model.max_length)
        needed = len(token_ids) + wanted
        # Nothing continues several prompts or answers, and they would push out conversations that continue.
        alone = len(prompts) == (body.n or 1) == 1 and not scored
        length = stateless_length(needed, model.max_length) if alone else needed
        tasks.append(Task(token_ids, wanted, length, params, body.n or 1, scored, keep_warm=alone))
    return tasks, num_values


def sampling(
    body: Sampling, config: ModelConfig, model: "SwarmModel", stop: Sequence[str], logprobs: int | None
) -> GenerationParams:
    """Return the parameters of a request; for what it leaves out, the page's values for this model apply."""
    temperature = config.generation.get("temperature", 1.0) if body.temperature is None else body.temperature
    top_p = config.generation.get("top_p", 1.0) if body.top_p is None else body.top_p
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    bias = logit_bias(body, model)
    return GenerationParams(
        do_sample=temperature > 0,
        temperature=max(temperature, SMALLEST_FACTOR),
        top_k=max(body.top_k or 0, 0),
        top_p=top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=bias,
        logprobs=logprobs,
        seed=None if body.seed is None else body.seed % (MAX_SEED + 1),
        extra_stop_sequences=(*(text for text in stops if text), *stop),
    )


def logit_bias(body: Sampling, model: "SwarmModel") -> tuple[tuple[int, float], ...]:
    bias = {int(name): value for name, value in (body.logit_bias or {}).items()}
    check_tokens(model, list(bias), "logit_bias")
    return tuple(bias.items())


def check_tokens(model: "SwarmModel", token_ids: Sequence[int], param: str) -> None:
    """Refuse ids that are not the model's.

    :raises InvalidParameter: naming one
    """
    size = min(model.head.vocab_size, model.tokenizer.size)
    if token_ids and not (0 <= min(token_ids) and max(token_ids) < size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < size)
        raise InvalidParameter(f"{param}: {wrong} is not a token of this model, which has {size}", param)


def check_work(tokens: int, choices: int, logprobs: int | None) -> int:
    """Return how many values an answer may report; refuse what would take unbounded memory.

    :param tokens: of prompts and answers
    :raises InvalidParameter: naming the numbers
    """
    num_values = tokens * choices * (1 if logprobs is None else 2 + logprobs)
    if num_values > MAX_VALUES:
        raise InvalidParameter(
            f"{tokens} tokens, n={choices} and logprobs={logprobs} make {num_values} values, more than {MAX_VALUES}; "
            "ask for fewer"
        )
    return num_values


def encode_prompts(model: "SwarmModel", prompts: list[str] | list[list[int]]) -> list[list[int]]:
    """Return the tokens of prompts.

    :raises InvalidParameter: if one has none, or some that are none of the model's
    """
    token_ids = [prompt for prompt in prompts if not isinstance(prompt, str)]
    for ids in token_ids:
        check_tokens(model, ids, "prompt")
    if token_ids:
        return token_ids
    encoded = model.tokenizer.encode_all(
        [prompt for prompt in prompts if isinstance(prompt, str)], room=model.max_length
    )
    if not all(encoded):
        raise InvalidParameter("prompt must not be empty", "prompt")
    return encoded
