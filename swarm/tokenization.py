"""The one owner of a model's tokenizer: every conversion between text and tokens goes through it.

Users send the texts. So no cache grows with them, no text that cannot fit is tokenized, a few dedicated threads
tokenize long ones, and facts about single tokens are in tables that are made once.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from swarm.control_tokens import MARK, ControlTokens
from swarm.errors import SessionLengthExceeded, TokenizerBusy

Result = TypeVar("Result")

# The longest text that is tokenized where the number of tokens sets no bound: when counting them, and with the few
# kinds of tokenizers that may drop any number of characters. Digits cost most: 430 bytes each, at the peak.
MAX_TEXT = 2**19  # characters
# Shorter texts are tokenized at once, within 10 ms, on the caller's thread; longer ones wait for a worker.
SMALL = 2**14  # characters, and tokens that are decoded
# A thread keeps half of the memory that a long text takes for the next one (glibc's arenas): hence dedicated threads,
# and few even where there are many cores.
WORKERS = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4)
# A worker takes less than a second per text: a caller that waits longer has ten before it.
PATIENCE = 10.0  # seconds
WORK_TIMEOUT = 60.0  # seconds; more than the longest text takes even on a busy machine
# Tokens that are decoded without releasing the interpreter's lock: that takes less time than getting it back.
FEW = 64

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
ALPHABET = frozenset(BYTES)
# Canonical composition joins at most four characters into one, such as U+1F82 (Unicode FAQ, "Normalization").
COMPOSED = 4

BPE_OPTIONS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)

_workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="tokenizer")


class TextTokenizer:
    """Converts texts to tokens and back, as the model's own tokenizer does. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, workers: Executor | None = None) -> None:
        """Take over a tokenizer; this takes a second or two for a vocabulary of 250,000.

        :param workers: threads for long texts; None: the program's shared ones
        :raises ValueError: if it is of an unsupported kind
        """
        if not tokenizer.is_fast:
            raise ValueError(f"its tokenizer, a {type(tokenizer).__name__}, has no fast version")
        self._backend, description = without_cache(tokenizer.backend_tokenizer)
        self._workers = workers or _workers
        self.chat_template: str | dict[str, str] | None = tokenizer.chat_template  # or several by name
        self.end_token: int | None = tokenizer.eos_token_id
        self.added_tokens = frozenset(tokenizer.added_tokens_encoder)  # beside the words of the vocabulary
        self.limit: int = tokenizer.model_max_length  # tokens of a text, if it is not nonsense
        self.control_tokens = ControlTokens(tokenizer, self._backend)
        self.special_tokens_map: dict[str, Any] = dict(tokenizer.special_tokens_map)
        vocabulary = self.get_vocab()
        self.size = len(vocabulary)

        def ids(spellings: Sequence[str]) -> list[int]:
            found = (vocabulary.get(spelling) for spelling in spellings)
            return [token_id for token_id in found if token_id not in (None, tokenizer.unk_token_id)]

        # Byte-level tokenizers: one-byte tokens that continue a UTF-8 character. Any character that can be continued
        # at all can be continued with one of these two bytes (Unicode Standard, table 3-7).
        self.continuations = tuple(ids([bytes_to_unicode()[byte] for byte in (0x80, 0xA0)]))
        # Sentence-piece tokenizers: tokens that stand for one byte. Their own decoder converts a run of them to text
        # all or not at all, so code that writes texts decodes them itself.
        self.byte_tokens = {token_id: byte for byte in range(256) for token_id in ids([f"<0x{byte:02X}>"])}
        self._spellings = self._spell(vocabulary, frozenset(tokenizer.all_special_ids))
        longest, loss = max(map(len, vocabulary), default=1), loss_of(description)
        self._characters_per_token = None if loss is None else longest * loss.factor
        self._vanishing = "" if loss is None else loss.vanishing

    def _spell(self, vocabulary: Mapping[str, int], special: frozenset[int]) -> list[bytes]:
        """Return the results of ``bytes_of``, by id."""
        spellings = [b""] * (max(vocabulary.values(), default=-1) + 1)
        others = []
        for spelled, token_id in vocabulary.items():
            if token_id in self.byte_tokens:
                spellings[token_id] = bytes([self.byte_tokens[token_id]])
            elif token_id in special:  # any tokenizer spells it literally
                spellings[token_id] = spelled.encode()
            elif self.byte_tokens:  # a sentence-piece tokenizer, whose decoder would drop a leading space
                spellings[token_id] = spelled.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
            elif self.continuations and ALPHABET.issuperset(spelled):
                spellings[token_id] = bytes(map(BYTES.__getitem__, spelled))
            else:
                others.append(token_id)
        for token_id, text in zip(others, self._decode([[token_id] for token_id in others]), strict=True):
            spellings[token_id] = text.encode()
        return spellings

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all tokens by spelling. Built on each call: too slow to use per request."""
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return vocabulary

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for, whole characters or not; empty if there is no such token."""
        return self._spellings[token_id] if 0 <= token_id < len(self._spellings) else b""

    def most_characters(self, room: int | None) -> int:
        """Return how many characters a text may have to fit; a longer one cannot, except for characters that vanish.

        :param room: tokens; None: any number
        """
        if room is None or self._characters_per_token is None:
            return MAX_TEXT
        return room * self._characters_per_token

    def encode(
        self, text: str, add_special_tokens: bool = True, *, room: int | None = None, marked: bool = False
    ) -> list[int]:
        """Convert a text to token ids; see ``encode_all``."""
        return self.encode_all([text], add_special_tokens, room=room, marked=marked)[0]

    def encode_all(
        self,
        texts: Sequence[str],
        add_special_tokens: bool = True,
        *,
        room: int | None = None,
        marked: bool = False,
    ) -> list[list[int]]:
        """Convert texts to token ids.

        :param add_special_tokens: whether to add those that the model's texts begin or end with
        :param room: tokens that each may have; refuses early what cannot fit, so results may still be longer
        :param marked: the texts have marks where special tokens are plain text, see ``ControlTokens``
        :raises SessionLengthExceeded: if a text certainly has more tokens
        :raises TokenizerBusy: if too many long texts are being tokenized
        """
        if not marked:
            texts = list(map(self.control_tokens.escape, texts))
        most = self.most_characters(room)
        if any(len(text) - self._vanishing_in(text) > most for text in texts if len(text) > most):
            bound = f"{most} characters" if room is None else f"the {most} characters that {room} tokens can have"
            raise SessionLengthExceeded(f"a text of {max(map(len, texts))} characters is longer than {bound}")

        def encode() -> list[list[int]]:
            # Always a batch: the interpreter's lock is released only for batches.
            encodings = self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]

        return self._run(encode, sum(map(len, texts)))

    def _vanishing_in(self, text: str) -> int:
        """Return how many characters of a text are in no token."""
        return sum(map(text.count, self._vanishing)) + text.count(MARK) * len(MARK)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Convert token ids to text, with special tokens and with spaces unchanged.

        :raises TokenizerBusy: if too many long texts are being tokenized
        """
        if len(token_ids) <= FEW:  # as with each token of an answer
            text: str = self._backend.decode(list(token_ids), skip_special_tokens=False)
            return text
        return self._run(lambda: self._decode([token_ids])[0], len(token_ids))

    def _decode(self, texts: Sequence[Sequence[int]]) -> list[str]:
        decoded: list[str] = self._backend.decode_batch([list(text) for text in texts], skip_special_tokens=False)
        return decoded

    def _run(self, work: Callable[[], Result], size: int) -> Result:
        """Do work of the given size, on a worker thread if it is large."""
        if size <= SMALL:
            return work()
        future = self._workers.submit(work)
        try:
            wait([future], PATIENCE)
            if future.cancel():
                raise TokenizerBusy(f"too many long texts are being tokenized: no turn within {PATIENCE:.0f} s")
            return future.result(WORK_TIMEOUT)
        except FutureTimeout:
            raise TokenizerBusy(f"a text was not tokenized within {WORK_TIMEOUT:.0f} s") from None


def without_cache(backend: Tokenizer) -> tuple[Tokenizer, dict[str, Any]]:
    """Return a copy of a tokenizer that remembers none of its inputs, and its description in JSON.

    BPE in tokenizers 0.14 keeps the first 10,000 words it meets forever, however long (its issue 1539), and without
    spaces or splitting rules a whole text is one word. Without the cache, ordinary texts take a third more time (13 ms
    instead of 10 ms for 8,000 tokens).

    :raises ValueError: if it is of a kind whose cache cannot be disabled
    """
    text = backend.to_str()
    copy, description = Tokenizer.from_str(text), json.loads(text)
    model = description["model"]
    if model["type"] == "BPE":
        unknown = {name for name, value in model.items() if value} - {"type", "vocab", "merges", *BPE_OPTIONS}
        if unknown:
            raise ValueError(f"its tokenizer has settings that are not supported: {', '.join(sorted(unknown))}")
        copy.model = BPE(
            model["vocab"],
            # Files of tokenizers before 0.20 have "a b" for the pair ["a", "b"].
            [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]],
            cache_capacity=0,
            **{option: model[option] for option in BPE_OPTIONS if model.get(option) is not None},
        )
    elif model["type"] not in ("WordLevel", "WordPiece"):  # these have none
        raise ValueError(f"its tokenizer is a {model['type']} model, and keeps in memory what it is given")
    copy.no_truncation()
    copy.no_padding()
    return copy, description


@dataclass(frozen=True)
class Loss:
    """How much of a text a tokenizer may leave out."""

    factor: int  # of this many characters of the text, at least one is left
    vanishing: str  # characters in no token: nothing is left of them


def loss_of(description: Mapping[str, Any]) -> Loss | None:
    """Return how much of a text may be left out; None: any amount.

    :param description: of the tokenizer, as in ``tokenizer.json``
    """
    swallows = any(token["lstrip"] or token["rstrip"] for token in description["added_tokens"])  # spaces around them
    drops = any(drops_characters(step) for step in steps_of(description["pre_tokenizer"], "pretokenizers"))
    normalizers = steps_of(description["normalizer"], "normalizers")
    factors = [shrinks_by(step) for step in normalizers]
    vanishing = vanishing_characters(description)
    if swallows or drops or None in factors or vanishing is None or (vanishing and normalizers):
        return None
    return Loss(math.prod(factor for factor in factors if factor is not None), vanishing)


def steps_of(step: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, which may be a (nested) sequence."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[name] for inner in steps_of(part, name)]


def shrinks_by(normalizer: Mapping[str, Any]) -> int | None:
    """Return how many characters at most a normalizer reduces to one; None: any number."""
    kind = normalizer["type"]
    if kind in ("Prepend", "Lowercase", "NFD", "NFKD"):
        return 1
    if kind in ("NFC", "NFKC"):
        return COMPOSED
    if kind == "Replace" and "String" in normalizer["pattern"] and normalizer["content"]:
        return math.ceil(len(normalizer["pattern"]["String"]) / len(normalizer["content"])) or 1
    return None


def drops_characters(pre_tokenizer: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer drops spaces or anything else between words."""
    if pre_tokenizer["type"] in ("Split", "Punctuation"):
        return bool(pre_tokenizer["behavior"] == "Removed")
    return pre_tokenizer["type"] not in ("ByteLevel", "Digits", "Metaspace", "UnicodeScripts")


def vanishing_characters(description: Mapping[str, Any]) -> str | None:
    """Return the characters that become no token, not even an unknown one; None: too many to list."""
    model = description["model"]
    if model["type"] != "BPE":
        return None  # a whole word becomes one unknown token
    vocabulary = model["vocab"]
    if model["byte_fallback"] and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return ""
    spelled = bytes_to_unicode()
    steps = steps_of(description["pre_tokenizer"], "pretokenizers")
    is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
    if is_byte_level and all(spelled[byte] in vocabulary for byte in range(128, 192)):
        # All others leave something: every non-ASCII character has one of those bytes.
        return "".join(chr(byte) for byte in range(128) if spelled[byte] not in vocabulary)
    return "" if model["unk_token"] is not None and not model["fuse_unk"] else None
