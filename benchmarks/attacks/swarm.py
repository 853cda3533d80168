"""Attacks on the swarm: parts of it that die, and members that mean harm."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import swarm.compat  # noqa: F401

import psutil
from hivemind import MSGPackSerializer
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import PeerID
from hivemind.p2p.servicer import ServicerBase
from hivemind.proto import dht_pb2
from hivemind.utils.timed_storage import get_dht_time

from benchmarks.attacks.target import OPEN, Target, attack
from config import Settings
from swarm import weights
from tests.support import evil

# A part that died is noticed, replaced, and computing again: a server within 5 s, the app's membership within 10. The
# bystanders' answers go on by themselves meanwhile.
RECOVERY_LIMIT = 15.0  # seconds
SETTLING = 12.0  # seconds to look for what comes after
# What is announced is soon believed, and each question asks the servers anew.
QUICK = {**OPEN, "UPDATE_PERIOD": "1", "WARM_SESSIONS": "0"}
BELIEVED = 3.0  # seconds after which it is


def is_daemon(process: psutil.Process) -> bool:
    return process.name().startswith("p2pd")


def is_server(process: psutil.Process) -> bool:
    return "-m swarm.server " in " ".join(process.cmdline())


def app_parts(target: Target) -> tuple[psutil.Process, psutil.Process]:
    """Return the app's DHT process and its p2pd."""
    dht = next(child for child in target.worker.children() if not is_server(child) and find_daemon(child))
    return dht, find_daemon(dht)[0]


def find_daemon(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child for child in process.children() if is_daemon(child)]
    return []


def server_parts(target: Target) -> dict[str, psutil.Process]:
    """Return the processes of the embedded server by what they do."""
    server = next(child for child in target.worker.children(recursive=True) if is_server(child))
    dht = next(child for child in server.children() if find_daemon(child))
    handlers = [child for child in server.children() if child != dht and not is_helper(child)]
    return {"server": server, "dht": dht, "daemon": find_daemon(dht)[0], "handler": handlers[0]}


def is_helper(process: psutil.Process) -> bool:
    """Whether it is one of Python's or PyTorch's own."""
    line = " ".join(process.cmdline())
    return "resource_tracker" in line or "torch_shm" in line


@attack("the app's DHT process is killed", answer_limit=RECOVERY_LIMIT)
def app_dht(target: Target) -> str | None:
    app_parts(target)[0].kill()
    return served_again(target)


@attack("the app's p2pd is killed", answer_limit=RECOVERY_LIMIT)
def app_daemon(target: Target) -> str | None:
    app_parts(target)[1].kill()
    return served_again(target)


@attack("a server is killed", answer_limit=RECOVERY_LIMIT)
def server(target: Target) -> str | None:
    server_parts(target)["server"].kill()
    return served_again(target)


@attack("a server's DHT process is killed", answer_limit=RECOVERY_LIMIT)
def server_dht(target: Target) -> str | None:
    server_parts(target)["dht"].kill()
    return served_again(target)


@attack("a server's p2pd is killed", answer_limit=RECOVERY_LIMIT)
def server_daemon(target: Target) -> str | None:
    server_parts(target)["daemon"].kill()
    return served_again(target)


@attack("a server's handler is killed", answer_limit=RECOVERY_LIMIT)
def server_handler(target: Target) -> str | None:
    server_parts(target)["handler"].kill()
    return served_again(target)


def served_again(target: Target) -> str | None:
    """Look whether the program says in the end that it is ready, and is."""
    target.wait(SETTLING)
    status, body = target.client.call("GET", "/readyz")
    return None if status == 200 else f"/readyz: {status} {body}"


@dataclass(frozen=True)
class Enemy:
    """A member of the target's swarm."""

    peer: evil.EvilServer
    uids: list[str]  # of the model's blocks
    hidden_size: int
    victims: list[PeerID]  # the app, and its server

    def tell(self, victim: PeerID, subkey: bytes, value: bytes, expiration: float) -> None:
        """Ask a node to keep a record under every block's key."""
        keys = [DHTID.generate(uid).to_bytes() for uid in self.uids]
        count = len(keys)
        request = dht_pb2.StoreRequest(
            keys=keys,
            subkeys=[subkey] * count,
            values=[value] * count,
            expiration_time=[expiration] * count,
            in_cache=[False] * count,
        )
        stub = ServicerBase.get_stub.__func__(DHTProtocol, self.peer.p2p, victim)  # its own wants a node
        with contextlib.suppress(Exception):  # whatever it answers: others tell whether it lives
            RemoteExpertWorker.run_coroutine(stub.rpc_store(request, timeout=5))


@contextlib.contextmanager
def enemy(target: Target) -> Iterator[Enemy]:
    """Join the target's swarm."""
    state = target.client.call("GET", "/api/v1/state")[1]
    peers, model = [peer for peer in state["initial_peers"] if peer.startswith("/ip4/127.")], state["models"][0]
    path = weights.locate(model["name"], cache_dir=Settings.from_environment().cache_dir)
    uids = [f"{weights.dht_prefix(model['name'])}.{block}" for block in range(model["num_blocks"])]
    victims = [peers[0].rpartition("/p2p/")[2], model["servers"][0]["peer_id"]]
    with contextlib.closing(evil.EvilServer(peers, uids)) as peer:
        hidden_size = json.loads((Path(path) / "config.json").read_text())["hidden_size"]
        yield Enemy(peer, uids, hidden_size, [PeerID.from_base58(victim) for victim in victims])


@attack("an evil server, with every answer", QUICK, answer_limit=RECOVERY_LIMIT)
def evil_server(target: Target) -> str | None:
    with enemy(target) as member:
        for answer, _ in evil.ANSWERS.values():
            member.peer.answer = answer
            member.peer.announce()
            target.wait(BELIEVED)
        asked = member.peer.asked
    return None if asked else "nobody has asked it"


@attack("an evil client, with every request", QUICK)
def evil_client(target: Target) -> str | None:
    with enemy(target) as member:
        for name, (messages, answer) in evil.bad_requests(member.uids[:2], member.hidden_size).items():
            for _ in range(3):
                got = RemoteExpertWorker.run_coroutine(evil.ask(member.peer.p2p, member.victims[1], messages))
                if answer not in got:
                    return f"{name}: {got}"
    return None


@attack("lies in the DHT", QUICK, answer_limit=RECOVERY_LIMIT)
def lies(target: Target) -> str | None:
    fake = "12D3KooW" + "A" * 44
    until = get_dht_time() + 60
    slow = (2, 1.0, {"start_block": 0, "end_block": 30, "inference_rps": 0.0})
    loud = (2, 1.0, {"start_block": 0, "end_block": 30, "public_name": "x" * 100_000})
    records = [(fake, slow, until), (123, slow, until), (fake, loud, until), ("x", [1], until), (fake, slow, 1e18)]
    with enemy(target) as member:
        for victim in member.victims:
            for subkey, value, expiration in records:
                packed = MSGPackSerializer.dumps(subkey), MSGPackSerializer.dumps(value)
                member.tell(victim, *packed, expiration)
            member.tell(victim, b"", MSGPackSerializer.dumps("in the place of all"), 1e18)
            member.tell(victim, b"", evil.bomb(), until)
            member.tell(victim, evil.bomb(), evil.bomb(), until)
        for uid in member.uids[:2]:
            for subkey, value, expiration in records[:2]:
                member.peer.plant(uid, MSGPackSerializer.dumps(value), subkey, expiration)
        return served_again(target)
