"""The weights of a GGUF file, as Transformers names and arranges them."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from swarm.weights.gguf.architectures import Architecture, Config
from swarm.weights.progress import Progress

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

# Formats that ``swarm.products`` computes with as they are, and the bytes of 32 weights of a row in each.
KEPT = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}

# They say what the configuration says too, see ``swarm.weights.gguf.rotation``.
DERIVED = ("rope_freqs.weight",)


def convert_tensors(
    tensors: Mapping[str, Any],
    config: Config,
    architecture: Architecture,
    add: Callable[[str, "Array"], None],
    progress: Progress,
    *,
    keep_bits: bool,
) -> None:
    """Pass Transformers' names and the weights, float32, to ``add``, block by block.

    :param tensors: gguf's, by their names
    :param keep_bits: pass blocks' matrices in the formats of ``KEPT`` as they are: uint8, [out, bytes], with the format
        after their names, as in ``q_proj.weight.Q8_0``
    :raises ValueError: if tensors are left that are not understood
    :raises KeyError: if one is missing
    """
    import numpy as np
    from gguf import dequantize

    left = dict(tensors)
    keep_bits = keep_bits and not architecture.fused  # blocks of petals' own are read by petals

    def take(name: str) -> "Array":
        tensor = left.pop(name)
        if keep_bits and is_kept(name, tensor):
            return np.array(tensor.data)  # not the file's memory, which is read-only
        weight: Array = dequantize(tensor.data, tensor.tensor_type)
        return weight - architecture.norm_offset if "norm." in name else weight

    blocks = config.get("num_hidden_layers") or config["n_layer"]
    for block in range(blocks):
        progress.say(f"block {block + 1} of {blocks}")
        progress.done(block / blocks)
        names = architecture.block(config)
        weights = {ours: take(f"blk.{block}.{theirs}") for theirs, ours in names.items()}
        kinds = {ours: tensors[f"blk.{block}.{theirs}"].tensor_type.name for theirs, ours in names.items()}
        for name, weight in arranged(weights, config, architecture).items():
            suffix = f".{kinds[name]}" if weight.dtype == np.uint8 else ""
            add(f"{architecture.blocks}.{block}.{name}{suffix}", weight)
    for theirs, ours in architecture.ends.items():
        if theirs != "output.weight" or not config["tie_word_embeddings"]:
            add(ours, take(theirs))
    for name in DERIVED:
        left.pop(name, None)
    if left:
        raise ValueError(f"it has tensors that are not understood: {', '.join(sorted(left))}")


def is_kept(name: str, tensor: Any) -> bool:
    """Whether a tensor is a matrix of a block, in a format that may be kept."""
    return name.startswith("blk.") and len(tensor.shape) == 2 and tensor.tensor_type.name in KEPT


def arranged(weights: dict[str, "Array"], config: Config, architecture: Architecture) -> dict[str, "Array"]:
    """Return a block's weights in the order in which Transformers has their rows."""
    if architecture.interleaved:
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
        for kind, count in heads.items():
            for name in (f"self_attn.{kind}_proj.weight", f"self_attn.{kind}_proj.bias"):
                if name in weights:
                    weights[name] = unpermuted(weights[name], count)
    for name in ("self_attention.query_key_value.weight", "self_attention.query_key_value.bias"):
        if name in weights:
            heads = config["n_head"] if architecture.fused == "bloom" else config["num_attention_heads"]
            groups = heads if architecture.fused == "bloom" else config["num_kv_heads"]
            weights[name] = grouped(weights[name], heads, groups)
    return with_fused_experts(weights, interleaved=config["model_type"] == "gpt_oss")


def unpermuted(weight: "Array", heads: int) -> "Array":
    """Reorder the rows of a query or key projection, shape (out, in) or (out,), as Transformers rotates them.

    GGUF puts the two rows that are rotated together next to each other, Transformers half a head apart.
    """
    pairs = weight.reshape(heads, len(weight) // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def grouped(weight: "Array", heads: int, groups: int) -> "Array":
    """Reorder the rows of a projection to queries, keys and values, (out, in) or (out,), as BLOOM and Falcon have them.

    GGUF has all queries, then all keys, then all values. They have the queries of each group, its key and its value.

    :param heads: of the queries
    :param groups: of query heads that share keys and values
    """
    import numpy as np

    size = len(weight) // (heads + 2 * groups)
    queries, keys, values = np.split(weight, [heads * size, (heads + groups) * size])
    parts = [part.reshape(groups, -1, size, *weight.shape[1:]) for part in (queries, keys, values)]
    return np.concatenate(parts, axis=1).reshape(weight.shape)


def with_fused_experts(weights: dict[str, "Array"], *, interleaved: bool) -> dict[str, "Array"]:
    """Put gates and upward projections of all experts into one tensor, as Transformers has them.

    GGUF has [experts, out, in], and so does Transformers, but for gpt-oss: there it has [experts, in, out].

    :param interleaved: as in gpt-oss, every second output is a gate; otherwise all gates come first
    """
    import numpy as np

    for suffix in ("", "_bias"):
        if f"mlp.experts.gate_proj{suffix}" not in weights:
            continue
        gate, up = (weights.pop(f"mlp.experts.{kind}_proj{suffix}") for kind in ("gate", "up"))
        if interleaved:
            fused = np.stack([gate, up], axis=2).reshape(len(gate), -1, *gate.shape[2:])
        else:
            fused = np.concatenate([gate, up], axis=1)
        weights[f"mlp.experts.gate_up_proj{suffix}"] = fused
    if interleaved:
        for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
            weights[name] = weights[name].swapaxes(1, 2)
    return weights
