"""Answers with drafts are those without, in everything that a client sees; and when drafts are made. Needs no swarm."""

import dataclasses
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BloomForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from config import Settings
from errors import TooLong
from generation.drafting import Acceptance, Drafting, OwnText
from generation.lengths import token_budget
from generation.loop import Chunk, generate
from generation.pace import MOST_DRAFTED, SHARE, SIZES, Pace, expected
from generation.parameters import GenerationParams
from generation.suffixes import LONGEST, SuffixIndex
from generation.text import Detokenizer
from models.draft_models import load_draft_model
from swarm.client.bounded_head import BoundedHead
from swarm.client.bounds import Logits
from swarm.client.draft_model import DraftModel, DraftSession
from swarm.errors import BlocksMissing, ModelUnavailable
from swarm.tokenization import TextTokenizer
from swarm.waiter import PATIENT, Waiter
from tests.conftest import greedy
from tests.support.drafts import Eager, eager, prophecies
from tests.support.reference import ReferenceSession
from tests.support.waiters import Ends

NO_END = GenerationConfig(eos_token_id=None)
PROMPT = "The quick brown fox jumps over the lazy dog. Who said that? The quick brown fox"


@pytest.fixture(scope="module")
def tokenizer(tiny_bloom: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_bloom)


@pytest.fixture(scope="module")
def texts(tokenizer: PreTrainedTokenizerBase) -> TextTokenizer:
    return TextTokenizer(tokenizer)


def answer(
    session: ReferenceSession,
    texts: TextTokenizer,
    drafting: Drafting | None,
    params: GenerationParams,
    *,
    prompt: str = PROMPT,
    defaults: GenerationConfig = NO_END,
    waiter: Waiter = PATIENT,
) -> list[Chunk]:
    input_ids = texts.encode(prompt) if prompt else []
    budget = token_budget(params, session, len(input_ids))
    detokenizers = [Detokenizer(texts)]
    chunks = generate(
        session,
        input_ids,
        params,
        budget=budget,
        detokenizers=detokenizers,
        defaults=defaults,
        waiter=waiter,
        drafting=drafting,
    )
    return [chunk for _, chunk in chunks]


def tokens(chunks: Sequence[Chunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def same(found: Sequence[Chunk], wanted: Sequence[Chunk]) -> bool:
    """Whether answers are equal, chunk by chunk; log-probabilities but for rounding, for rows change products."""

    def without_numbers(chunk: Chunk) -> Any:
        likely = chunk.logprob
        ids = None if likely is None else (likely.token_id, [token_id for token_id, _ in likely.top])
        return chunk.text, chunk.token_ids, chunk.finish_reason, chunk.stop_sequence, ids

    def numbers(chunk: Chunk) -> list[float]:
        likely = chunk.logprob
        return [] if likely is None else [likely.logprob, *(number for _, number in likely.top)]

    return [without_numbers(it) for it in found] == [without_numbers(it) for it in wanted] and all(
        numbers(one) == pytest.approx(numbers(other), abs=1e-4) for one, other in zip(found, wanted, strict=True)
    )


# The same answers

PARAMS: list[dict[str, Any]] = [
    {},
    {"logprobs": 3},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    {"logit_bias": ((5, 3.0), (77, -100.0), (78, 2.0))},
    *(
        {"do_sample": True, "seed": 11, "temperature": temperature, **rules}
        for temperature in (0.3, 1.0)
        for rules in ({}, {"top_p": 0.8, "top_k": 0}, {"top_k": 5}, {"min_p": 0.1}, {"frequency_penalty": 0.4})
    ),
    {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0},  # with random numbers of its own
]


@pytest.mark.parametrize("lies", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_answers_are_the_same(
    reference: BloomForCausalLM,
    texts: TextTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    params: dict[str, Any],
    lies: float,
) -> None:
    if params.get("seed") is None:  # the numbers that nobody seeds are the same, one for each token
        monkeypatch.setattr("generation.sampling.random", SimpleNamespace(Random=lambda: random.Random(5)))
    wanted_params = GenerationParams(max_new_tokens=40, **params)
    plain = ReferenceSession(reference)
    wanted = answer(plain, texts, None, wanted_params)
    drafting = prophecies(plain.token_ids, lies)
    session = ReferenceSession(reference)
    assert same(answer(session, texts, drafting, wanted_params), wanted)
    assert session.token_ids == plain.token_ids
    pace = drafting.pace
    assert isinstance(pace, Eager)
    if lies == 0.0:  # a pass gives as many tokens as were drafted, and one more
        assert all(count == size + 1 for size, count in pace.notes)
        assert len(session.drafts) < 20
    if lies == 1.0:
        assert {count for _, count in pace.notes} == {1}
    assert len(tokens(wanted)) == 40


def test_text_drafts_for_itself(reference: BloomForCausalLM, texts: TextTokenizer) -> None:
    params = GenerationParams(max_new_tokens=60)
    wanted = answer(ReferenceSession(reference), texts, None, params, prompt="a")
    session, drafting = ReferenceSession(reference), eager()
    assert same(answer(session, texts, drafting, params, prompt="a"), wanted)
    assert drafting.steps == len(session.drafts) > 0 and 0 < drafting.taken < drafting.drafted


@pytest.mark.parametrize("size", [1, 3, 7, 15])
def test_end_of_sequence_within_a_draft(reference: BloomForCausalLM, texts: TextTokenizer, size: int) -> None:
    plain = ReferenceSession(reference)
    said = tokens(answer(plain, texts, None, GenerationParams(max_new_tokens=40)))
    for place in (0, 1, 5, 9, 20):
        defaults = GenerationConfig(eos_token_id=said[place])
        params = GenerationParams(max_new_tokens=40, logprobs=1)
        wanted_session, session = ReferenceSession(reference), ReferenceSession(reference)
        wanted = answer(wanted_session, texts, None, params, defaults=defaults)
        found = answer(session, texts, prophecies(plain.token_ids, 0.0, (size,)), params, defaults=defaults)
        assert same(found, wanted) and found[-1].finish_reason == "stop"
        assert session.token_ids == wanted_session.token_ids


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("in_rounds", [True, False])
def test_stop_sequence_within_a_draft(
    reference: BloomForCausalLM, texts: TextTokenizer, size: int, in_rounds: bool
) -> None:
    plain = ReferenceSession(reference)
    whole = "".join(chunk.text for chunk in answer(plain, texts, None, GenerationParams(max_new_tokens=40)))
    for start, length in itertools.product((3, 17, 40), (1, 3, 9)):
        stop = whole[start : start + length]
        params = GenerationParams(
            max_new_tokens=1 if in_rounds else 40,
            stop_sequence=stop if in_rounds else None,
            extra_stop_sequences=("never said", stop),
            max_answer_tokens=40 if in_rounds else None,
        )
        wanted_session, session = ReferenceSession(reference), ReferenceSession(reference)
        wanted = answer(wanted_session, texts, None, params)
        found = answer(session, texts, prophecies(plain.token_ids, 0.1, (size,)), params)
        assert same(found, wanted) and found[-1].stop_sequence == stop
        assert session.token_ids == wanted_session.token_ids
        rest = GenerationParams(max_new_tokens=5)  # the session goes on as without drafts
        assert same(
            answer(session, texts, eager(), rest, prompt=""), answer(wanted_session, texts, None, rest, prompt="")
        )


@pytest.mark.parametrize("room", [1, 2, 3, 9])
def test_end_of_the_session_within_a_draft(reference: BloomForCausalLM, texts: TextTokenizer, room: int) -> None:
    plain = ReferenceSession(reference)
    answer(plain, texts, None, GenerationParams(max_new_tokens=40))
    length = len(texts.encode(PROMPT)) + room
    params = GenerationParams(max_new_tokens=1, stop_sequence="never said")
    session = ReferenceSession(reference, length)
    found = answer(session, texts, prophecies(plain.token_ids, 0.0, (7,)), params)
    assert session.token_ids == plain.token_ids[:length] and found[-1].finish_reason == "length"
    with pytest.raises(TooLong):
        answer(session, texts, eager(), params, prompt="")


@pytest.mark.parametrize("place", range(1, 12))
def test_answer_is_cancelled_within_a_draft(reference: BloomForCausalLM, texts: TextTokenizer, place: int) -> None:
    plain = ReferenceSession(reference)
    answer(plain, texts, None, GenerationParams(max_new_tokens=40))
    end = len(texts.encode(PROMPT)) + place
    session = ReferenceSession(reference)
    waiter = Ends(lambda: len(session.token_ids) >= end)
    params = GenerationParams(max_new_tokens=40)
    found = answer(session, texts, prophecies(plain.token_ids, 0.0, (7,)), params, waiter=waiter)
    assert session.token_ids == plain.token_ids[:end] and found[-1] == Chunk("", (), "cancelled")
    rest = answer(session, texts, prophecies(plain.token_ids, 0.2), GenerationParams(max_new_tokens=9), prompt="")
    assert tokens(rest) == plain.token_ids[end : end + 9]


def test_failed_verification_keeps_the_tokens(reference: BloomForCausalLM, texts: TextTokenizer) -> None:
    class Failing(ReferenceSession):
        failing = True

        def verify(self, *args: Any, **options: Any) -> Any:
            if self.failing and len(self.drafts) == 2:
                raise BlocksMissing("tiny", [2, 3])
            return super().verify(*args, **options)

    plain, session = ReferenceSession(reference), Failing(reference)
    params = GenerationParams(max_new_tokens=30)
    answer(plain, texts, None, params)
    drafting = prophecies(plain.token_ids, 0.0, (3,))
    with pytest.raises(BlocksMissing):
        answer(session, texts, drafting, params)
    done = len(session.token_ids)
    assert session.token_ids == plain.token_ids[:done] and done == len(texts.encode(PROMPT)) + 1 + 2 * 4
    session.failing = False
    left = len(plain.token_ids) - done
    answer(session, texts, drafting, GenerationParams(max_new_tokens=left), prompt="")
    assert session.token_ids == plain.token_ids
    assert drafting.pace.running == 0


def test_verification_that_was_cut_short(reference: BloomForCausalLM, texts: TextTokenizer) -> None:
    """After the loss of a server, a session may return fewer logits than there are tokens in the draft."""

    class Short(ReferenceSession):
        def verify(self, draft: Sequence[int], *, waiter: Waiter = PATIENT) -> Any:
            rows = list(super().verify(draft, waiter=waiter))
            return iter(rows[: 1 + len(self.drafts) % 3])

    plain, session = ReferenceSession(reference), Short(reference)
    params = GenerationParams(max_new_tokens=30)
    wanted = answer(plain, texts, None, params)
    assert same(answer(session, texts, prophecies(plain.token_ids, 0.1, (7,)), params), wanted)


def test_no_drafts_where_nothing_can_be_undone(reference: BloomForCausalLM, texts: TextTokenizer) -> None:
    plain, session = ReferenceSession(reference), ReferenceSession(reference)
    session.can_verify = False
    params = GenerationParams(max_new_tokens=20)
    wanted = answer(plain, texts, None, params)
    assert same(answer(session, texts, prophecies(plain.token_ids, 0.0), params), wanted) and not session.drafts


def test_rows_have_no_drafts(reference: BloomForCausalLM, texts: TextTokenizer) -> None:
    params = GenerationParams(max_new_tokens=8, do_sample=True, seed=3)
    found = []
    for drafting in (None, eager()):
        session, detokenizers = ReferenceSession(reference), [Detokenizer(texts) for _ in range(3)]
        rows = generate(
            session,
            texts.encode(PROMPT),
            params,
            budget=8,
            detokenizers=detokenizers,
            defaults=NO_END,
            drafting=drafting,
        )
        found.append(list(rows))
        assert not session.drafts
    assert found[0] == found[1]


class BoundedSession(ReferenceSession):
    """A session whose head knows bounds first."""

    def __init__(self, model: BloomForCausalLM) -> None:
        super().__init__(model)
        self._head = BoundedHead(model.lm_head.weight.detach())

    def _compute(self, token_ids: Sequence[int]) -> torch.Tensor:
        output = self._model.transformer(torch.tensor([token_ids]), cache=self._cache, use_cache=True)
        self._cache = output.cache
        return output.last_hidden_state[0]

    def step_bounded(self, token_ids: Sequence[int] = (), *, waiter: Waiter = PATIENT) -> Logits:  # type: ignore[override]
        return self._head.bounds(self.step(token_ids, waiter=waiter)[None])[0]

    def verify(self, draft: Sequence[int], *, waiter: Waiter = PATIENT) -> Any:
        yield from self._head.bounds(torch.stack(list(super().verify(draft, waiter=waiter))))


@pytest.mark.parametrize("params", [params for params in PARAMS if params.get("seed") or not params], ids=str)
def test_bounded_logits_of_drafts(reference: BloomForCausalLM, texts: TextTokenizer, params: dict[str, Any]) -> None:
    wanted_params = GenerationParams(max_new_tokens=25, **params)
    plain = ReferenceSession(reference)
    wanted = answer(plain, texts, None, wanted_params)
    assert same(answer(BoundedSession(reference), texts, prophecies(plain.token_ids, 0.1), wanted_params), wanted)


# Where a text's last tokens have stood before


def longest_match(text: Sequence[int]) -> int:
    """Return how many of the last tokens stand anywhere before, by looking everywhere."""
    return max(
        (n for n in range(2, len(text)) for i in range(len(text) - n) if text[i : i + n] == text[-n:]), default=0
    )


@pytest.mark.parametrize("words", [2, 3, 12])
def test_index_finds_the_longest_match(words: int) -> None:
    chance = random.Random(words)
    index, text = SuffixIndex(), []
    for _ in range(100):
        added = [chance.randrange(words) for _ in range(chance.randrange(4))]
        text += added
        index.extend(added)
        match, length = index.match(), longest_match(text)
        assert len(index) == len(text)
        assert (match is not None) == (length > 0)
        if match is not None:
            assert match.length <= length
            assert text[match.place - match.length : match.place] == text[len(text) - match.length :]
            if words == 12:  # few places have the same pair, and all are looked at
                assert match.length == min(length, LONGEST)


def test_what_follows() -> None:
    index = SuffixIndex()
    index.extend([1, 2, 3, 4, 5, 9, 1, 2, 3])
    match = index.match()
    assert match == (3, 3)
    assert index.following(3, 2) == [4, 5]
    assert index.following(3, 9) == [4, 5, 9, 1, 2, 3, 4, 5, 9]  # and so on, as it has begun
    repeated = SuffixIndex()
    repeated.extend([7, 8, 8, 8, 8])
    found = repeated.match()
    assert found is not None and repeated.following(found.place, 5) == [8] * 5
    assert SuffixIndex().match() is None


def test_own_text_follows_a_session() -> None:
    own, text = OwnText(), [1, 2, 3, 4, 9, 8, 2, 3]
    assert own.follow(text) == 2 and own.draft(3) == [4, 9, 8]
    text += [4, 9]
    assert own.follow(text) == 3 and own.draft(2) == [8, 2]
    text.append(5)
    assert own.follow(text) is None


# When there are drafts


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def simulate(
    seconds: Sequence[float],
    likelihood: float,
    steps: int,
    *,
    users: int = 1,
    pace: Pace | None = None,
    noise: float = 0.0,
) -> tuple[float, Pace, list[int]]:
    """Let an answer be computed; return its tokens per second beside those without drafts, and the sizes chosen.

    :param seconds: that a step takes with a draft of each size
    :param likelihood: that a token of a draft is taken
    :param users: answers that run; of the others a step takes as long as this one's
    """
    pace, chance = pace or Pace(Clock()), random.Random(1)
    clock, pace.running = pace.clock, users
    assert isinstance(clock, Clock)
    began, given, sizes = clock.now, 0, []
    for _ in range(steps):
        size = pace.choose(likelihood, 100)
        taken = next((i for i in range(size) if chance.random() >= likelihood), size)
        took = seconds[SIZES.index(size)] * (1 + noise * (chance.random() - 0.5))
        clock.now += took
        pace.note(size, took, taken + 1)
        given += taken + 1 + users - 1
        sizes.append(size)
    return given / users / (clock.now - began) * seconds[0], pace, sizes


def test_drafts_are_long_where_the_way_is() -> None:
    gain, _, sizes = simulate([0.3, 0.305, 0.31, 0.32, 0.34, 0.38], 0.95, 300)
    assert gain > 8 and sizes[-10:].count(31) >= 9


def test_length_follows_acceptance() -> None:
    seconds = [0.3, 0.31, 0.34, 0.42, 0.56, 0.9]
    _, _, sizes = simulate(seconds, 0.5, 300)
    assert max(set(sizes[-100:]), key=sizes[-100:].count) == 3
    gain, _, sizes = simulate(seconds, 0.02, 300)
    assert gain > 0.98


@pytest.mark.parametrize("users", [1, 16])
@pytest.mark.parametrize("likelihood", [0.1, 0.4, 0.6])
@pytest.mark.parametrize("noise", [0.0, 0.6])
def test_no_drafts_where_rows_are_dear(likelihood: float, users: int, noise: float) -> None:
    """Experiments included, as much is computed as without."""
    gain, _, sizes = simulate([0.01, 0.02, 0.04, 0.08, 0.16, 0.32], likelihood, 3000, users=users, noise=noise)
    assert gain > 0.98 and sizes.count(0) > 2700


def test_drafts_must_be_worth_what_they_cost_others() -> None:
    """A draft that would double one user's speed, while steps of all get longer."""
    seconds = [0.1, 0.105, 0.115, 0.135, 0.18, 0.27]
    alone, _, _ = simulate(seconds, 0.8, 2000)
    crowded, _, _ = simulate([0.1, 0.13, 0.19, 0.3, 0.5, 0.9], 0.8, 2000, users=16)
    assert alone > 2 and crowded > 0.98


def test_wrong_hopes_cost_little() -> None:
    """Though drafts are believed to be good, they are not: the account of what they have cost stops them."""
    clock = Clock()
    pace = Pace(clock)
    pace.running, given = 1, 0
    for _ in range(3000):
        size = pace.choose(0.95, 100)
        clock.now += 0.1 + 0.005 * size
        pace.note(size, 0.1 + 0.005 * size, 1)
        given += 1
    assert given / clock.now * 0.1 > 1 - 2 * SHARE


def test_changes_are_noticed() -> None:
    far, near = [0.3, 0.305, 0.31, 0.32, 0.34, 0.38], [0.02, 0.04, 0.08, 0.16, 0.32, 0.64]
    _, pace, _ = simulate(far, 0.8, 300)
    _, pace, _ = simulate(near, 0.8, 300, pace=pace)
    gain, pace, sizes = simulate(near, 0.8, 2000, pace=pace)
    assert gain > 0.98 and sizes.count(0) > 1900
    gain, pace, sizes = simulate(far, 0.8, 1000, pace=pace)
    assert gain > 2


def test_time_without_a_draft_is_measured_again() -> None:
    _, _, sizes = simulate([0.3, 0.305, 0.31, 0.32, 0.34, 0.38], 0.99, 1000)
    drafted = [len(list(group)) for is_drafted, group in itertools.groupby(sizes, key=bool) if is_drafted]
    assert max(drafted) <= MOST_DRAFTED


def test_expected_tokens() -> None:
    assert expected(0.0, 7) == 1 and expected(1.0, 7) == 8
    assert expected(0.5, 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)


def test_what_is_not_drafted_is_compared_all_the_same(reference: BloomForCausalLM, texts: TextTokenizer) -> None:
    plain = ReferenceSession(reference)
    params = GenerationParams(max_new_tokens=20)
    wanted = answer(plain, texts, None, params)
    for lies in (0.0, 1.0):
        drafting = prophecies(plain.token_ids, lies, (0,))
        before = drafting.acceptance.likelihood(6)
        session = ReferenceSession(reference)
        assert same(answer(session, texts, drafting, params), wanted) and not session.drafts
        assert (drafting.acceptance.likelihood(6) > before) == (lies == 0.0)


def test_acceptance_is_learned() -> None:
    acceptance = Acceptance()
    before = acceptance.likelihood(3)
    for _ in range(200):
        acceptance.note(3, 7, 7)
    assert acceptance.likelihood(3) > 0.98 > before
    for _ in range(200):
        acceptance.note(3, 0, 1)
    assert acceptance.likelihood(3) < 0.05
    assert acceptance.likelihood(2) == Acceptance().likelihood(2)


# A small model that drafts


@pytest.fixture(scope="module")
def small(tiny_bloom: Path, texts: TextTokenizer) -> DraftModel:
    """The large model itself: it is right about everything."""
    vocabulary = texts.get_vocab()
    return DraftModel.load(
        str(tiny_bloom), vocabulary, len(vocabulary), cache_dir=tiny_bloom.parent, device="cpu", torch_dtype="float32"
    )


def continued(small: DraftModel, session: DraftSession, token_ids: Sequence[int], count: int) -> list[int]:
    """Return a draft, when the model has caught up."""
    while not (found := session.continued(token_ids, count)):
        small.worker.submit(int).result()
    return found


@pytest.mark.parametrize("length", [1, 20, 300])
def test_draft_model_says_what_it_would(reference: BloomForCausalLM, small: DraftModel, length: int) -> None:
    text = [(7 * i) % 400 + 5 for i in range(length)]
    session = small.open()
    for prompt in (text, [*text, 9], [*text[: length // 2], 8], [*text, 9, 9], [5]):  # it goes back, and on
        assert continued(small, session, prompt, 6) == greedy(reference, prompt, 6)
    assert continued(small, session, text, 1) == greedy(reference, text, 1)
    session.close()
    again = small.open()  # goes on from what the other one has computed
    assert again.continued([*text, 7], 3) == greedy(reference, [*text, 7], 3)
    again.close()


def test_answers_with_a_draft_model(reference: BloomForCausalLM, texts: TextTokenizer, small: DraftModel) -> None:
    params = GenerationParams(max_new_tokens=40)
    wanted = answer(ReferenceSession(reference), texts, None, params)
    drafting = Drafting().using(small)
    drafting.pace = Eager((3,))
    session = ReferenceSession(reference)
    assert same(answer(session, texts, drafting, params), wanted)
    assert len(session.drafts) < 20 and drafting.taken > 20
    assert not small._running
    assert Drafting().using(None).make_drafters == (OwnText,)


def test_bounded_number_of_tokens(
    reference: BloomForCausalLM, small: DraftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm.client.draft_model.MAX_TOKENS", 50)
    first, second = small.open(), small.open()
    assert continued(small, first, [5] * 20, 4) and not small._kept  # those of ended answers have made room
    assert second.continued([5] * 40, 4) == []
    first.close()
    assert continued(small, second, [5] * 40, 4) == greedy(reference, [5] * 40, 4)
    second.close()


def test_draft_models_that_are_refused(tiny_bloom: Path, texts: TextTokenizer, tmp_path: Path) -> None:
    where: dict[str, Any] = {"cache_dir": tmp_path, "device": "cpu", "torch_dtype": "float32"}
    other = dict(texts.get_vocab()) | {"something else": 999}
    with pytest.raises(ModelUnavailable, match="tiny-bloom cannot draft: its tokenizer is not the model's"):
        DraftModel.load(str(tiny_bloom), other, 1000, **where)
    with pytest.raises(ModelUnavailable, match="nowhere"):
        DraftModel.load(str(tmp_path / "nowhere"), other, 1000, **where)


def test_app_does_without_a_draft_model(
    tiny_bloom: Path, texts: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(MODELS=(str(tiny_bloom),), DRAFT_MODELS=(f"{tiny_bloom}=/nowhere/small",), DEVICE="cpu")
    head = SimpleNamespace(vocab_size=480)
    model: Any = SimpleNamespace(name=str(tiny_bloom), tokenizer=texts, head=head, draft_model=None)
    error = load_draft_model(settings, model)
    assert error is not None and "/nowhere/small" in error and "/nowhere/small" in caplog.text
    assert model.draft_model is None
    assert load_draft_model(dataclasses.replace(settings, DRAFTING="off"), model) is None
    assert load_draft_model(dataclasses.replace(settings, DRAFT_MODELS=()), model) is None
