"""How many tokens a session, an answer and a request's input may have."""

from errors import TooLong
from generation.parameters import GenerationParams
from generation.session import Session


def token_budget(params: GenerationParams, session: Session, input_length: int) -> int:
    """Return how many tokens may be generated.

    With a stop sequence generation continues in rounds, to the end of the session, of ``max_length`` or of
    ``max_answer_tokens`` if need be; a request without one asks for a number of tokens, which must fit.

    :raises TooLong: if the request does not fit the session
    """
    prefix = len(session.token_ids) + input_length
    room = session.max_length - prefix
    if room < 1:
        raise TooLong(f"{prefix} tokens of prefix and inputs leave no room in a session of {session.max_length} tokens")
    wanted = params.max_new_tokens if params.max_length is None else params.max_length - prefix
    if wanted is None or wanted < 1:
        raise TooLong(f"max_length={params.max_length} leaves no room after {prefix} tokens of prefix and inputs")
    if params.stop_sequence is not None:
        bounds = (wanted if params.max_length is not None else None, params.max_answer_tokens)
        return min([room, *(bound for bound in bounds if bound is not None)])
    if wanted > room:
        raise TooLong(f"{prefix} tokens and {wanted} new ones exceed the session's {session.max_length}")
    return wanted


def needed_length(params: GenerationParams, prompt: int) -> int:
    """Return how long a session must be for a request that comes without one.

    :param prompt: tokens of its inputs
    """
    return max(params.max_length or prompt + (params.max_new_tokens or 0), prompt)


def stateless_length(needed: int, longest: int) -> int:
    """Return the length of a session for a request that comes without one.

    It may be kept, and continue with a longer request: with twice the room what is computed again stays in proportion.
    """
    return min(2 * needed, max(needed, longest))


def chat_length(prompt: int, wanted: int | None, usual: int, longest: int) -> int:
    """Return the length of a chat's session: that of a conversation on the page, so that next turns find room in it, or
    twice as much, and so on.

    :param wanted: tokens that the answer may have; None: as many as there is room for, if it can be a quarter of the
        usual length
    :raises TooLong: if even the longest is too short
    """
    check_length(prompt, wanted or 1, longest)
    length = usual
    while length < longest and prompt + (usual // 4 if wanted is None else wanted) > length:
        length = min(2 * length, longest)  # no more attention cache than it needs
    return length


def check_length(prompt: int, wanted: int, longest: int) -> None:
    """Refuse what does not fit.

    :raises TooLong: naming the numbers
    """
    if prompt + wanted > longest:
        raise TooLong(f"a prompt of {prompt} tokens and {wanted} new ones exceed the model's {longest}")
