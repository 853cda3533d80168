"""The tokenizer's owner beside the plain tokenizer; its bounds; and its memory. Needs no swarm."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from swarm import tokenization
from swarm.errors import SessionLengthExceeded, TokenizerBusy
from swarm.tokenization import COMPOSED, FEW, MAX_TEXT, SMALL, TextTokenizer, loss_of
from tests.support.processes import ROOT
from tests.support.tiny import CORPUS, make_tokenizer
from tests.test_generation import SENTENCE_PIECE, SENTENCE_PIECE_TEXTS, TEXTS, TOKENIZER

PLAIN_AND_OWNED = [(TOKENIZER, TEXTS), (SENTENCE_PIECE, SENTENCE_PIECE_TEXTS)]
LONG_ENOUGH = 30.0  # seconds
examples = settings(deadline=None, derandomize=True, max_examples=200)
# Texts as users write them, and what tokenizers treat in a special way.
any_text = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(["<s>", "</s>", "<unk>", "<0x41>", "▁", " ", "\n\n", "é", "e\u0301", "🐝", *CORPUS])).map(
        "".join
    ),
)


@pytest.mark.parametrize(("plain", "owned"), PLAIN_AND_OWNED)
@examples
@given(text=any_text, special=st.booleans())
def test_the_same_tokens_and_texts(
    plain: PreTrainedTokenizerBase, owned: TextTokenizer, text: str, special: bool
) -> None:
    token_ids = plain.encode(text, add_special_tokens=special)
    assert owned.encode(text, special) == token_ids
    assert owned.decode(token_ids) == plain.decode(token_ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(("plain", "owned"), PLAIN_AND_OWNED)
def test_long_texts_become_the_same_tokens(plain: PreTrainedTokenizerBase, owned: TextTokenizer) -> None:
    """Those that are left to a worker, alone and among others."""
    texts = ["".join(CORPUS) * 100, "a", "7" * (SMALL + 1), "日" * SMALL]
    expected = [plain.encode(text) for text in texts]
    assert owned.encode_all(texts) == expected
    for count in (FEW, FEW + 1, SMALL, SMALL + 1):
        token_ids = (expected[0] * 20)[:count]
        assert owned.decode(token_ids) == plain.decode(token_ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(("plain", "owned"), PLAIN_AND_OWNED)
def test_what_is_known_of_tokens(plain: PreTrainedTokenizerBase, owned: TextTokenizer) -> None:
    assert owned.size == len(owned) == len(plain)
    assert owned.get_vocab() == plain.get_vocab()
    assert owned.special_tokens_map == plain.special_tokens_map
    assert [owned.bytes_of(token_id) for token_id in (-1, len(plain), 10**9)] == [b""] * 3
    for text in ("hello a", "abc 🐝 é"):
        token_ids = plain.encode(text)
        assert b"".join(map(owned.bytes_of, token_ids)).decode().strip() == text


def test_added_tokens_are_spelled_by_the_decoder() -> None:
    """They are not written in the alphabet of byte-level tokenizers."""
    plain = make_tokenizer()
    plain.add_tokens(["a new one", AddedToken("<tool>", lstrip=True)])
    owned = TextTokenizer(plain)
    assert owned.encode("x a new one  <tool>") == plain.encode("x a new one  <tool>")
    assert (owned.bytes_of(len(plain) - 2), owned.size) == (b"a new one", len(plain))


def test_settings_of_checkpoints_for_training_do_not_matter() -> None:
    plain = make_tokenizer()
    plain.backend_tokenizer.enable_truncation(4)
    plain.backend_tokenizer.enable_padding(length=64)
    assert TextTokenizer(plain).encode(CORPUS[0]) == TOKENIZER.encode(CORPUS[0])


def test_kinds_that_are_not_served() -> None:
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))
    with pytest.raises(ValueError, match="Unigram model, and keeps in memory"):
        TextTokenizer(unigram)
    with pytest.raises(ValueError, match="a NotFast, has no fast version"):

        class NotFast:
            is_fast = False

        TextTokenizer(NotFast())


# Bounds


def described(**parts: Any) -> dict[str, Any]:
    """A description of the tiny tokenizer's, with other parts."""
    tokenizer = make_tokenizer().backend_tokenizer
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenization.without_cache(tokenizer)[1]


def unknown(**options: Any) -> dict[str, Any]:
    """A description of a tokenizer that knows one letter."""
    return tokenization.without_cache(Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], **options)))[1]


SPLIT = pre_tokenizers.Split(" ", "isolated")
HALVED = normalizers.Replace("ab", "x")
CUT = pre_tokenizers.Split(" ", "removed")


@pytest.mark.parametrize(
    ("description", "factor"),
    [
        (described(), 1),
        (described(normalizer=normalizers.NFC()), COMPOSED),
        (described(normalizer=normalizers.Replace("abc", "x")), 3),
        (
            described(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("ab", "x")])),
            2 * COMPOSED,
        ),
        (described(normalizer=normalizers.Replace("a", "")), None),
        (described(normalizer=normalizers.Strip()), None),
        (described(normalizer=normalizers.StripAccents()), None),
        (described(pre_tokenizer=pre_tokenizers.Sequence([SPLIT, pre_tokenizers.ByteLevel()])), 1),
        (described(pre_tokenizer=pre_tokenizers.Sequence([CUT, pre_tokenizers.ByteLevel()])), None),
        (described(pre_tokenizer=pre_tokenizers.Whitespace()), None),
        (unknown(), None),  # other letters vanish
        (unknown(unk_token="<unk>"), 1),
        (unknown(unk_token="<unk>", fuse_unk=True), None),
    ],
)
def test_how_much_of_a_text_may_be_left_out(description: dict[str, Any], factor: int | None) -> None:
    loss = loss_of(description)
    assert (loss and loss.factor) == factor


@pytest.mark.parametrize("owned", [TEXTS, SENTENCE_PIECE_TEXTS])
@examples
@given(text=any_text)
def test_what_fits_is_never_refused(owned: TextTokenizer, text: str) -> None:
    token_ids = owned.encode(text, add_special_tokens=False)
    assert len(text) <= owned.most_characters(len(token_ids))
    assert owned.encode(text, False, room=len(token_ids)) == token_ids


def test_what_cannot_fit_is_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    most = TEXTS.most_characters(3)
    longest = max(TOKENIZER.get_vocab(), key=len)
    assert most == 3 * len(longest)
    TEXTS.encode("x" * most, room=3)
    monkeypatch.setattr(TEXTS, "_run", None)
    with pytest.raises(
        SessionLengthExceeded, match=f"{most + 1} characters is longer than the {most} characters that 3"
    ):
        TEXTS.encode("x" * (most + 1), room=3)
    with pytest.raises(SessionLengthExceeded, match=f"longer than {MAX_TEXT} characters"):
        TEXTS.encode_all(["a", "x" * (MAX_TEXT + 1)])


def test_characters_that_vanish_do_not_count() -> None:
    """As control characters do that a byte-level vocabulary does not have."""
    vocabulary = {token: token_id for token, token_id in TOKENIZER.get_vocab().items() if token != "Ā"}  # byte 0
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    owned = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    most = owned.most_characters(2)
    assert len(owned.encode("a" + "\0" * most + "a", add_special_tokens=False, room=2)) <= 3
    with pytest.raises(SessionLengthExceeded):
        owned.encode("a" * most + "\0" * most + "a", room=2)


# Work


class SlowBackend:
    """A tokenizer that waits, and counts how many do."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.lock = threading.Lock()
        self.working = self.most = 0
        self.texts: list[str] = []

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[Any]:
        with self.lock:
            self.working += 1
            self.most = max(self.most, self.working)
            self.texts += texts
        assert self.go_on.wait(LONG_ENOUGH)
        with self.lock:
            self.working -= 1
        return [TOKENIZER.backend_tokenizer.encode("a")] * len(texts)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowBackend:
    backend = SlowBackend()
    monkeypatch.setattr(TEXTS, "_backend", backend)
    return backend


def test_only_so_many_long_texts_at_a_time(slow: SlowBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(2) as workers, ThreadPoolExecutor(16) as users:
        monkeypatch.setattr(TEXTS, "_workers", workers)
        answers = [users.submit(TEXTS.encode, "x" * (SMALL + 1)) for _ in range(16)]
        while slow.working < 2:
            assert not any(answer.done() for answer in answers)
        slow.go_on.set()
        assert [answer.result(LONG_ENOUGH) for answer in answers] == [TOKENIZER.encode("a")] * 16
    assert slow.most == 2


def test_who_waits_too_long_is_told(slow: SlowBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not leave work behind; short texts do not wait."""
    monkeypatch.setattr(tokenization, "PATIENCE", 0.05)
    with ThreadPoolExecutor(1) as workers, ThreadPoolExecutor(1) as user:
        monkeypatch.setattr(TEXTS, "_workers", workers)
        first = user.submit(TEXTS.encode, "x" * (SMALL + 1))
        while not slow.working:
            assert not first.done()
        with pytest.raises(TokenizerBusy, match="no turn within"):
            TEXTS.encode("y" * (SMALL + 1))
        slow.go_on.set()
        assert TEXTS.encode("z") == first.result(LONG_ENOUGH)
    assert [text[0] for text in slow.texts] == ["x", "z"]


# Memory

# Words that would take 3 MiB each in a cache, first of a tokenizer that cuts texts into words and then of one to which
# a text is one word.
MEMORY = """
import random
from tests.test_generation import SENTENCE_PIECE_TEXTS, TEXTS

LETTERS = bytes(97 + byte % 26 for byte in range(256))

def resident():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

for owned in (TEXTS, SENTENCE_PIECE_TEXTS):
    for number in range(1, 51):
        owned.encode(random.randbytes(100_000).translate(LETTERS).decode())
        if number in (10, 50):
            print(resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_remembered_of_texts() -> None:
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    after_10, after_50, then_after_10, then_after_50 = map(int, result.stdout.split())
    assert after_50 - after_10 < 40 and then_after_50 - then_after_10 < 40, result.stdout  # MiB
