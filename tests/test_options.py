"""The options of a server: what a program writes as a command line is what the server reads."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from petals.utils.convert_block import QuantType

from swarm.local import LocalServer
from swarm.options import ServerOptions, flag, parse_args
from tests.support.processes import ROOT
from tests.test_multiaddr import PEER

ROWS = {row.name: row for row in dataclasses.fields(ServerOptions) if row.name != "model"}
# A value other than the default for each option.
OTHERS: dict[str, Any] = {
    "initial_peers": (PEER, PEER.replace("/ip4/192.0.2.1/", "/dns/x/")),
    "blocks": "0:10",
    "num_blocks": 3,
    "host_maddrs": ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0"),
    "announce_maddrs": ("/ip4/192.0.2.2/tcp/1",),
    "identity_path": "some file",
    "public_name": "some name",
    "dht_prefix": "prefix",
    "device": "cuda:1",
    "dtype": "bfloat16",
    "quant": "nf4",
    "attn_cache_tokens": 65536,
    "inference_max_length": 4096,
    "num_handlers": 4,
    "throughput": 0.5,
    "idle_timeout": 0.1,
    "update_period": 1e-3,
    "threads": 2,
    "cache_dir": Path("some/folder"),
    "batching": False,
    "end_with_parent": True,
    "quiet": True,
}
MADDR = "/ip4/192.0.2.1/tcp/31330"
NO_MADDRS = [
    "",
    "192.0.2.1:31330",
    "/",
    "/ip4",
    "/ip4/192.0.2.1/tcp",
    "/ip4/192.0.2.1/tcp/",
    "/ip4/192.0.2.1/tcp/x",
    "/ip4/192.0.2.1/tcp/65536",
    "/ip4/192.0.2.1/udp/100000/quic",
    "/ip4/192.0.2.256/tcp/1",
    "/ip4/::1/tcp/1",
    "/ip6/192.0.2.1/tcp/1",
    "/ip5/192.0.2.1/tcp/1",
]


@pytest.mark.parametrize("name", ROWS)
def test_an_option_comes_back_from_the_command_line(name: str) -> None:
    options = ServerOptions("some/model", **{name: OTHERS[name]})
    assert flag(ROWS[name]) in options.arguments()
    parsed = parse_args(options.arguments())
    assert parsed == options and type(getattr(parsed, name)) is type(OTHERS[name])


def test_all_options_come_back_from_the_command_line() -> None:
    options = ServerOptions("some/model", **OTHERS | {"num_blocks": None})  # which do not go with blocks
    assert parse_args(options.arguments()) == options
    options = ServerOptions("some/model", **OTHERS)
    assert [word for word in options.arguments() if word.startswith("--")] == [flag(row) for row in ROWS.values()]


def test_what_is_not_said_has_its_default() -> None:
    assert ServerOptions("some/model").arguments() == ["some/model"]
    assert parse_args(["some/model"]) == ServerOptions("some/model")
    assert parse_args(["some/model", "--initial-peers"]) == ServerOptions("some/model")


def test_help_tells_all_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(["--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for row in ROWS.values():
        assert flag(row) in help_text and row.metadata["help"].replace("%(default)s", str(row.default)) in help_text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: model"),
        (["some/model", "--num-blocks", "many"], "argument --num-blocks: invalid int value: 'many'"),
        (["some/model", "--idle-timeout", "long"], "argument --idle-timeout: invalid float value: 'long'"),
        (["some/model", "--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
        (["some/model", "--host-maddrs"], "argument --host-maddrs: expected at least one argument"),
        (
            ["some/model", "--host-maddrs", "0.0.0.0"],
            "0.0.0.0 is not a multiaddr with a port from 0 (any) to 65535: it must begin with /",
        ),
        (
            ["some/model", "--initial-peers", "public", "/ip4/192.0.2.1/tcp/1"],
            "it must end with /p2p/ and the peer's id",
        ),
        (
            ["some/model", "--announce-maddrs", "/dns/x/tcp/0"],
            "others cannot connect to port 0",
        ),
        (["some/model", "--batching"], "unrecognized arguments: --batching"),
        (["some/model", "--blocks", "0:3", "--num-blocks", "3"], "argument --num-blocks: not allowed with --blocks"),
        (["some/model", "--initial-peers", "public", PEER], "argument --initial-peers: 'public' stands alone"),
    ],
)
def test_mistakes_are_reported(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("blocks", ["3", "3:3", "4:3", "-1:3", "a:b", "0:3:4", ":3", ""], "START:END"),
        ("num-blocks", ["0", "-1"], "a whole number from 1"),
        ("attn-cache-tokens", ["0", "-65536"], "a whole number from 1"),
        ("inference-max-length", ["0", "-1"], "a whole number from 1"),
        ("num-handlers", ["0", "-2"], "a whole number from 1"),
        ("threads", ["0", "-1"], "a whole number from 1"),
        ("throughput", ["0", "-0.5", "nan", "inf"], "a number greater than 0"),
        ("idle-timeout", ["0", "-1e3", "nan", "inf"], "a number greater than 0"),
        ("update-period", ["0", "-1", "nan", "inf"], "a number greater than 0"),
        ("dht-prefix", ["a.b", "a b", ""], "a name without dots and spaces"),
        (
            "host-maddrs",
            ["/ip4/0.0.0.0/tcp/65536", "/ip4/0.0.0.0/tcp/-1", *NO_MADDRS],
            "a multiaddr with a port from 0",
        ),
        ("announce-maddrs", ["/ip4/192.0.2.1/tcp/0", *NO_MADDRS], "a multiaddr with a port from 1 to 65535"),
        ("initial-peers", ["/ip4/192.0.2.1/tcp/0", "Public", *NO_MADDRS], "'public' or a multiaddr"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    name: str, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one sentence, before anything is loaded."""
    for word in words:
        with pytest.raises(SystemExit) as ended:
            parse_args(["some/model", f"--{name}={word}"])
        error = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2 and f"error: argument --{name}: {word} is not {told}" in error


def test_every_number_and_address_has_bounds() -> None:
    unbounded = {name for name, row in ROWS.items() if row.metadata["bounds"] is None and not row.metadata["choices"]}
    texts = {"identity_path", "public_name", "device", "cache_dir"}
    assert unbounded == texts | {name for name, row in ROWS.items() if isinstance(row.default, bool)}


def test_multiaddrs_are_known() -> None:
    """Each flag takes what can be meant there; tests/test_multiaddr.py has more."""
    listened, announced = "/ip6/::1/tcp/0/ws", "/dns4/swarm.example/tcp/31337"
    words = ["--initial-peers", PEER, "--host-maddrs", listened, "--announce-maddrs", announced]
    parsed = parse_args(["some/model", *words])
    assert (parsed.initial_peers, parsed.host_maddrs, parsed.announce_maddrs) == ((PEER,), (listened,), (announced,))


def test_weights_can_be_quantised_as_petals_can() -> None:
    assert {kind.name.lower() for kind in QuantType} < set(ROWS["quant"].metadata["choices"])


@pytest.mark.parametrize("host_maddrs", [(), ("/ip4/0.0.0.0/tcp/0",)])
def test_an_embedded_server_listens_on_this_machine_only(host_maddrs: tuple[str, ...]) -> None:
    """Unless it is told otherwise. It is quiet, and ends with the program."""
    server = LocalServer.__new__(LocalServer)  # is not started
    server.options, server._initial_peers = ServerOptions("some/model", host_maddrs=host_maddrs), [PEER]
    words = server.command()
    parsed = parse_args(words[words.index("swarm.server") + 1 :])
    assert parsed.host_maddrs == (host_maddrs or ("/ip4/127.0.0.1/tcp/0",))
    assert parsed.initial_peers == (PEER,) and parsed.quiet and parsed.end_with_parent


def test_options_cost_nothing_to_import() -> None:
    program = (
        "import swarm.options, sys; sys.exit(bool({'torch', 'petals', 'hivemind', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0
