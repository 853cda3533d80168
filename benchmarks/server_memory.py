"""What the memory of a server is made of: all processes of ``python -m swarm.server``, idle and after some sessions.

    python -m benchmarks.server_memory --sessions 16

Memory that several processes share counts as shares (PSS). Pages of files count once, whoever else on this machine has
them too, so that the figures are those of a server alone. Further arguments go to the server: ``-- --quant int8``.
"""

import argparse
import re
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import psutil

from config import Settings
from swarm.client.membership import Swarm
from swarm.client.model import SwarmModel
from tests.support.processes import START_TIMEOUT, running

ROW = "{:34}{:>10}{:>10}"


def main() -> None:
    """Measure; print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sessions", type=int, default=16, help="at a time (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="of each session (default: %(default)s)")
    parser.add_argument("options", nargs="*", help="of the server")
    args = parser.parse_args()
    settings = Settings.from_environment()
    name = settings.default_model
    command = [sys.executable, "-m", "swarm.server", name, "--host-maddrs", "/ip4/127.0.0.1/tcp/0", *args.options]
    with tempfile.TemporaryDirectory() as directory, running(command, Path(directory) / "log") as program:
        peer = wait_for_peer(program.log)
        report("idle", program.family())
        swarm = Swarm.join([peer])
        dtype = settings.torch_dtype()
        model = SwarmModel.load(name, swarm, cache_dir=settings.cache_dir, device="cpu", torch_dtype=dtype)
        model.state.start(timeout=START_TIMEOUT)
        threads = [threading.Thread(target=use, args=(model, args.tokens)) for _ in range(args.sessions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        report(f"after {args.sessions} sessions", program.family())
        model.close()
        swarm.close()


def wait_for_peer(log: Path) -> str:
    """Return the address by which a server is joined, once it serves."""
    waiting = threading.Event()
    for _ in range(int(START_TIMEOUT / 0.2)):
        if found := re.search(r"--initial-peers (\S+)", log.read_text()):
            return found[1]
        waiting.wait(0.2)
    raise SystemExit(f"the server did not come up:\n{log.read_text()}")


def use(model: SwarmModel, tokens: int) -> None:
    """Compute a prompt, and then token by token."""
    with model.open_session(tokens) as session:
        session.step([1] * (tokens // 2))
        for _ in range(tokens // 2):
            session.step([1])


def report(title: str, family: list[psutil.Process]) -> None:
    """Print what each process has, in MiB, and their sum."""
    print(ROW.format(f"{title}, MiB", "PSS", "its own"))
    files: Counter[tuple[str, str]] = Counter()  # by path and address
    total = 0
    for process in family:
        pss = private = 0
        for part in process.memory_maps(grouped=False):
            of_file = part.rss - part.anonymous if part.path.startswith("/") and "/dev/shm/" not in part.path else 0
            key = part.path, part.addr
            files[key] = max(files[key], of_file)
            pss += part.pss if not of_file else min(part.anonymous, part.pss)
            private += part.private_dirty
        total += pss
        name = process.name() if "p2pd" in process.name() else Path(process.cmdline()[0]).name
        print(ROW.format(f"{name} {process.pid}, child of {process.ppid()}", pss >> 20, private >> 20))
    total += sum(files.values())
    print(ROW.format("files, once", sum(files.values()) >> 20, ""))
    print(ROW.format("all", total >> 20, ""), flush=True)


if __name__ == "__main__":
    main()
