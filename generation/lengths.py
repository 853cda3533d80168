"""How long a session is: for all doors, and in tokens, prompts and answers together."""

from errors import TooLong


def stateless_length(needed: int, longest: int) -> int:
    """Return the length of a session for a request that comes without one.

    It may be kept, and go on with a longer request: with twice the room what is computed again stays in proportion.
    """
    return min(2 * needed, max(needed, longest))


def chat_length(prompt: int, wanted: int | None, usual: int, longest: int) -> int:
    """Return the length of a chat's session: that of a conversation on the page, so that next turns find room in it.

    :param wanted: tokens that the answer may have; None: as many as there is room for, at least a quarter of the usual
    :raises TooLong: if even the longest is too short
    """
    if prompt + (usual // 4 if wanted is None else wanted) <= usual:
        return usual
    check_length(prompt, wanted or 1, longest)
    return longest


def check_length(prompt: int, wanted: int, longest: int) -> None:
    """Refuse what does not fit.

    :raises TooLong: telling the numbers
    """
    if prompt + wanted > longest:
        raise TooLong(f"a prompt of {prompt} tokens and {wanted} new ones exceed the model's {longest}")
