"""Checkpoints whose weights are quantised: dequantised while a block is loaded, or refused by name."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import swarm.compat  # noqa: F401

import torch

from swarm.errors import ModelUnavailable
from swarm.families import FAMILIES

# How messages name what configurations name otherwise.
NAMES = {"awq": "AWQ", "gptq": "GPTQ", "fp8": "FP8", "mxfp4": "MXFP4"}
SCALES = "weight_scale_inv"  # of blocks of a matrix in FP8
QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2)

State = dict[str, torch.Tensor]


def check_quantisation(given: Mapping[str, Any]) -> Iterator[str]:
    """Yield why quantised weights cannot be dequantised, and what to use instead.

    :param given: the model's configuration, as its file has it
    """
    settings, model_type = given.get("quantization_config"), given["model_type"]
    if settings is None:
        return
    method = "settings that are no object"
    if isinstance(settings, dict):
        method = str(settings.get("quant_method", "bitsandbytes"))  # which did not say so at first
    if model_type in FAMILIES and method == ("mxfp4" if model_type == "gpt_oss" else "fp8"):
        return
    yield (
        f"weights quantised by {NAMES.get(method, method)} are not supported for {model_type}: "
        "take the original model, its FP8 version, or a GGUF file of it"
    )


def check_ends(path: str, unexpected: Iterable[str]) -> None:
    """Refuse a model whose embeddings or head are quantised: a client takes them as they are.

    :param unexpected: names of weights that the client found in the checkpoint, and has no use for
    :raises ModelUnavailable: naming one of them
    """
    for name in sorted(unexpected):
        if name.startswith(("model.embed_tokens.", "lm_head.")):
            raise ModelUnavailable(
                f"{path}: embeddings or a head that are quantised ({name}) are not supported: "
                "take the original model, or a GGUF file of it"
            )


def dequantised(state: State, settings: Mapping[str, Any] | None, dtype: torch.dtype) -> State:
    """Return a block's weights in the dtype that is computed in, as far as they were quantised.

    :param state: by their names in the checkpoint
    :param settings: ``quantization_config`` of the model's configuration
    :param dtype: of the weights that were quantised
    :raises ValueError: if weights are quantised in a way that the settings do not say
    """
    state = dict(state)
    size = (settings or {}).get("weight_block_size")
    for name in [name for name in state if name.endswith(f".{SCALES}")]:
        weight = name.removesuffix("_scale_inv")
        state[weight] = from_fp8(state[weight], state.pop(name), size).to(dtype)
        # Of activations, which are not quantised here.
        state.pop(weight.removesuffix("weight") + "activation_scale", None)
    for name in [name for name in state if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        state[stem] = from_mxfp4(state.pop(name), state.pop(f"{stem}_scales"), dtype)
    if left := [name for name, weight in state.items() if weight.dtype in QUANTISED]:
        raise ValueError(f"there are no scales for {', '.join(sorted(left))}")
    return state


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrices of all experts, [experts, in, out].

    :param blocks: two values in each byte, [experts, out, in / 32, 16]
    :param scales: exponents, [experts, out, in / 32]
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # not at once: few models need it

    # Every power of two that MXFP4 scales by is one of bfloat16 and float32, but not of float16.
    exact = torch.bfloat16 if dtype == torch.float16 else dtype
    matrices: torch.Tensor = convert_moe_packed_tensors(blocks, scales, dtype=exact).to(dtype)
    return matrices


def from_fp8(weight: torch.Tensor, scales: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """Return a matrix of FP8 in float32.

    Transformers' own function takes the size of blocks from the number of scales, and that is another one where the
    last blocks are smaller.

    :param weight: [out, in], in 8 bits
    :param scales: [blocks of rows, blocks of columns], what to multiply each block by; or one for the whole matrix
    :param size: rows and columns of a block; None: there is one scale
    """
    rows, columns = weight.shape
    if not scales.is_floating_point():
        raise ValueError(f"scales of {scales.dtype} are not supported")
    scales = scales.float()
    if size is None:
        return weight.float() * scales.reshape(1, 1)
    if scales.shape != (-(-rows // size[0]), -(-columns // size[1])):
        raise ValueError(f"{tuple(scales.shape)} scales do not fit a matrix of {rows} x {columns} in blocks of {size}")
    expanded = scales.repeat_interleave(size[0], 0)[:rows].repeat_interleave(size[1], 1)[:, :columns]
    return weight.float() * expanded
