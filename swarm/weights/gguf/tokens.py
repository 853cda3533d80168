"""The tokenizer in a GGUF file, as Transformers reads it, and the tokens that end an answer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swarm.weights.gguf.settings import Settings

# Types of tokens. Control tokens stand for themselves and are never split, such as <|im_end|>; those that the model's
# author has added, such as <think>, are not split either, but are plain text.
CONTROL, ADDED = 3, 4

# llama.cpp's names of the ways to split a text before byte-level BPE, where Transformers has no regular expression for
# them: GPT-2's, and the same with each digit alone.
GPT2_SPLITS = {"gpt-2", "olmo"}
DIGIT_SPLITS = {"smollm", "refact", "starcoder"}
BLOOM_SPLIT = r" ?[^(\s|[.,!?…。，、।۔،])]+"
# Whose whole words are tokens even if no merges lead there, and which begin each text with a token unless told not to.
WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"}
# Whose text is first put into Unicode's composed form.
COMPOSED = {"qwen2", "deepseek-r1-qwen"}

# Tokens that end a turn, beside those that the file names.
TURN_ENDS = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>", "<|call|>"}


def write_tokenizer(settings: Settings, config: Mapping[str, Any], directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    :raises ValueError: if the kind of tokenizer is not known
    :raises KeyError: if something of it is missing
    """
    from tokenizers import AddedToken

    given = settings.tokenizer
    if given["model"] == "gpt2":
        tokenizer = byte_level(given)
    elif given["model"] == "llama":
        tokenizer = sentencepiece(settings.architecture, given)
    else:
        raise ValueError(f"its kind of tokenizer is not known: {given['model']}")
    names, types = given["tokens"], given["token_type"]
    control = [token for token, kind in zip(names, types, strict=True) if kind == CONTROL]
    added = [token for token, kind in zip(names, types, strict=True) if kind == ADDED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in added])
    if tokenizer.get_vocab_size(with_added_tokens=True) != len(set(names)):
        raise ValueError("its tokenizer has other tokens than its list of them")
    surround(tokenizer, given)
    # tokenizer.save() would raise a bare Exception if it cannot write.
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    content = tokenizer_config(settings, control, config.get("max_position_embeddings"))
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def tokenizer_config(settings: Settings, control: list[str], length: int | None) -> dict[str, Any]:
    """Return the content of tokenizer_config.json.

    :param length: of the context, in tokens
    """
    given = settings.tokenizer
    kinds = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {f"{ours}_token": given.get(f"{theirs}_token_id") for ours, theirs in kinds.items()}
    named = {name: given["tokens"][number] for name, number in ids.items() if number is not None}
    content: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if length is not None:
        content["model_max_length"] = length
    content["clean_up_tokenization_spaces"] = False
    if settings.chat_template is not None:
        content["chat_template"] = settings.chat_template
    content["additional_special_tokens"] = [token for token in control if token not in named.values()]
    return content | named


def byte_level(given: Mapping[str, Any]) -> Any:
    """Return a tokenizer of byte-level BPE, without added tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    kind = given["pre"]
    merges = [tuple(merge.split(" ")) for merge in given["merges"]]
    vocabulary = {token: number for number, token in enumerate(given["tokens"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    if kind in WHOLE_WORDS:
        tokenizer.model.ignore_merges = True
    if kind in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter(kind)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def splitter(kind: str) -> Any:
    """Return what splits texts before byte-level BPE.

    :param kind: llama.cpp's name of it
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split

    if kind in GPT2_SPLITS:
        return ByteLevel(add_prefix_space=False)
    if kind in DIGIT_SPLITS:
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if kind == "falcon":
        words = [Punctuation("contiguous"), ByteLevel(add_prefix_space=False), Digits(individual_digits=False)]
        return Sequence([*words, Split(Regex("[0-9][0-9][0-9]"), "isolated")])
    if kind == "bloom":
        expression = BLOOM_SPLIT
    else:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        if kind not in GGUF_PRE_TOKENIZER_SPLITS:
            raise ValueError(f"its kind of tokenizer is not known: gpt2, {kind}")
        expression = GGUF_PRE_TOKENIZER_SPLITS[kind]
    return Sequence([Split(Regex(expression), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece(architecture: str, given: Mapping[str, Any]) -> Any:
    """Return a tokenizer of SentencePiece's BPE: Transformers makes it, with each family's ways to treat spaces."""
    from transformers.integrations.gguf import convert_gguf_tokenizer

    spaced = not architecture.startswith("gemma")  # what Transformers does
    if given.get("add_space_prefix", True) != spaced:
        raise ValueError(f"its tokenizer {'does not begin' if spaced else 'begins'} texts with a space")
    needed = {"tokenizer_type": "llama", "tokens": given["tokens"], "scores": given["scores"]}
    merges = {"merges": given["merges"]} if "merges" in given else {}
    tokenizer, _ = convert_gguf_tokenizer(architecture, {**needed, **merges})
    return tokenizer


def surround(tokenizer: Any, given: Mapping[str, Any]) -> None:
    """Let the tokenizer begin and end each text with the tokens that the file says."""
    from tokenizers import processors

    begins = given["model"] == "llama" or given.get("pre") in WHOLE_WORDS
    bos = given["bos_token_id"] if given.get("add_bos_token", begins) else None
    eos = given["eos_token_id"] if given.get("add_eos_token", False) else None
    if given.get("add_sep_token"):
        raise ValueError("its tokenizer adds separators")
    if bos is None and eos is None:
        if given["model"] == "llama":
            tokenizer.post_processor = processors.Sequence([])
        return
    first, last = (None if number is None else given["tokens"][number] for number in (bos, eos))
    around = {token: number for token, number in ((first, bos), (last, eos)) if token is not None}
    texts = [[token for token in (first, text, last) if token is not None] for text in ("$A", "$B:1")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=texts[0], pair=texts[0] + texts[1], special_tokens=list(around.items())
    )


def eos_token_ids(given: Mapping[str, Any]) -> int | list[int] | None:
    """Return the tokens that end an answer: one, a list of several, or None."""
    ends = {given.get(f"{name}_token_id") for name in ("eos", "eot", "eom")}
    texts = set(TURN_ENDS)
    if "<|return|>" in given["tokens"]:
        texts.remove("<|end|>")  # of gpt-oss: it ends a thought, and the answer follows
    for number, (token, kind) in enumerate(zip(given["tokens"], given["token_type"], strict=True)):
        if kind == CONTROL and token in texts:
            ends.add(number)
    found = sorted(number for number in ends if number is not None)
    return found[0] if len(found) == 1 else found or None
