"""The options of a server: one row each. Both the command line and the command that starts a server follow from it."""

import argparse
import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from swarm.multiaddr import check_announced, check_listening, check_peer

Value = TypeVar("Value")


def option(
    default: Value,
    description: str,
    *,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    nargs: str | None = None,
    check: Callable[[str], None] | None = None,
) -> Value:
    """Make a row of ``ServerOptions``. The parameters are those of ``argparse``, but for one.

    :param check: raises ValueError for a word that is wrong, saying why
    """
    metadata = {"help": description, "metavar": metavar, "choices": choices, "nargs": nargs, "check": check}
    row: Any = dataclasses.field(default=default, metadata=metadata)  # a type checker sees the default
    return row


@dataclass(frozen=True)
class ServerOptions:
    """What a server is started with. The names of the rows are the flags; see ``flag``."""

    model: str = dataclasses.field(metadata={"help": "hub name, local directory, or the name of the bundled model"})
    initial_peers: tuple[str, ...] = option(
        (), "peers to join, or 'public'; none: a new swarm", nargs="*", metavar="MADDR", check=check_peer
    )
    blocks: str | None = option(
        None, "blocks [START, END) to serve; default: all (CPU), as many as fit (GPU)", metavar="START:END"
    )
    num_blocks: int | None = option(None, "serve this many blocks, chosen where the swarm needs them most")
    # The command line listens on all addresses by default, the embedded swarm on this machine's own.
    host_maddrs: tuple[str, ...] = option(
        (), "addresses to listen on; default: all", nargs="+", metavar="MADDR", check=check_listening
    )
    announce_maddrs: tuple[str, ...] = option(
        (), "addresses to announce, if others see different ones", nargs="+", metavar="MADDR", check=check_announced
    )
    identity_path: str | None = option(
        None, "private key file that keeps the peer id the same over restarts", metavar="FILE"
    )
    public_name: str | None = option(None, "a name to show to others")
    dht_prefix: str | None = option(
        None, "prefix of the blocks' keys; must be the same on all servers and clients of a model"
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; default: by what the machine has")
    dtype: str | None = option(
        None, "default: by what the machine has", choices=("auto", "float32", "bfloat16", "float16")
    )
    quant: str = option("none", "quantise the weights", choices=("none", "int8", "nf4"))
    attn_cache_tokens: int | None = option(None, "attention cache for N tokens of each block", metavar="N")
    inference_max_length: int | None = option(None, "longest session to accept, in tokens", metavar="N")
    # More processes than cores only take turns.
    num_handlers: int = option(2, "processes that take requests (default: %(default)s)")
    throughput: float | None = option(None, "announced throughput; default: measured (public) or 1 (private)")
    # Between two steps of one session. Attention cache is for those who use it. The app keeps idle sessions for
    # SESSION_TIMEOUT, 300 s by default, and those that wait for their client to come back for RESUME_TIMEOUT, 60 s,
    # longer; with a minute more, the client decides.
    idle_timeout: float = option(420.0, "end sessions that are idle for so long", metavar="SECONDS")
    update_period: float | None = option(None, "how often to announce the blocks", metavar="SECONDS")
    threads: int | None = option(None, "threads of PyTorch's operators; default: one per core")
    cache_dir: Path | None = option(None, "where prepared models are kept")
    batching: bool = option(True, "compute one session's step at a time, as petals")
    end_with_parent: bool = option(False, "stop when standard input ends")
    quiet: bool = option(False, "log warnings and errors only")

    def arguments(self) -> list[str]:
        """Return the command line for these options: what ``parse_args`` makes the same options of."""
        words = [self.model]
        for row in dataclasses.fields(self)[1:]:
            value = getattr(self, row.name)
            if value == row.default:
                continue
            words.append(flag(row))
            if isinstance(value, tuple):
                words += value
            elif not isinstance(value, bool):
                words.append(str(value))
        return words


def flag(row: "dataclasses.Field[Any]") -> str:
    """Return the flag of a row. That of an option that is on by default turns it off."""
    return ("--no-" if row.default is True else "--") + row.name.replace("_", "-")


def parse_args(argv: Sequence[str] | None = None) -> ServerOptions:
    """Parse the command line. What is wrong with it ends the program, as is usual, with status 2."""
    parser = argparse.ArgumentParser(prog="python -m swarm.server", description="Serve blocks of a model to a swarm.")
    model, *rows = dataclasses.fields(ServerOptions)
    parser.add_argument(model.name, **model.metadata)
    types = typing.get_type_hints(ServerOptions)
    for row in rows:
        form: dict[str, Any] = {"dest": row.name, "default": row.default}
        if isinstance(row.default, bool):
            action = "store_false" if row.default else "store_true"
            parser.add_argument(flag(row), action=action, help=row.metadata["help"], **form)
        else:
            words = {name: value for name, value in row.metadata.items() if name != "check"}
            kind = _checked(row.metadata["check"]) if row.metadata["check"] else _word_type(types[row.name])
            parser.add_argument(flag(row), type=kind, **form, **words)
    given = vars(parser.parse_args(argv)).items()
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given}
    return ServerOptions(**values)


def _checked(check: Callable[[str], None]) -> Callable[[str], str]:
    """Return what argparse turns each word of an option into: itself, if it is right."""

    def read(word: str) -> str:
        try:
            check(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{word}: {error}") from None
        return word

    return read


def _word_type(hint: Any) -> type:
    """Return what each word of an option is turned into: ``int`` for ``int | None``, ``str`` for a tuple of them."""
    return next(kind for kind in (hint, *typing.get_args(hint)) if kind in (int, float, str, Path))
