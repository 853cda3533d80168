"""The options of a server: one row each. Both the command line and the command that starts a server follow from it."""

import argparse
import dataclasses
import math
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from swarm.multiaddr import check_announced, check_listening, check_peer

Value = TypeVar("Value")


@dataclass(frozen=True)
class Bounds:
    """What a word of an option may be."""

    words: str  # as in "-1 is not WORDS"
    hold: Callable[[Any], bool] = lambda value: True
    check: Callable[[str], None] = lambda word: None  # raises ValueError for a wrong word, saying what is wrong with it


def is_range(text: str) -> bool:
    """Whether a text names blocks [START, END), of which there is one at least."""
    found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)
    return found is not None and int(found[1]) < int(found[2])


COUNT = Bounds("a whole number from 1", lambda value: value >= 1)
POSITIVE = Bounds("a number greater than 0", lambda value: 0 < value < math.inf)
BLOCKS = Bounds("START:END with START below END, such as 0:10", is_range)
PREFIX = Bounds("a name without dots and spaces", lambda value: re.fullmatch(r"[^.\s]+", value) is not None)
MADDR = Bounds("a multiaddr with a port from 1 to 65535, such as /ip4/192.0.2.1/tcp/31330", check=check_announced)
PEER = Bounds("'public' or a multiaddr that ends with the peer's id, as peers log theirs", check=check_peer)
LISTENED = Bounds("a multiaddr with a port from 0 (any) to 65535", check=check_listening)


def option(
    default: Value,
    description: str,
    *,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    nargs: str | None = None,
    bounds: Bounds | None = None,
) -> Value:
    """Make a row of ``ServerOptions``.

    :param bounds: of each word; the other parameters are those of ``argparse``
    """
    metadata = {"help": description, "metavar": metavar, "choices": choices, "nargs": nargs, "bounds": bounds}
    row: Any = dataclasses.field(default=default, metadata=metadata)  # a type checker sees the default
    return row


@dataclass(frozen=True)
class ServerOptions:
    """What a server is started with. The names of the rows are the flags; see ``flag``."""

    model: str = dataclasses.field(metadata={"help": "hub name, local directory, or the name of the bundled model"})
    initial_peers: tuple[str, ...] = option(
        (), "peers to join, or 'public'; none: a new swarm", nargs="*", metavar="MADDR", bounds=PEER
    )
    blocks: str | None = option(
        None,
        "blocks [START, END) to serve; default: all (CPU), as many as fit (GPU)",
        metavar="START:END",
        bounds=BLOCKS,
    )
    num_blocks: int | None = option(
        None, "serve this many blocks, chosen where the swarm needs them most", bounds=COUNT
    )
    # The command line listens on all addresses by default, the embedded swarm on this machine's own.
    host_maddrs: tuple[str, ...] = option(
        (), "addresses to listen on; default: all", nargs="+", metavar="MADDR", bounds=LISTENED
    )
    announce_maddrs: tuple[str, ...] = option(
        (), "addresses to announce, if others see different ones", nargs="+", metavar="MADDR", bounds=MADDR
    )
    identity_path: str | None = option(
        None, "private key file that keeps the peer id the same over restarts", metavar="FILE"
    )
    public_name: str | None = option(None, "a name to show to others")
    dht_prefix: str | None = option(
        None, "prefix of the blocks' keys; must be the same on all servers and clients of a model", bounds=PREFIX
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; default: by what the machine has")
    dtype: str | None = option(
        None, "default: by what the machine has", choices=("auto", "float32", "bfloat16", "float16")
    )
    quant: str | None = option(
        None,
        "quantise the weights; auto: without loss, or to 16 bits; default: auto on a CPU, unless --dtype is given",
        choices=("none", "auto", "int8", "int4", "nf4"),
    )
    attn_cache_tokens: int | None = option(
        None, "attention cache for N tokens of each block", metavar="N", bounds=COUNT
    )
    inference_max_length: int | None = option(None, "longest session to accept, in tokens", metavar="N", bounds=COUNT)
    # More processes than cores only take turns.
    num_handlers: int = option(2, "processes that take requests (default: %(default)s)", bounds=COUNT)
    throughput: float | None = option(
        None, "announced throughput; default: measured (public) or 1 (private)", bounds=POSITIVE
    )
    # Between two steps of one session. Attention cache is for those who use it. The app keeps idle sessions for
    # SESSION_TIMEOUT, 300 s by default, and those that wait for their client to come back for RESUME_TIMEOUT, 60 s,
    # longer; with a minute more, the client decides.
    idle_timeout: float = option(
        420.0, "end sessions that are idle for so long (default: %(default)s)", metavar="SECONDS", bounds=POSITIVE
    )
    update_period: float | None = option(None, "how often to announce the blocks", metavar="SECONDS", bounds=POSITIVE)
    threads: int | None = option(None, "threads of PyTorch's operators; default: one per core", bounds=COUNT)
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
        form: dict[str, Any] = {"dest": row.name, "default": row.default, "help": row.metadata["help"]}
        if isinstance(row.default, bool):
            parser.add_argument(flag(row), action="store_false" if row.default else "store_true", **form)
        else:
            form |= {name: row.metadata[name] for name in ("metavar", "choices", "nargs")}
            parser.add_argument(flag(row), type=_reader(row, _word_type(types[row.name])), **form)
    given = vars(parser.parse_args(argv)).items()
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given}
    options = ServerOptions(**values)
    if wrong := misfit(options):
        parser.error(wrong)
    return options


def misfit(options: ServerOptions) -> str | None:
    """Return how options, each of which may be, do not fit each other; None if they do."""
    if options.blocks is not None and options.num_blocks is not None:
        return "argument --num-blocks: not allowed with --blocks, which names them"
    if "public" in options.initial_peers and len(options.initial_peers) > 1:
        return "argument --initial-peers: 'public' stands alone"
    return None


def _reader(row: "dataclasses.Field[Any]", kind: type) -> Callable[[str], Any]:
    """Return what reads a word of an option."""
    bounds: Bounds | None = row.metadata["bounds"]

    def read(word: str) -> Any:
        value = kind(word)
        if bounds is None:
            return value
        if not bounds.hold(value):
            raise argparse.ArgumentTypeError(f"{word} is not {bounds.words}")
        try:
            bounds.check(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{word} is not {bounds.words}: {error}") from None
        return value

    read.__name__ = kind.__name__  # argparse tells it of a word that is none
    return read


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
