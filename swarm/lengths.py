"""How many tokens a sequence may have: by the model, and on servers that do not say what they take."""

from typing import Any

# The longest session that a stock petals server accepts, without and with grouped-query attention.
STOCK_LENGTH, STOCK_LENGTH_GROUPED = 2048, 8192  # tokens
# What tokenizers without a limit of their own have for one, and more than any model has.
NO_LIMIT = 10**9  # tokens


def stock_length(config: Any) -> int:
    """Return the longest session that a stock petals server of a model accepts."""
    return STOCK_LENGTH_GROUPED if getattr(config, "num_key_value_groups", 1) > 1 else STOCK_LENGTH


def context_length(config: Any, tokenizer_limit: int | None = None) -> int | None:
    """Return how many tokens a model was made for; None: it does not say.

    :param config: Transformers' configuration of the model
    :param tokenizer_limit: what its tokenizer has for ``model_max_length``, asked if the configuration says nothing
    """
    length = getattr(config, "max_position_embeddings", None)
    if not length:
        return tokenizer_limit if tokenizer_limit and tokenizer_limit < NO_LIMIT else None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    factor = rope.get("factor") or 1.0
    kind = rope.get("rope_type") or rope.get("type")
    if kind == "linear":
        return int(length * factor)  # the configuration has what it was before
    if kind == "yarn":
        # Some configurations have the length before, others the one after.
        return max(length, int((rope.get("original_max_position_embeddings") or length) * factor))
    return int(length)


def served_length(config: Any, cache_tokens: int | None) -> int:
    """Return the longest session that a server of this project accepts by default: what the model allows, if there is
    attention cache for it.

    :param cache_tokens: its attention cache for each block; None: as much as petals takes
    """
    stock = stock_length(config)
    longest = max(stock, 2 * stock if cache_tokens is None else cache_tokens)
    return min(longest, context_length(config) or stock)
