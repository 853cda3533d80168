"""The generator against plain Transformers, and text in pieces against oracles that see it whole. Needs no swarm."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import (
    AutoTokenizer,
    BloomForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from errors import InvalidParameter, TooLong
from generation.lengths import token_budget
from generation.loop import Chunk, end_tokens, generate
from generation.parameters import GenerationParams, parse_generation
from generation.text import CONTEXT_TOKENS, Detokenizer, StopMatcher, encode_inputs
from swarm.client.model import with_all_ends
from swarm.errors import BlocksMissing
from swarm.tokenization import TextTokenizer
from swarm.waiter import PATIENT, Waiter
from tests.conftest import greedy
from tests.support.reference import ReferenceSession
from tests.support.tiny import make_tokenizer
from tests.support.waiters import Ends

PROMPTS = [
    "The quick brown fox",
    "Ein Schwarm von Servern",
    "分散された",
    "a",
    "блоки модели",
    "🐝 bees",
    "Who said that? Nobody",
    "Une abeille,\n",
]
NO_END = GenerationConfig(eos_token_id=None)
TOKENIZER = make_tokenizer()  # for tests without a model
TEXTS = TextTokenizer(TOKENIZER)
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
# The beginning of a UTF-8 character at the end (Unicode Standard, table 3-7). Python's own incremental decoder does not
# do: it takes the halves of surrogate pairs for characters until the third byte.
UNFINISHED = re.compile(
    rb"([\xc2-\xdf]|\xe0[\xa0-\xbf]?|[\xe1-\xec\xee\xef][\x80-\xbf]?|\xed[\x80-\x9f]?"
    rb"|\xf0([\x90-\xbf][\x80-\xbf]?)?|[\xf1-\xf3]([\x80-\xbf][\x80-\xbf]?)?|\xf4([\x80-\x8f][\x80-\xbf]?)?)\Z"
)
# Without a deadline, for a machine may be busy, and the same examples in every run.
examples = settings(deadline=None, derandomize=True, max_examples=200)


@pytest.fixture(scope="module")
def tokenizer(tiny_bloom: Path) -> PreTrainedTokenizerBase:
    """The tiny model's, from its files; conftest's would start a swarm."""
    return AutoTokenizer.from_pretrained(tiny_bloom)


class ScriptedSession(ReferenceSession):
    """A session whose model says what the test wants."""

    def __init__(self, script: Sequence[int], max_length: int = 10_000) -> None:
        self.token_ids = []
        self.max_length = max_length
        self.position = 0
        self._script = iter(script)

    def step(self, token_ids: Sequence[int] = (), *, waiter: Waiter = PATIENT) -> torch.Tensor:
        self.append(token_ids)
        self.position = len(self.token_ids)
        return torch.nn.functional.one_hot(torch.tensor(next(self._script)), len(TOKENIZER)).float()


def run(
    session: ReferenceSession,
    input_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase = TOKENIZER,
    *,
    budget: int,
    defaults: GenerationConfig = NO_END,
    detokenizer: Detokenizer | None = None,
    waiter: Waiter = PATIENT,
    **params: Any,
) -> list[Chunk]:
    """Generate to the end, checking what is true of every answer."""
    start = len(session.token_ids) + len(input_ids)
    chunks = [
        chunk
        for _, chunk in generate(
            session,
            input_ids,
            GenerationParams(max_new_tokens=budget, **params),
            budget=budget,
            detokenizers=[detokenizer or Detokenizer(TextTokenizer(tokenizer))],
            defaults=defaults,
            waiter=waiter,
        )
    ]
    assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(chunk.stop_sequence is None for chunk in chunks[:-1])
    assert (chunks[-1].stop_sequence is not None) == (chunks[-1].finish_reason == "stop")
    whole = chunks[:-1] if chunks[-1].finish_reason == "cancelled" else chunks
    assert all(len(chunk.token_ids) == 1 for chunk in whole) and len(whole) <= budget
    assert session.token_ids[start:] == tokens(chunks)
    return chunks


def text(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def tokens(chunks: Sequence[Chunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def decode(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> str:
    return tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)


def decide(token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text if the beginning of a character is held back; the last piece ends the text."""
    pieces, known, sent = [], b"", 0
    for spelling in TOKENIZER.convert_ids_to_tokens(token_ids):
        known += bytes(BYTES[character] for character in spelling)
        pieces.append(UNFINISHED.sub(b"", known).decode(errors="replace")[sent:])
        sent += len(pieces[-1])
    return [*pieces, known.decode(errors="replace")[sent:]]


def first_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Find the stop sequence that is complete first, the longest of them, by looking everywhere."""
    found = [(i + len(stop), i, stop) for stop in stops for i in range(len(text)) if text.startswith(stop, i)]
    if not found:
        return text, None
    _, start, stop = min(found)
    return text[:start], stop


def next_tokens(reference: BloomForCausalLM, token_ids: list[int], count: int, **settings: Any) -> list[int]:
    output = reference.generate(torch.tensor([token_ids]), max_new_tokens=count, **settings)
    return output[0, len(token_ids) :].tolist()


# Sampling


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_equals_transformers(
    reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str
) -> None:
    input_ids, detokenizer = tokenizer.encode(prompt), Detokenizer(TextTokenizer(tokenizer))
    expected = greedy(reference, input_ids, 40)
    session = ReferenceSession(reference)
    chunks = run(
        session, input_ids, tokenizer, budget=40, defaults=reference.generation_config, detokenizer=detokenizer
    )
    assert tokens(chunks) == expected
    assert text(chunks) + detokenizer.flush() == decode(expected, tokenizer)
    assert chunks[-1].finish_reason == "length"
    assert session.position == len(session.token_ids) - 1  # going on costs nothing


SAMPLING = [
    *(
        dict(zip(("temperature", "top_k", "top_p", "repetition_penalty"), values, strict=True))
        for values in itertools.product((None, 0.6, 1.7), (None, 0, 7), (None, 0.8), (None, 1.4))
    ),
    {"temperature": 1.0},
    {"temperature": 1e-3},
    {"temperature": 1e300},
    {"top_k": 1},
    {"top_k": 10**30},
    {"top_p": 0.0},
    {"top_p": 1.0},
    {"repetition_penalty": 1.0},
    {"repetition_penalty": 0.5},
]


@pytest.mark.parametrize("params", SAMPLING, ids=lambda p: "-".join(f"{k}={v}" for k, v in p.items() if v is not None))
def test_sampling_equals_transformers(
    reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, params: dict[str, Any]
) -> None:
    given_params = {name: value for name, value in params.items() if value is not None}
    for seed, prompt in enumerate(PROMPTS[:2]):
        input_ids = tokenizer.encode(prompt)
        torch.manual_seed(seed)
        expected = next_tokens(reference, input_ids, 8, do_sample=True, **given_params)
        session = ReferenceSession(reference)
        chunks = run(
            session, input_ids, budget=8, defaults=reference.generation_config, do_sample=True, seed=seed, **params
        )
        assert tokens(chunks) == expected


@pytest.mark.filterwarnings("ignore:`do_sample` is set to `False`")
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.5, "top_k": 0, "top_p": 1.0}, {"repetition_penalty": 1.0}], ids=str
)
def test_unset_parameters_are_the_model_s_own(
    reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, params: dict[str, Any], do_sample: bool
) -> None:
    own = GenerationConfig.from_dict(reference.generation_config.to_dict())
    own.update(do_sample=True, temperature=0.8, top_k=9, top_p=0.7, repetition_penalty=1.3)
    input_ids = tokenizer.encode(PROMPTS[1])
    torch.manual_seed(3)
    expected = next_tokens(reference, input_ids, 20, generation_config=own, do_sample=do_sample, **params)
    session = ReferenceSession(reference)
    assert tokens(run(session, input_ids, budget=20, defaults=own, do_sample=do_sample, seed=3, **params)) == expected


@pytest.mark.parametrize("penalty", [0.7, 1.2, 5.0])
def test_greedy_with_repetition_penalty_equals_transformers(
    reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, penalty: float
) -> None:
    for prompt in PROMPTS[:4]:
        input_ids = tokenizer.encode(prompt)
        expected = next_tokens(reference, input_ids, 20, do_sample=False, repetition_penalty=penalty)
        session = ReferenceSession(reference)
        chunks = run(
            session, input_ids, budget=20, defaults=reference.generation_config, repetition_penalty=penalty, top_k=3
        )
        assert tokens(chunks) == expected


def test_repetition_penalty_counts_the_whole_session(
    reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    input_ids, session = tokenizer.encode(PROMPTS[0]), ReferenceSession(reference)
    expected = next_tokens(reference, input_ids, 20, do_sample=False, repetition_penalty=1.3)
    detokenizer = Detokenizer(TextTokenizer(tokenizer))
    params: dict[str, Any] = {"repetition_penalty": 1.3, "detokenizer": detokenizer}
    parts = [run(session, ids, budget=n, **params) for ids, n in ((input_ids, 8), ([], 5), ([], 7))]
    assert [token_id for chunks in parts for token_id in tokens(chunks)] == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "1e-40"),
        ("temperature", "1e300"),
        ("repetition_penalty", "1e-40"),
        ("repetition_penalty", "1e300"),
        ("top_p", "1e-40"),
        ("top_k", "9" * 30),
    ],
)
@pytest.mark.parametrize("do_sample", [0, 1])
def test_what_is_accepted_can_be_computed(
    reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, value: str, do_sample: int
) -> None:
    try:
        params = parse_generation({"max_new_tokens": 10, "do_sample": do_sample, "seed": 1, name: value})
    except InvalidParameter:
        return
    sampling = {"do_sample": params.do_sample, "seed": params.seed, name: getattr(params, name)}
    session = ReferenceSession(reference)
    assert len(tokens(run(session, tokenizer.encode(PROMPTS[0]), budget=10, **sampling))) == 10


# The end of a text


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_end_of_sequence_ends(
    reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, as_list: bool
) -> None:
    input_ids = tokenizer.encode(prompt)
    generated = greedy(reference, input_ids, 12)
    end = generated[-1]
    until = generated[: generated.index(end) + 1]
    defaults = GenerationConfig(eos_token_id=[439, end] if as_list else end)
    assert next_tokens(reference, input_ids, 12, eos_token_id=defaults.eos_token_id) == until
    session = ReferenceSession(reference)
    chunks = run(session, input_ids, tokenizer, budget=12, defaults=defaults)
    assert tokens(chunks) == until
    assert text(chunks) == decode(until[:-1], tokenizer)
    assert (chunks[-1].finish_reason, chunks[-1].stop_sequence) == ("stop", decode([end], tokenizer))


def test_end_of_sequence_decides_what_was_held_back() -> None:
    defaults = GenerationConfig(eos_token_id=TOKENIZER.eos_token_id)
    half = TOKENIZER.encode("🐝")[:-1]
    for said, stops in ((TOKENIZER.encode("fine\n\nHum"), ("\n\nHuman:",)), ([*TOKENIZER.encode("fine"), *half], ())):
        session = ScriptedSession([*said, TOKENIZER.eos_token_id])
        chunks = run(session, [5], budget=99, defaults=defaults, extra_stop_sequences=stops)
        assert text(chunks) == decode(said)
        assert (chunks[-1].finish_reason, chunks[-1].stop_sequence) == ("stop", "</s>")


def test_answer_after_an_end_begins_anew() -> None:
    """Half a character before the end of an answer is not joined to the next answer."""
    defaults, detokenizer = GenerationConfig(eos_token_id=TOKENIZER.eos_token_id), Detokenizer(TEXTS)
    bee = TOKENIZER.encode("🐝")
    session = ScriptedSession([*bee[:2], TOKENIZER.eos_token_id, *bee, TOKENIZER.eos_token_id])
    answers = [
        text(run(session, ids, budget=9, defaults=defaults, detokenizer=detokenizer))
        for ids in (TOKENIZER.encode("a"), TOKENIZER.encode("\nb"))
    ]
    assert answers == [decode(bee[:2]), "🐝"]


@pytest.mark.parametrize(("given_ends", "ends"), [(None, set()), (2, {2}), ([2, 5], {2, 5}), ((7,), {7}), (0, {0})])
def test_end_tokens(given_ends: Any, ends: set[int]) -> None:
    assert end_tokens(GenerationConfig(eos_token_id=given_ends)) == ends


def test_budget_of_one() -> None:
    chunks = run(ScriptedSession([70]), [5], budget=1)
    assert chunks == [Chunk(decode([70]), (70,), "length")]


# Stop sequences


def pieces_of(text: str, sizes: Sequence[int]) -> list[str]:
    bounds = [0, *itertools.accumulate(sizes)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    return [*pieces, text[bounds[-1] :]]


def match(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, str | None]:
    """Feed pieces, checking that exactly what may be the beginning of a stop sequence is held back."""
    matcher = StopMatcher(stops)
    fed = decided = ""
    for piece in pieces:
        fed += piece
        more, stop = matcher.feed(piece)
        decided += more
        if stop is not None:
            assert matcher.flush() == ""
            return decided, stop
        held = max((n for stop in stops for n in range(len(stop)) if fed.endswith(stop[:n])), default=0)
        assert decided == fed[: len(fed) - held]
    return decided + matcher.flush(), None


# Few letters, so that beginnings of stop sequences are everywhere and overlap.
few_letters = st.text("ab", max_size=40)
cuts = st.lists(st.integers(0, 5), max_size=15)


@examples
@given(few_letters, st.lists(st.text("ab", min_size=1, max_size=7), max_size=5), cuts)
def test_stop_matcher_equals_the_oracle_however_text_is_cut(said: str, stops: list[str], sizes: list[int]) -> None:
    expected = first_stop(said, stops)
    assert match(stops, pieces_of(said, sizes)) == expected
    assert match(stops, [said]) == expected
    assert match(stops, list(said)) == expected
    assert match(stops[::-1], list(said)) == expected


@examples
@given(st.data(), st.text(min_size=1), cuts)
def test_stop_matcher_with_stops_from_the_text(data: st.DataObject, said: str, sizes: list[int]) -> None:
    starts = data.draw(st.lists(st.integers(0, len(said) - 1), min_size=1, max_size=12))
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=len(starts), max_size=len(starts)))
    stops = [said[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    stops += [stop + "\0" for stop in stops]  # begins as the text does, and ends as it does not
    expected = first_stop(said, stops)
    assert expected[1] is not None
    assert match(stops, pieces_of(said, sizes)) == match(stops, list(said)) == expected


def test_stop_matcher_with_many_long_stops() -> None:
    matcher = StopMatcher(["x" * 1023 + chr(0x4E00 + i) for i in range(64)])
    decided = "".join(matcher.feed("xxxx")[0] for _ in range(500))
    assert decided == "x" * (2000 - 1023)
    assert matcher.feed(chr(0x4E00 + 40) + "more") == ("", "x" * 1023 + chr(0x4E00 + 40))


def test_stop_matcher_without_stops_holds_nothing() -> None:
    assert StopMatcher(()).feed("abc") == ("abc", None)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streamed_answer_with_stops_equals_the_whole(
    reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str
) -> None:
    input_ids = tokenizer.encode(prompt)
    generated = greedy(reference, input_ids, 30)
    whole = "".join(decide(generated)[:-1])
    choices = [whole[a : a + n] for a, n in ((2, 1), (5, 4), (len(whole) // 2, 9), (0, 2), (len(whole) - 3, 3))]
    for stops in ([choices[0]], [choices[2] + "!", choices[1]], choices[::-1], ["not in it", whole[:12] + "!"]):
        expected, stop = first_stop(whole, stops)
        session = ReferenceSession(reference)
        chunks = run(
            session, input_ids, tokenizer, budget=30, stop_sequence=stops[0], extra_stop_sequences=tuple(stops[1:])
        )
        assert (text(chunks), chunks[-1].stop_sequence) == (expected, stop)
        assert chunks[-1].finish_reason == ("length" if stop is None else "stop")
        assert not any(stop in text(chunks) for stop in stops)


# Tokens of which many are parts of characters, and some several characters.
any_tokens = st.lists(
    st.one_of(
        st.integers(0, len(TOKENIZER) - 1),
        st.sampled_from([TOKENIZER.convert_tokens_to_ids(c) for c, byte in BYTES.items() if byte >= 0x80]),
    ),
    max_size=60,
)


@examples
@given(any_tokens.filter(bool), st.lists(st.tuples(st.integers(0, 80), st.integers(1, 12)), min_size=1, max_size=4))
def test_stops_of_random_answers(said: list[int], slices: list[tuple[int, int]]) -> None:
    pieces = decide(said)[:-1]
    whole = "".join(pieces)
    stops = [whole[a : a + n] or f"<{a}>" for a, n in slices]
    chunks = run(ScriptedSession(said), [5], budget=len(said), extra_stop_sequences=tuple(stops))
    expected, stop = first_stop(whole, stops)
    assert (text(chunks), chunks[-1].stop_sequence) == (expected, stop)
    # The first token with which a stop sequence is complete is the last.
    count = next((n for n in range(1, len(said)) if first_stop("".join(pieces[:n]), stops)[1]), len(said))
    assert tokens(chunks) == said[:count]


# From tokens to text


@examples
@given(any_tokens)
def test_detokenizer_decides_each_character_as_soon_as_it_can(token_ids: list[int]) -> None:
    """Nothing ends inside a character that can still become whole, and nothing is held longer than that."""
    detokenizer = Detokenizer(TEXTS)
    pieces = [*(detokenizer.add(token_id) for token_id in token_ids), detokenizer.flush()]
    assert pieces == decide(token_ids)
    assert "".join(pieces) == decode(token_ids)
    assert detokenizer.flush() == ""


@examples
@given(st.text(max_size=30), any_tokens)
def test_detokenizer_goes_on_after_context(context: str, token_ids: list[int]) -> None:
    detokenizer = Detokenizer(TEXTS)
    detokenizer.add(TOKENIZER.encode("é")[0])  # half a character, to be forgotten
    detokenizer.restart(TOKENIZER.encode(context))
    assert [*(detokenizer.add(token_id) for token_id in token_ids), detokenizer.flush()] == decide(token_ids)


@pytest.mark.parametrize("said", ["🐝", "日本語", "👩‍👩‍👧 family", "é", "𝔘nicode", "a\u0301", "🐝🐝"])
def test_split_characters_are_held_until_whole(said: str) -> None:
    token_ids, detokenizer = TOKENIZER.encode(said), Detokenizer(TEXTS)
    sent = ""
    for count, token_id in enumerate(token_ids, start=1):
        sent += detokenizer.add(token_id)
        known = b"".join(bytes(BYTES[c] for c in s) for s in TOKENIZER.convert_ids_to_tokens(token_ids[:count]))
        assert sent == known.decode(errors="ignore")
    assert sent == said


def test_genuine_replacement_character_is_not_held() -> None:
    token_ids, detokenizer = TOKENIZER.encode("\ufffd"), Detokenizer(TEXTS)
    assert len(token_ids) == 3
    assert [detokenizer.add(token_id) for token_id in [*token_ids, *token_ids]] == ["", "", "\ufffd"] * 2


@pytest.mark.parametrize("byte", [0x80, 0xBF, 0xC0, 0xC1, 0xF5, 0xFF])
def test_byte_that_begins_no_character_is_not_held(byte: int) -> None:
    token_id = TOKENIZER.convert_tokens_to_ids(bytes_to_unicode()[byte])
    assert Detokenizer(TEXTS).add(token_id) == "\ufffd"


def test_flush_then_go_on() -> None:
    bee, detokenizer = TOKENIZER.encode("🐝"), Detokenizer(TEXTS)
    assert [detokenizer.add(token_id) for token_id in bee[:2]] == ["", ""]
    assert detokenizer.flush() == "\ufffd"
    assert "".join(detokenizer.add(token_id) for token_id in bee) == "🐝"


def test_special_tokens_are_spelled() -> None:
    detokenizer = Detokenizer(TEXTS)
    assert detokenizer.add(TOKENIZER.bos_token_id) == detokenizer.spell(TOKENIZER.bos_token_id) == "<s>"


def test_spaces_stay_as_they_are() -> None:
    token_ids = TOKENIZER.encode("Who said that ? Nobody , he did n't .")
    detokenizer = Detokenizer(TEXTS)
    assert "".join(detokenizer.add(token_id) for token_id in token_ids) == "Who said that ? Nobody , he did n't ."


def make_sentence_piece() -> PreTrainedTokenizerFast:
    """A tokenizer that is made as Llama's: spaces are part of words, and unknown characters are spelled in bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdelo,"]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


SENTENCE_PIECE = make_sentence_piece()
SENTENCE_PIECE_TEXTS = TextTokenizer(SENTENCE_PIECE)


def sentence_piece_chunks(said: str, context: str = "a") -> list[str]:
    detokenizer = Detokenizer(SENTENCE_PIECE_TEXTS)
    detokenizer.restart(SENTENCE_PIECE.encode(context))
    token_ids = SENTENCE_PIECE.encode(said)
    return [*(detokenizer.add(token_id) for token_id in token_ids), detokenizer.flush()]


def test_sentence_piece_keeps_the_space_between_context_and_text() -> None:
    assert sentence_piece_chunks("hello, a") == list(" hello, a") + [""]
    assert sentence_piece_chunks("a", context="a" * (2 * CONTEXT_TOKENS)) == [" ", "a", ""]


@pytest.mark.parametrize("said", ["é", "日", "🐝", "a日本 b", "🐝🐝", "é日🐝", "日a🐝,e"])
def test_sentence_piece_holds_characters_spelled_in_bytes_until_whole(said: str) -> None:
    chunks = sentence_piece_chunks(said)
    assert "".join(chunks) == f" {said}"
    assert not any("\ufffd" in chunk for chunk in chunks)


@examples
@given(st.text("abc é日🐝\x80\ufffd", max_size=12))
def test_sentence_piece_writes_any_text(said: str) -> None:
    assert "".join(sentence_piece_chunks(said)) == (f" {said}" if said else "")


# Going on


@pytest.mark.parametrize("sizes", [[1] * 40, [3, 7, 30], [39, 1]], ids=str)
def test_continued_equals_uncut(
    reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, sizes: list[int]
) -> None:
    for prompt in PROMPTS[2:6]:
        input_ids = tokenizer.encode(prompt)
        whole = run(ReferenceSession(reference), input_ids, tokenizer, budget=40)
        session, detokenizer = ReferenceSession(reference), Detokenizer(TextTokenizer(tokenizer))
        parts = [
            run(session, [] if i else input_ids, tokenizer, budget=size, detokenizer=detokenizer)
            for i, size in enumerate(sizes)
        ]
        assert [token_id for part in parts for token_id in tokens(part)] == tokens(whole)
        assert "".join(map(text, parts)) == text(whole)


@examples
@given(any_tokens.filter(bool), st.integers(1, 7))
def test_random_answer_continued_equals_uncut(said: list[int], size: int) -> None:
    session, detokenizer = ScriptedSession(said), Detokenizer(TEXTS)
    session.append([5])
    answer = ""
    for start in range(0, len(said), size):
        budget = min(size, len(said) - start)
        answer += text(run(session, [], budget=budget, detokenizer=detokenizer))
    assert answer == "".join(decide(said)[:-1])


def test_new_inputs_begin_a_new_text() -> None:
    """Half a character at the end of an answer is not joined to what comes after the next inputs."""
    bee, detokenizer = TOKENIZER.encode("🐝"), Detokenizer(TEXTS)
    session = ScriptedSession([*bee[:2], *bee])
    assert text(run(session, [5], budget=2, detokenizer=detokenizer)) == ""
    assert text(run(session, TOKENIZER.encode("b"), budget=4, detokenizer=detokenizer)) == "🐝"
    assert session.token_ids == [5, *bee[:2], *TOKENIZER.encode("b"), *bee]


# Stopping and failing


@pytest.mark.parametrize("looks", range(9))
def test_cancelled_between_and_during_steps(
    reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, looks: int
) -> None:
    """Every first look is between steps, every second one during a step."""
    input_ids, session = tokenizer.encode(PROMPTS[0]), ReferenceSession(reference)
    detokenizer = Detokenizer(TextTokenizer(tokenizer))
    whole = run(ReferenceSession(reference), input_ids, tokenizer, budget=12)
    answers = iter([False] * looks + [True])
    first = run(
        session, input_ids, tokenizer, budget=12, detokenizer=detokenizer, waiter=Ends(lambda: next(answers, False))
    )
    assert tokens(first) == tokens(whole)[: looks // 2]
    assert (first[-1].finish_reason, first[-1].stop_sequence, first[-1].token_ids) == ("cancelled", None, ())
    rest = run(session, [], tokenizer, budget=12 - looks // 2, detokenizer=detokenizer)
    assert tokens(first) + tokens(rest) == tokens(whole)
    assert text(first) + text(rest) == text(whole)


def test_cancelled_answer_gives_out_what_may_have_become_a_stop_sequence() -> None:
    said = TOKENIZER.encode("fine\n\nHum")
    session, detokenizer = ScriptedSession(said), Detokenizer(TEXTS)
    chunks = run(
        session,
        [5],
        budget=99,
        detokenizer=detokenizer,
        waiter=Ends(lambda: len(session.token_ids) > len(said)),
        stop_sequence="\n\nHuman:",
    )
    assert text(chunks) == "fine\n\nHum"
    assert chunks[-1] == Chunk("\n\nHum", (), "cancelled")


def test_rows_are_answers_of_their_own(reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Row by row as the answers that their seeds give alone: the loop is the same."""
    input_ids = tokenizer.encode(PROMPTS[0])
    params = GenerationParams(max_new_tokens=12, do_sample=True, seed=7)
    session, texts = ReferenceSession(reference), TextTokenizer(tokenizer)
    found: dict[int, list[Chunk]] = {0: [], 1: [], 2: []}
    detokenizers = [Detokenizer(texts) for _ in found]
    for row, chunk in generate(session, input_ids, params, budget=12, detokenizers=detokenizers, defaults=NO_END):
        found[row].append(chunk)
    assert tokens(found[0]) == tokens(
        run(ReferenceSession(reference), input_ids, tokenizer, budget=12, do_sample=True, seed=7)
    )
    assert len({tuple(tokens(chunks)) for chunks in found.values()}) == 3
    assert all([len(chunks), chunks[-1].finish_reason] == [12, "length"] for chunks in found.values())
    assert session.token_ids == input_ids  # what rows have added is theirs


def test_time_is_over_for_all_rows(reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    input_ids, texts = tokenizer.encode(PROMPTS[0]), TextTokenizer(tokenizer)
    params = GenerationParams(max_new_tokens=12, max_time=0.0)
    detokenizers = [Detokenizer(texts) for _ in range(2)]
    chunks = list(
        generate(ReferenceSession(reference), input_ids, params, budget=12, detokenizers=detokenizers, defaults=NO_END)
    )
    assert chunks == [(0, Chunk("", (), "time")), (1, Chunk("", (), "time"))]


def test_length_gives_out_what_may_have_become_a_stop_sequence() -> None:
    said = TOKENIZER.encode("fine\n\nHum")
    chunks = run(ScriptedSession(said), [5], budget=len(said), stop_sequence="\n\nHuman:")
    assert text(chunks) == "fine\n\nHum" and chunks[-1].finish_reason == "length"


def test_failed_step_keeps_the_tokens() -> None:
    said = TOKENIZER.encode("Nobody, 🐝 said")

    class FailingSession(ScriptedSession):
        failing = True

        def step(self, *args: Any, **options: Any) -> torch.Tensor:
            if self.failing and len(self.token_ids) == 8:
                raise BlocksMissing("tiny", [2, 3])
            return super().step(*args, **options)

    session, detokenizer = FailingSession(said), Detokenizer(TEXTS)
    params = GenerationParams(max_new_tokens=99)
    chunks = []
    with pytest.raises(BlocksMissing):
        for _, chunk in generate(session, [5], params, budget=99, detokenizers=[detokenizer], defaults=NO_END):
            chunks.append(chunk)
    assert session.token_ids == [5, *said[:7]] and tokens(chunks) == said[:7]
    session.failing = False
    rest = run(session, [], budget=len(said) - 7, detokenizer=detokenizer)
    assert text(chunks) + text(rest) == "Nobody, 🐝 said"


# What fits


@pytest.mark.parametrize(
    ("prefix", "inputs", "params", "budget"),
    [
        (0, 10, {"max_new_tokens": 90}, 90),
        (0, 10, {"max_new_tokens": 1}, 1),
        (30, 10, {"max_new_tokens": 60}, 60),
        (30, 0, {"max_new_tokens": 5}, 5),
        (0, 10, {"max_length": 11}, 1),
        (30, 10, {"max_length": 100}, 60),
        # In rounds: to the end of the session, or of max_length.
        (30, 10, {"max_new_tokens": 1, "stop_sequence": "x"}, 60),
        (30, 10, {"max_new_tokens": 500, "stop_sequence": "x"}, 60),
        (30, 10, {"max_new_tokens": 1, "stop_sequence": "x", "max_answer_tokens": 7}, 7),
        (30, 10, {"max_new_tokens": 1, "stop_sequence": "x", "max_answer_tokens": 70}, 60),
        (30, 10, {"max_length": 50, "stop_sequence": "x", "max_answer_tokens": 7}, 7),
        (30, 10, {"max_length": 50, "stop_sequence": "x"}, 10),
        (30, 10, {"max_length": 500, "stop_sequence": "x"}, 60),
        # Further stop sequences alone do not make rounds.
        (30, 10, {"max_new_tokens": 5, "extra_stop_sequences": ("x",)}, 5),
    ],
)
def test_token_budget(prefix: int, inputs: int, params: dict[str, Any], budget: int) -> None:
    session = ScriptedSession([], max_length=100)
    session.append([5] * prefix)
    assert token_budget(GenerationParams(**params), session, inputs) == budget
    assert session.token_ids == [5] * prefix


@pytest.mark.parametrize(
    ("prefix", "inputs", "params", "message"),
    [
        (0, 10, {"max_new_tokens": 91}, "10 tokens and 91 new ones exceed the session's 100"),
        (30, 10, {"max_new_tokens": 61}, "40 tokens and 61 new ones exceed the session's 100"),
        (30, 10, {"max_length": 101}, "40 tokens and 61 new ones exceed the session's 100"),
        (30, 10, {"max_length": 40}, "max_length=40 leaves no room after 40 tokens"),
        (30, 10, {"max_length": 7}, "max_length=7 leaves no room after 40 tokens"),
        (30, 10, {"max_length": 40, "stop_sequence": "x"}, "max_length=40 leaves no room after 40 tokens"),
        (30, 70, {"max_new_tokens": 1}, "100 tokens of prefix and inputs leave no room in a session of 100"),
        (100, 0, {"max_new_tokens": 1, "stop_sequence": "x"}, "100 tokens of prefix and inputs leave no room"),
        (30, 200, {"max_length": 300}, "230 tokens of prefix and inputs leave no room"),
        (30, 10, {"max_new_tokens": 60, "extra_stop_sequences": ("x",), "stop_sequence": None}, None),
        (30, 10, {"max_new_tokens": 61, "extra_stop_sequences": ("x",)}, "exceed the session's 100"),
    ],
)
def test_what_does_not_fit(prefix: int, inputs: int, params: dict[str, Any], message: str | None) -> None:
    session = ScriptedSession([], max_length=100)
    session.append([5] * prefix)
    if message is None:
        assert token_budget(GenerationParams(**params), session, inputs) == 60
        return
    with pytest.raises(TooLong, match=message):
        token_budget(GenerationParams(**params), session, inputs)
    assert session.token_ids == [5] * prefix


def test_session_is_filled_to_its_end(reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    session, input_ids = ReferenceSession(reference, max_length=20), tokenizer.encode(PROMPTS[0])
    params = GenerationParams(max_new_tokens=1, stop_sequence="not in it")
    chunks = run(session, input_ids, tokenizer, budget=token_budget(params, session, len(input_ids)))
    assert len(session.token_ids) == 20 and chunks[-1].finish_reason == "length"
    with pytest.raises(TooLong):
        token_budget(params, session, 0)


def test_inputs_become_tokens() -> None:
    begins = make_tokenizer()
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begins.bos_token_id)]
    )
    session, tokenizer = ScriptedSession([]), TextTokenizer(begins)
    plain = TOKENIZER.encode("Who said")
    assert encode_inputs(GenerationParams("Who said"), session, tokenizer) == [begins.bos_token_id, *plain]
    with pytest.raises(InvalidParameter, match="inputs are required"):
        encode_inputs(GenerationParams(""), session, tokenizer)
    session.append([5])
    assert encode_inputs(GenerationParams("Who said"), session, tokenizer) == plain
    assert encode_inputs(GenerationParams(""), session, tokenizer) == []
    assert session.token_ids == [5]


@pytest.mark.parametrize(
    ("own", "tokenizer_s", "ends"),
    [
        (2, 2, [2]),
        ([5, 7], 2, [5, 7, 2]),
        ([5, 2], 2, [5, 2]),
        (None, 2, [2]),
        (5, None, [5]),
        (None, None, None),
    ],
)
def test_all_tokens_that_end_a_text(own: Any, tokenizer_s: int | None, ends: list[int] | None) -> None:
    """Those of the checkpoint, and the tokenizer's."""
    checkpoint_s = GenerationConfig(eos_token_id=own, temperature=0.5)
    found = with_all_ends(checkpoint_s, tokenizer_s)
    assert (found.eos_token_id, found.temperature, checkpoint_s.eos_token_id) == (ends, 0.5, own)
    assert end_tokens(found) == frozenset(ends or ())


@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        ("<s>a", [("<s>a", False)]),
        ("[<s>]</s>", [("<s>", True), ("</s>", False)]),
        ("<s>x[a</s>]b<s>c[</s>]", [("<s>x", False), ("a</s>", True), ("b<s>c", False), ("</s>", True)]),
        ("<s>]1[2[<s>", [("<s>]1", False), ("2<s>", True)]),  # ends where the next begins, or with the inputs
        ("[\ufdd0\ufdd1<s>]\ufdd0\ufdd1<s>", [("\ufdd0\ufdd1<s>", True), ("\ufdd0\ufdd1<s>", False)]),
    ],
)
def test_plain_text_in_inputs(inputs: str, parts: list[tuple[str, bool]]) -> None:
    """Special tokens in it are characters, in a new session and in one that goes on."""
    params = GenerationParams(inputs, plain_between=("[", "]"))
    expected = [
        token_id
        for text, plain in parts
        for token_id in TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=plain)
    ]
    session = ScriptedSession([])
    assert encode_inputs(params, session, TEXTS) == expected
    session.append([5])
    assert encode_inputs(params, session, TEXTS) == expected


@pytest.mark.parametrize("text", ["hello a", "a  b", "abc 🐝 é"])
def test_bytes_of_sentence_pieces_join_to_the_text(text: str) -> None:
    """Blanks included, which the tokenizer's own decoder drops at the beginning of each piece."""
    token_ids = SENTENCE_PIECE.encode(text, add_special_tokens=False)
    assert b"".join(SENTENCE_PIECE_TEXTS.bytes_of(token_id) for token_id in token_ids).decode() == f" {text}"


@pytest.mark.parametrize("text", ["hello a", "abc 🐝 é"])
def test_bytes_of_byte_level_tokens_join_to_the_text(text: str) -> None:
    token_ids = TOKENIZER.encode(text)
    assert b"".join(TEXTS.bytes_of(token_id) for token_id in token_ids).decode() == text
