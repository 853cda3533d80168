"""Drafts over real servers: what is verified, and that servers and warm sessions keep accepted tokens only."""

import math
from collections.abc import Iterable, Sequence

import pytest
import torch
from transformers import BloomForCausalLM, PreTrainedTokenizerBase

import swarm.client.span
from generation.drafting import Drafting
from generation.loop import Chunk, generate
from generation.parameters import GenerationParams
from generation.text import Detokenizer
from swarm.client.model import SwarmModel
from swarm.client.session import DRAFT_ROWS, SwarmSession
from swarm.client.span import Span
from swarm.client.warm_sessions import WarmSessions
from swarm.errors import Cancelled
from tests.support.drafts import prophecies
from tests.support.waiters import Canceller
from tests.test_session import PROMPTS, infos


def drafted(
    model: SwarmModel,
    session: SwarmSession,
    token_ids: Sequence[int],
    params: GenerationParams,
    drafting: Drafting | None,
) -> list[Chunk]:
    assert params.max_new_tokens is not None
    chunks = generate(
        session,
        token_ids,
        params,
        budget=params.max_new_tokens,
        detokenizers=[Detokenizer(model.tokenizer)],
        defaults=model.generation_config,
        drafting=drafting,
    )
    return [chunk for _, chunk in chunks]


@torch.inference_mode()
def logits_after(reference: BloomForCausalLM, token_ids: Sequence[int], count: int) -> list[torch.Tensor]:
    return list(reference(torch.tensor([list(token_ids)])).logits[0, -count:])


def close(found: Iterable[object], wanted: Sequence[torch.Tensor]) -> None:
    torch.testing.assert_close(list(found), list(wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 5, DRAFT_ROWS + 3])
def test_logits_after_each_token_of_a_draft(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, size: int
) -> None:
    token_ids, draft = tokenizer.encode(PROMPTS[0]), [(7 * i) % 400 + 5 for i in range(size)]
    with model.open_session(64) as session:
        assert not session.can_verify  # nobody knows yet whether the servers can go back
        session.step(token_ids)
        assert session.can_verify
        session.append([9])
        close(session.verify(draft), logits_after(reference, [*token_ids, 9, *draft], size + 1))
        assert session.token_ids == [*token_ids, 9]
        assert session.position == len(token_ids) + 1


@pytest.mark.parametrize("taken", range(5))
def test_what_is_not_taken_is_forgotten(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, taken: int
) -> None:
    token_ids, draft = tokenizer.encode(PROMPTS[1]), [11, 12, 13, 14]
    with model.open_session(64) as session:
        session.step(token_ids)
        session.append([9])
        before = [info["inference_tokens"] for info in infos(model)]
        list(session.verify(draft))
        session.append([*draft[:taken], 77])
        assert session.position == len(token_ids) + 1 + taken
        close([session.step()], logits_after(reference, session.token_ids, 1))
        close(session.verify([5, 6]), logits_after(reference, [*session.token_ids, 5, 6], 3))
        received = [info["inference_tokens"] - count for info, count in zip(infos(model), before, strict=True)]
        assert received == [5 + 1 + 3] * 2  # nothing was computed again, but the last token
        session.append([8])
        session.step()
        histories = [span.history.length for span in session._chain.spans]
        assert histories == [session.position] * 2 == [len(session.token_ids)] * 2


def test_truncated_after_a_draft(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    token_ids = tokenizer.encode(PROMPTS[0])
    with model.open_session(64) as session:
        session.step(token_ids)
        session.append([9])
        list(session.verify([11, 12, 13]))
        session.append([11])
        session.truncate(len(token_ids) + 2)  # all that it has
        close([session.step()], logits_after(reference, [*token_ids, 9, 11], 1))
        list(session.verify([12, 13]))
        session.truncate(len(token_ids))
        close([session.step([5])], logits_after(reference, [*token_ids, 5], 1))


def test_warm_sessions_hold_accepted_tokens(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    token_ids = tokenizer.encode(PROMPTS[0])
    memory = WarmSessions(4, 1000, 60.0)
    session = model.open_session(64)
    session.step(token_ids)
    session.append([9])
    list(session.verify([11, 12, 13]))
    session.append([11, 44])
    memory.keep("it", "me", session)
    wanted = [*token_ids, 9, 11, 12, 13, 14]  # as drafted, and refused
    found = memory.take("it", "me", wanted, 64)
    assert found is session and found.token_ids == [*token_ids, 9, 11]
    assert found.position == len(found.token_ids)
    close([found.step(wanted[len(found.token_ids) :])], logits_after(reference, wanted, 1))
    memory.close()
    found.close()


def test_draft_that_does_not_fit(model: SwarmModel, reference: BloomForCausalLM) -> None:
    with model.open_session(8) as session:
        session.step([5, 6, 7])
        session.append([8])
        close(session.verify([9] * 4), logits_after(reference, [5, 6, 7, 8, 9, 9, 9, 9], 5))
        close(session.verify([9] * 5), logits_after(reference, [5, 6, 7, 8], 1))  # it is left out


def test_cancelled_verification(
    model: SwarmModel, reference: BloomForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    canceller = Canceller()
    canceller.cancel()
    with model.open_session(64) as session:
        session.step([5, 6, 7])
        session.append([8])
        with monkeypatch.context() as patch:
            patch.setattr("swarm.client.session.CANCEL_POLL", 1e-9)
            with pytest.raises(Cancelled):
                next(session.verify([9, 10], waiter=canceller))
        assert (session.position, session.token_ids) == (0, [5, 6, 7, 8])
        session.append([9])
        close([session.step()], logits_after(reference, [5, 6, 7, 8, 9], 1))


@pytest.mark.parametrize("lost", [0, 1])
def test_server_is_lost_in_a_verification(model: SwarmModel, reference: BloomForCausalLM, lost: int) -> None:
    """It comes back with the inputs it had received; without them, from the tokens, and the draft is not tried."""
    for has_history in (True, False):
        with model.open_session(64) as session:
            session.step([5, 6, 7])
            list(session.verify([11, 12]))
            session.append([11, 8])
            if not has_history:
                session.drop_history()
            span = session._chain.spans[lost]
            assert isinstance(span, Span)
            assert span._stream._writer is not None
            span._stream._writer.close()
            expected = logits_after(reference, [5, 6, 7, 11, 8, 9, 10], 3)
            found = list(session.verify([9, 10]))
            close(found, expected if has_history else expected[:1])
            assert session.recoveries == 1
            session.append([9, 3])
            close([session.step()], logits_after(reference, [5, 6, 7, 11, 8, 9, 3], 1))


@pytest.mark.parametrize("lies", [0.0, 0.3])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "seed": 5}])
def test_answers_are_the_same(
    model: SwarmModel, tokenizer: PreTrainedTokenizerBase, sampling: dict[str, float], lies: float
) -> None:
    token_ids = tokenizer.encode(PROMPTS[3])
    params = GenerationParams(max_new_tokens=40, **sampling)  # type: ignore[arg-type]
    with model.open_session(64) as session:
        wanted = drafted(model, session, token_ids, params, None)
        text = list(session.token_ids)
    drafting = prophecies(text, lies)
    with model.open_session(64) as session:
        assert drafted(model, session, token_ids, params, drafting) == wanted
        assert session.token_ids == text and drafting.taken > 10


@pytest.mark.parametrize(("trip", "verifies"), [(0.001, False), (0.05, True), (math.inf, False)])
def test_near_servers_that_round_are_sent_no_drafts(
    model: SwarmModel, monkeypatch: pytest.MonkeyPatch, trip: float, verifies: bool
) -> None:
    """So that the same request has the same answer."""
    monkeypatch.setitem(swarm.client.span.HALVES, "float32", torch.float32)
    monkeypatch.setattr(model.state, "round_trip", lambda peer_id: trip)
    with model.open_session(32) as session:
        session.step([5, 6, 7])
        assert session.can_verify == verifies


def test_rows_are_not_verified(model: SwarmModel) -> None:
    with model.open_session(32, rows=2) as session:
        session.step([5, 6, 7])
        assert not session.can_verify
