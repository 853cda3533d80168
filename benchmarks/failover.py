"""Generations that each lose a serving process at a random moment: all must finish with the reference's text.

    python -m benchmarks.failover --fault kill --count 100
    python -m benchmarks.failover --fault stop --count 20
    python -m benchmarks.failover --fault silence --count 20     (needs root and iproute2: network namespaces)

Each generation runs over a chain of two spans, each held by several servers. The pause is the longest time between two
tokens of the generation, minus the usual time per token. With `kill`, a server's main process gets SIGKILL; with
`stop`, all its processes get SIGSTOP, with `stop-main` only the computing one; with `silence`, its host drops
everything it would send.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from swarm.client.model import SwarmModel
from swarm.local import LocalServer, LocalSwarm
from swarm.options import ServerOptions
from swarm.process import set_threads
from tests.support.hosts import Host, ServerOnHost
from tests.support.swarms import server_info
from tests.support.tiny import load_reference, make_tiny_bloom

SPANS = ("0:2", "2:4")
PROMPTS = ["The quick brown fox", "Ein Schwarm von Servern", "分散された大規模", "Nobody, said"]
TOKENS = 60  # tokens per generation
# A server of a tiny model restarts in about 8 s when two cores are otherwise idle.
BACK_TIMEOUT = 180.0  # seconds


class Fault:
    """A fault of a server, and its repair."""

    def strike(self, server: LocalServer) -> None:
        raise NotImplementedError

    def heal(self, server: LocalServer) -> None:
        """Undo the fault once the generation has finished."""


class Kill(Fault):
    def strike(self, server: LocalServer) -> None:
        server.process.kill()


class Stop(Fault):
    """SIGSTOP to the server's main process and all its descendants, p2pd included; or to the main process alone."""

    def __init__(self, whole: bool) -> None:
        self.whole = whole

    def strike(self, server: LocalServer) -> None:
        main = psutil.Process(server.process.pid)
        self.stopped = [main, *(main.children(recursive=True) if self.whole else [])]
        for process in self.stopped:
            process.suspend()

    def heal(self, server: LocalServer) -> None:
        for process in self.stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


class Silence(Fault):
    """The server's host drops everything it would send: to the others the network is silent."""

    def strike(self, server: LocalServer) -> None:
        assert isinstance(server, ServerOnHost)
        server.host.silence()

    def heal(self, server: LocalServer) -> None:
        assert isinstance(server, ServerOnHost)
        server.host.speak()


def main() -> None:
    """Run the generations and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--fault", choices=("kill", "stop", "stop-main", "silence"), default="kill")
    parser.add_argument("--count", type=int, default=20, help="generations (default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=2, help="servers of each span (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    args = parser.parse_args()
    set_threads(1)
    faults = {"kill": Kill(), "stop": Stop(whole=True), "stop-main": Stop(whole=False), "silence": Silence()}
    with contextlib.ExitStack() as stack:
        path = make_tiny_bloom(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tiny-bloom")
        numbers = range(2 * args.replicas)
        hosts = [stack.enter_context(Host(i)) if args.fault == "silence" else None for i in numbers]
        local = stack.enter_context(LocalSwarm(["/ip4/0.0.0.0/tcp/0"]))
        servers = [start_server(local, path, i, hosts[i]) for i in numbers]
        model = load_model(path, local)
        run(model, servers, path, faults[args.fault], args)
        model.close()


def start_server(local: LocalSwarm, path: Path, number: int, host: Host | None) -> LocalServer:
    """Start server ``number``; every second one has the same span. It runs on its own host, if one is given."""
    options = ServerOptions(
        str(path), blocks=SPANS[number % 2], dtype="float32", threads=1, public_name=f"server-{number}"
    )
    if host is None:
        return local.start_server(options)
    server = host.start_server(local, options)
    return server


def load_model(path: Path, local: LocalSwarm) -> SwarmModel:
    model = SwarmModel.load(str(path), local.swarm, cache_dir=path.parent, device="cpu", torch_dtype="float32")
    model.state.start(timeout=60)
    return model


def run(model: SwarmModel, servers: list[LocalServer], path: Path, fault: Fault, args: argparse.Namespace) -> None:
    """Generate, strike, compare, and report."""
    rng = random.Random(args.seed)
    reference = load_reference(path)
    pauses, equal, began = [], 0, time.monotonic()
    for number in range(args.count):
        await_servers(model, servers)
        prompt = rng.choice(PROMPTS)
        tokens, times, victim = generate(model, servers, prompt, rng.randrange(TOKENS - 1), rng, fault)
        expected = reference.generate(
            torch.tensor([model.tokenizer.encode(prompt)]), max_new_tokens=TOKENS, do_sample=False
        )[0, -len(tokens) :].tolist()
        equal += tokens == expected
        gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
        pauses.append(max(gaps) - statistics.median(gaps))
        fault.heal(victim)
        print(f"{number + 1}: {'equal' if tokens == expected else 'DIFFERENT'}, pause {pauses[-1]:.2f} s", flush=True)
    print(
        json.dumps(
            {
                "fault": args.fault,
                "generations": args.count,
                "equal": equal,
                "median_pause_s": round(statistics.median(pauses), 2),
                "worst_pause_s": round(max(pauses), 2),
                "minutes": round((time.monotonic() - began) / 60, 1),
            }
        )
    )


def await_servers(model: SwarmModel, servers: list[LocalServer]) -> None:
    """Wait until all servers are announced and answer; announcements outlive dead servers for a while."""
    names = {server.options.public_name for server in servers}
    if not model.state.wait(lambda: answering(model) >= names, BACK_TIMEOUT):
        raise SystemExit(f"of {names} only {answering(model)} came back")


def answering(model: SwarmModel) -> set[str | None]:
    """Return the names of the announced servers that answer."""
    return {view.public_name for view in model.state.servers() if server_info(model, view) is not None}


def generate(
    model: SwarmModel, servers: list[LocalServer], prompt: str, moment: int, rng: random.Random, fault: Fault
) -> tuple[list[int], list[float], LocalServer]:
    """Generate greedily; while token ``moment`` is being computed, strike one of the computing servers."""
    tokens: list[int] = []
    times = [time.monotonic()]
    with model.open_session(256) as session:
        logits = session.step(model.tokenizer.encode(prompt))
        victim = rng.choice(serving(model, servers, session.route))
        while True:
            tokens.append(int(logits.argmax()))
            times.append(time.monotonic())
            if len(tokens) == TOKENS:
                return tokens, times[1:], victim
            if len(tokens) == moment + 1:
                # From another thread, so that the fault can strike anywhere within a step.
                threading.Timer(rng.random() * 0.02, fault.strike, (victim,)).start()
            logits = session.step(tokens[-1:])


def serving(model: SwarmModel, servers: list[LocalServer], route: list[tuple[str, int, int]]) -> list[LocalServer]:
    """Return the servers that the route goes through."""
    names = {view.peer_id: view.public_name for view in model.state.servers()}
    used = {names.get(peer) for peer, _, _ in route}
    return [server for server in servers if server.options.public_name in used]


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Library threads may keep the interpreter alive; everything we started has ended.
    os._exit(0)
