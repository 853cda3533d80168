"""Servers that die, stop or fall silent under a session: its text is the undisturbed one, token for token."""

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from transformers import BloomForCausalLM

from generation.drafting import Drafting
from generation.loop import generate
from generation.parameters import GenerationParams
from generation.text import Detokenizer
from swarm.client.model import SwarmModel
from swarm.client.session import SwarmSession
from swarm.client.terms import SessionTerms
from swarm.errors import BlocksMissing
from swarm.local import LocalServer, LocalSwarm
from tests.conftest import READY_TIMEOUT, greedy, load_model, tiny_server
from tests.support.drafts import prophecies
from tests.support.hosts import Host, can_make_hosts
from tests.support.swarms import server_info
from tests.test_session import PROMPTS, run_greedy, wait_until

TOKENS = 40
# Two servers for each half, and one with other borders: what it can replace only in part must be cut.
SPANS = ("0:2", "0:2", "2:4", "2:4", "1:3")


class Chaos:
    """A swarm whose servers have names, so that those can be hit that a session uses."""

    def __init__(self, local: LocalSwarm, model: SwarmModel) -> None:
        self.local = local
        self.model = model

    def all_back(self) -> None:
        """Wait until all servers answer; the announcements of dead ones outlive them for a while."""
        names = {server.options.public_name for server in self.local.servers}
        assert self.model.state.wait(lambda: self._answering() >= names, READY_TIMEOUT), "servers did not come back"

    def _answering(self) -> set[str | None]:
        views = self.model.state.servers()
        return {view.public_name for view in views if server_info(self.model, view) is not None}

    def serving(self, session: SwarmSession) -> list[LocalServer]:
        """The servers of the session's route, in order."""
        names = {view.peer_id: view.public_name for view in self.model.state.servers()}
        by_name = {server.options.public_name: server for server in self.local.servers}
        return [by_name[names[peer]] for peer, _, _ in session.route]

    def sample(
        self,
        params: GenerationParams,
        *,
        strike_at: int | None = None,
        index: int = 0,
        soon: bool = False,
        drafting: Drafting | None = None,
    ) -> tuple[str, list[int]]:
        """Generate an answer; return its text, and the session's tokens.

        :param strike_at: kill a server of the route after so many tokens; ``index``: which
        :param soon: a little later, while the session waits for it
        """
        tokenizer, text = self.model.tokenizer, ""
        with self.model.open_session(128) as session:
            chunks = generate(
                session,
                tokenizer.encode(params.inputs),
                params,
                budget=TOKENS,
                detokenizers=[Detokenizer(tokenizer)],
                defaults=self.model.generation_config,
                drafting=drafting,
            )
            for number, (_, chunk) in enumerate(chunks):
                text += chunk.text
                if number == strike_at:
                    victim = self.serving(session)[index].process
                    threading.Timer(0.004, victim.kill).start() if soon else victim.kill()
            return text, list(session.token_ids)


@pytest.fixture(scope="module")
def chaos(tiny_bloom: Path) -> Iterator[Chaos]:
    with LocalSwarm() as local:
        for number, blocks in enumerate(SPANS):
            options = dataclasses.replace(tiny_server(tiny_bloom, blocks), public_name=f"server-{number}")
            local.start_server(options)
        model = load_model(tiny_bloom, local, push_from=0.0)  # without, see tests/test_session.py
        yield Chaos(local, model)
        model.close()


@pytest.mark.parametrize("lost", [(0,), (1,), (0, 1)], ids=["first", "last", "both at once"])
def test_killed_servers(chaos: Chaos, reference: BloomForCausalLM, lost: tuple[int, ...]) -> None:
    chaos.all_back()
    token_ids = chaos.model.tokenizer.encode(PROMPTS[0])
    expected = greedy(reference, token_ids, TOKENS)
    with chaos.model.open_session(128) as session:
        generated = run_greedy(session, token_ids, 15)
        for server in [chaos.serving(session)[index] for index in lost]:
            server.process.kill()
        generated += run_greedy(session, generated[-1:], len(expected) - 15)
        assert generated == expected
        assert session.recoveries >= len(lost)


def test_killed_during_prefill(chaos: Chaos, reference: BloomForCausalLM) -> None:
    chaos.all_back()
    token_ids = (chaos.model.tokenizer.encode(" ".join(PROMPTS)) * 60)[:1500]
    expected = greedy(reference, token_ids, 5)
    with chaos.model.open_session(1600) as session:
        session.step(token_ids[:20])
        victim = chaos.serving(session)[-1]
        # In the time of three chunks of prefill, from another thread.
        threading.Timer(0.02, victim.process.kill).start()
        assert run_greedy(session, token_ids[20:], len(expected)) == expected


def test_sampling_goes_on_as_if_nothing_had_happened(chaos: Chaos) -> None:
    chaos.all_back()
    params = GenerationParams(
        inputs=PROMPTS[0], max_new_tokens=TOKENS, do_sample=True, temperature=0.9, top_p=0.9, seed=11
    )

    assert chaos.sample(params, strike_at=12)[0] == chaos.sample(params)[0]


@pytest.mark.parametrize("index", [0, 1])
def test_killed_during_verification(chaos: Chaos, index: int) -> None:
    """Drafts right and wrong, and a server that dies while one is being verified."""
    chaos.all_back()
    params = GenerationParams(
        inputs=PROMPTS[1], max_new_tokens=TOKENS, do_sample=True, temperature=0.9, top_p=0.9, seed=12, logprobs=1
    )
    text, token_ids = chaos.sample(params)
    drafting = prophecies(token_ids, 0.2, (3,))
    assert chaos.sample(params, strike_at=9, index=index, drafting=drafting, soon=True) == (text, token_ids)
    assert 0 < drafting.taken < drafting.drafted


def test_replacement_with_other_borders(chaos: Chaos, reference: BloomForCausalLM) -> None:
    """Of the second half only its first block is left on the server with other borders; the rest comes back later."""
    chaos.all_back()
    token_ids = chaos.model.tokenizer.encode(PROMPTS[1])
    expected = greedy(reference, token_ids, TOKENS)
    with chaos.model.open_session(128) as session:
        generated = run_greedy(session, token_ids, 10)
        for server in chaos.local.servers:
            if server.options.blocks == "0:2":
                server.process.kill()
        generated += run_greedy(session, generated[-1:], len(expected) - 10)
        assert generated == expected


def test_replacement_dies_as_well(chaos: Chaos, reference: BloomForCausalLM) -> None:
    """First one, then during the recovery the other server of the same blocks: they come back with new identities."""
    chaos.all_back()
    token_ids = chaos.model.tokenizer.encode(PROMPTS[2])
    expected = greedy(reference, token_ids, TOKENS)
    with chaos.model.open_session(128) as session:
        generated = run_greedy(session, token_ids, 10)
        first = chaos.serving(session)[-1]
        (second,) = [
            server
            for server in chaos.local.servers
            if server.options.blocks == first.options.blocks and server is not first
        ]
        peers = {peer for peer, _, _ in session.route}
        first.process.kill()
        threading.Timer(0.05, second.process.kill).start()
        generated += run_greedy(session, generated[-1:], len(expected) - 10)
        assert generated == expected
        assert {peer for peer, _, _ in session.route} != peers


@pytest.mark.parametrize("whole", [True, False], ids=["all its processes", "only the one that computes"])
def test_stopped_server(chaos: Chaos, reference: BloomForCausalLM, whole: bool) -> None:
    chaos.all_back()
    token_ids = chaos.model.tokenizer.encode(PROMPTS[3])
    expected = greedy(reference, token_ids, TOKENS)
    with chaos.model.open_session(128) as session:
        generated = run_greedy(session, token_ids, 10)
        main = psutil.Process(chaos.serving(session)[0].process.pid)
        stopped = [main, *(main.children(recursive=True) if whole else [])]
        for process in stopped:
            process.suspend()
        try:
            generated += run_greedy(session, generated[-1:], len(expected) - 10)
            assert generated == expected
            assert session.recoveries > 0
        finally:
            for process in stopped:
                process.resume()


def test_slow_but_living_server_is_not_given_up(model: SwarmModel, reference: BloomForCausalLM) -> None:
    """However often a late server is asked, while it answers it may take its time."""
    token_ids = model.tokenizer.encode(PROMPTS[0])
    expected = greedy(reference, token_ids, 10)
    impatient = dataclasses.replace(model.limits, probe_after=0.0005)
    with SwarmSession(model.head, SessionTerms(model.state, impatient, model.budget, 64)) as session:
        assert run_greedy(session, token_ids, len(expected)) == expected
        assert session.recoveries == 0


def test_blocks_that_stay_away(tiny_bloom: Path, reference: BloomForCausalLM) -> None:
    """All servers of some blocks are gone: a typed error after the limit; the session goes on when they are back."""
    with LocalSwarm() as local:
        local.start_server(tiny_server(tiny_bloom, "0:2"))
        lost = local.start_server(tiny_server(tiny_bloom, "2:4"))
        model = load_model(tiny_bloom, local, recovery_timeout=2.0)
        token_ids = model.tokenizer.encode(PROMPTS[0])
        expected = greedy(reference, token_ids, 20)
        with model.open_session(64) as session:
            generated = run_greedy(session, token_ids, 10)
            lost.close()
            with pytest.raises(BlocksMissing, match="no server holds blocks 2-3 of") as error:
                session.step(generated[-1:])
            assert error.value.blocks == (2, 3)
            local.start_server(tiny_server(tiny_bloom, "2:4"))
            wait_until(lambda: not model.state.wait(lambda: False, 0.2) and not model.state.missing_blocks(), "", 60)
            logits = session.step()  # the token that could not be processed was kept
            generated.append(int(logits.argmax()))
            generated += run_greedy(session, generated[-1:], len(expected) - 11)
            assert generated == expected
        model.close()


@pytest.mark.skipif(not can_make_hosts(), reason="needs root and iproute2 to make network namespaces")
def test_silent_network(tiny_bloom: Path, reference: BloomForCausalLM) -> None:
    with Host(0) as first, Host(1) as second, LocalSwarm(["/ip4/0.0.0.0/tcp/0"]) as local:
        hosts = {f"server-{number}": host for number, host in enumerate((first, second))}
        for name, host in hosts.items():
            host.start_server(local, dataclasses.replace(tiny_server(tiny_bloom, "0:4"), public_name=name))
        model = load_model(tiny_bloom, local)
        chaos = Chaos(local, model)
        chaos.all_back()
        token_ids = model.tokenizer.encode(PROMPTS[0])
        expected = greedy(reference, token_ids, TOKENS)
        with model.open_session(128) as session:
            generated = run_greedy(session, token_ids, 10)
            (server,) = chaos.serving(session)
            host = hosts[server.options.public_name or ""]
            host.silence()
            try:
                generated += run_greedy(session, generated[-1:], len(expected) - 10)
            finally:
                host.speak()
            assert generated == expected
            assert session.recoveries == 1
        model.close()
