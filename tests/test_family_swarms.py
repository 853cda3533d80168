"""Whole swarms of some families, against plain Transformers. ``FAMILIES=all`` tries every one, which takes minutes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from generation.loop import generate
from generation.parameters import GenerationParams
from generation.text import Detokenizer
from swarm.client.model import SwarmModel
from swarm.local import LocalSwarm
from tests.conftest import greedy, load_model, tiny_server
from tests.support.families import VARIANTS, chosen, make_tiny_family
from tests.test_generation import ReferenceSession
from tests.test_session import PROMPTS, in_threads, run_greedy

# Compiled loops; and experts, sinks, and windows of some layers.
USUAL = ("qwen3", "gpt_oss")
TOKENS = 40


@dataclass
class Served:
    """A family's swarm, its client, and plain Transformers."""

    local: LocalSwarm
    model: SwarmModel
    reference: PreTrainedModel


@pytest.fixture(scope="module", params=chosen(VARIANTS, USUAL))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A chain of two servers."""
    path: Path = make_tiny_family(tmp_path_factory.mktemp("family") / request.param, request.param)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with LocalSwarm() as local:
        local.start_server(tiny_server(path, "0:2"))
        local.start_server(tiny_server(path, "2:4"))
        model = load_model(path, local)
        yield Served(local, model, reference)
        model.close()


def test_greedy_sessions_at_once(served: Served) -> None:
    prompts = [served.model.tokenizer.encode(prompt) for prompt in PROMPTS[:4]] * 4
    expected = [greedy(served.reference, token_ids, TOKENS) for token_ids in prompts[:4]] * 4
    results: list[list[int]] = [[] for _ in prompts]

    def work(i: int) -> None:
        with served.model.open_session(256) as session:
            results[i] = run_greedy(session, prompts[i], len(expected[i]))

    in_threads(work, len(prompts), timeout=60)
    assert results == expected


def test_seeded_sampling_and_log_probabilities(served: Served) -> None:
    params = GenerationParams(
        inputs=PROMPTS[1], max_new_tokens=TOKENS, do_sample=True, temperature=0.9, top_p=0.9, seed=11, logprobs=3
    )
    texts: list[str] = []
    logprobs: list[list[float]] = []
    with served.model.open_session(256) as session:
        sources: tuple[Any, Any] = (session, ReferenceSession(served.reference))
        for source in sources:
            chunks = [
                chunk
                for _, chunk in generate(
                    source,
                    served.model.tokenizer.encode(params.inputs),
                    params,
                    budget=TOKENS,
                    detokenizers=[Detokenizer(served.model.tokenizer)],
                    defaults=served.model.generation_config,
                )
            ]
            texts.append("".join(chunk.text for chunk in chunks))
            logprobs.append([chunk.logprob.logprob for chunk in chunks if chunk.logprob is not None])
    assert texts[0] == texts[1]
    assert logprobs[0] and logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


def test_a_killed_server_and_petals_own_path(served: Served) -> None:
    """Another server takes over in mid-answer, which computes with petals' runtime."""
    token_ids = served.model.tokenizer.encode(PROMPTS[2])
    expected = greedy(served.reference, token_ids, TOKENS)
    victim = served.local.servers[1]
    with served.model.open_session(256) as session:
        generated = run_greedy(session, token_ids, 10)
        served.local.start_server(tiny_server(Path(victim.options.model), "2:4", batching=False))
        assert served.model.state.wait(lambda: len(served.model.state.servers()) == 3, 60)
        victim.process.kill()
        generated += run_greedy(session, generated[-1:], len(expected) - 10)
        assert generated == expected
        assert session.recoveries
