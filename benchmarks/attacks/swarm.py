"""Attacks on the swarm: parts of it that die."""

import contextlib

import psutil

from benchmarks.attacks.target import Target, attack

# A part that died is noticed, replaced, and computing again: a server within 5 s, the app's membership within 10. The
# bystanders' answers go on by themselves meanwhile.
RECOVERY_LIMIT = 15.0  # seconds
SETTLING = 12.0  # seconds to look for what comes after


def is_daemon(process: psutil.Process) -> bool:
    return process.name().startswith("p2pd")


def is_server(process: psutil.Process) -> bool:
    return "swarm.server" in process.cmdline()


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
    server = next(child for child in target.worker.children() if is_server(child))
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
