"""Which model a checkpoint is: hashes of its configuration and its weights, the same for every copy of it.

Servers tell theirs to clients, so that nobody gets hidden states of another model, and the names of a directory's
blocks in the DHT contain one. They find mistakes, and are no defence against who forges weights.

Weights may be hundreds of gigabytes, so only a part of them is read: of safetensors, the name, dtype, shape, first,
middle and last bytes of every tensor. How tensors are divided into files, their paths and times do not matter. Of
PyTorch's files, the checksums that they contain; there the division matters, as it does whether a checkpoint is
converted to another dtype or format: that is another model.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from swarm.errors import ModelUnavailable
from swarm.weights.checks import read_json, weight_files

# Keys of config.json on which no block's output depends: where the file comes from, special tokens, training, and
# what was once kept there for generating texts or for other tasks than language models.
INERT_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path
    architectures attn_implementation auto_map author cache_implementation custom_pipelines dtype max_shard_size
    model_name name torch_dtype transformers_version transformers.js_config unsloth_fixed unsloth_version

    bos_token_id decoder_start_token_id eos_token_id forced_bos_token_id forced_eos_token_id image_token_id
    keys_to_ignore_at_inference mask_token_id pad_token_id sep_token_id tokenizer_class unk_token_id

    attention_dropout attn_dropout classifier_dropout embd_pdrop embedding_dropout hidden_dropout hidden_dropout_prob
    initializer_range output_router_logits resid_pdrop router_aux_loss_coef router_jitter_noise seq_length
    attention_softmax_in_fp32 gradient_checkpointing pretraining_tp bias_dropout_fusion masked_softmax_fusion
    skip_bias_add skip_bias_add_qkv offset_alibi xla_device

    bad_words_ids begin_suppress_tokens chunk_size_feed_forward diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task id2label
    label2id length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states output_scores
    prefix problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    suppress_tokens task_specific_params temperature tf_legacy_loss top_k top_p torchscript typical_p use_bfloat16
    use_cache use_return_dict
    """.split()
)
SAMPLE = 4096  # bytes at a time; as many are read from the disk in any case
PLACES = 64  # where a file of which nothing else is known is read
DIGITS = 16  # of a hash; what two models share by chance does not matter at 64 bits


@dataclass(frozen=True)
class Fingerprint:
    """The hashes of a model, as far as a program has its files."""

    config: str
    weights: str | None = None  # None: not known. Who takes a model from the hub has only a part of its weights

    @property
    def known(self) -> dict[str, str]:
        """The hashes by their names."""
        return {"config": self.config} | ({} if self.weights is None else {"weights": self.weights})

    def difference(self, other: "Fingerprint") -> str | None:
        """Return what two models differ in, or None if they do not as far as both are known."""
        if self.config != other.config:
            return "configuration"
        if None not in (self.weights, other.weights) and self.weights != other.weights:
            return "weights"
        return None


def fingerprint(model: str) -> Fingerprint:
    """Return the fingerprint of a model.

    :param model: what ``locate`` has returned: a directory, or a hub name whose configuration is in the hub's cache
    :raises ModelUnavailable: if its files cannot be read
    """
    if os.path.isdir(model):
        directory = Path(model)
        config = read_json(model, directory / "config.json")
        return Fingerprint(hash_config(config), hash_weights(model, weight_files(model, directory)))
    return Fingerprint(hash_config(read_config(model)))


def version(model: str) -> str:
    """Return a text that is another one when the files of a model may have changed, on this machine.

    :param model: as for ``fingerprint``
    :raises ModelUnavailable: if its files cannot be read
    """
    if not os.path.isdir(model):
        return json.dumps([model, read_config(model)], sort_keys=True)
    try:
        stats = [(file.name, file.stat()) for file in weight_files(model, Path(model))]
    except OSError as error:
        raise ModelUnavailable(f"{model}: {error.strerror or error}") from error
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def read_config(model: str) -> dict[str, Any]:
    """Return config.json of a model that ``locate`` has found.

    :raises ModelUnavailable: if it cannot be read
    """
    if os.path.isdir(model):
        return read_json(model, Path(model) / "config.json")
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(model, "config.json")
    if not isinstance(file, str):
        raise ModelUnavailable(f"{model}: config.json is no longer in the hub's cache")
    return read_json(model, Path(file))


def hash_config(config: dict[str, Any]) -> str:
    """Return the hash of what a configuration says of blocks."""
    computed = {key: value for key, value in config.items() if key not in INERT_KEYS and value is not None}
    text = json.dumps(computed, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def hash_weights(model: str, files: Sequence[Path]) -> str:
    """Return the hash of a checkpoint's weights.

    :param files: safetensors files, or files of PyTorch
    :raises ModelUnavailable: if one cannot be read
    """
    parts: list[bytes] = []
    for file in files:
        try:
            parts += _safetensors_parts(file) if file.suffix == ".safetensors" else [_pytorch_part(file)]
        except OSError as error:
            raise ModelUnavailable(f"{model}: cannot read {file}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ModelUnavailable(f"{model}: {file} is broken: {error}") from error
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:DIGITS]


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, {name: {dtype, shape, data_offsets}}, and where the data begins.

    :raises OSError, ValueError: if it cannot be read
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _safetensors_parts(file: Path) -> Iterator[bytes]:
    """Yield a hash of each tensor."""
    header, data = read_header(file)
    with file.open("rb", buffering=0) as opened:
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = tensor["data_offsets"]
            digest = hashlib.sha256(json.dumps([name, tensor["dtype"], tensor["shape"]]).encode())
            digest.update(_sample(opened, data + start, end - start, 3))
            yield digest.digest()


def sample_tensor(file: Path, name: str) -> bytes:
    """Return the bytes by which a tensor of a safetensors file is known."""
    header, data = read_header(file)
    start, end = header[name]["data_offsets"]
    with file.open("rb", buffering=0) as opened:
        return _sample(opened, data + start, end - start, 3)


def _pytorch_part(file: Path) -> bytes:
    """Return a hash of a PyTorch file: a zip file knows its entries' checksums."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            # The first directory has the file's name.
            entries = [(it.filename.partition("/")[2], it.file_size, it.CRC) for it in archive.infolist()]
        return hashlib.sha256(json.dumps(sorted(entries)).encode()).digest()
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb", buffering=0) as opened:
        digest.update(_sample(opened, 0, size, PLACES))
    return digest.digest()


def _sample(opened: FileIO, start: int, size: int, count: int) -> bytes:
    """Return what is at both ends of so many bytes and at places evenly between, or all of them if they are few."""
    places = [(0, size)]
    if size > count * SAMPLE:
        places = [((size - SAMPLE) * number // (count - 1), SAMPLE) for number in range(count)]
    parts = []
    for place, length in places:
        opened.seek(start + place)
        parts.append(opened.read(length))
    return b"".join(parts)
