"""gunicorn reads this file by itself. Options on its command line go before those here."""

import logging
import os
import shlex
import signal
import sys
import threading
from typing import Any

from admission.keys import read_keys
from config import Settings, listening_address
from errors import ConfigError


def read_settings() -> tuple[Settings, str]:
    """Return the settings and where to listen; end gunicorn with one sentence if some are wrong."""
    logging.disable(logging.WARNING)  # the app reads them once more, and then says what it thinks of them
    try:
        settings = Settings.from_environment()
        settings.check_machine()
        read_keys(settings)
        address = listening_address({} if is_bound_elsewhere() else os.environ)
    except ConfigError as error:
        raise SystemExit(f"Petals Chat cannot start: {error}") from None
    finally:
        logging.disable(logging.NOTSET)
    return settings, address


def is_bound_elsewhere() -> bool:
    """Whether gunicorn is told where to listen: then HOST and PORT, which many machines have, mean something else."""
    words = [*sys.argv[1:], *shlex.split(os.environ.get("GUNICORN_CMD_ARGS", ""))]
    return any(word.startswith(("-b", "--bind")) for word in words)


settings, bind = read_settings()  # gunicorn takes no notice of names that it does not know
worker_class = "front.worker.Worker"  # gthread, behind a loop that owns the connections
workers = 1
threads = 100  # for requests that are whole; WebSockets have threads of their own
worker_connections = settings.MAX_CONNECTIONS
keepalive = 15  # seconds that a connection stays open for the next request
control_socket_disable = True  # nobody uses it
timeout = 1000  # seconds; an answer of a very large model may take minutes
# Longer than SHUTDOWN_TIMEOUT and the end of the embedded servers together, which come before.
graceful_timeout = 40  # seconds


def refuse_more_workers(workers: int) -> None:
    """End gunicorn if it is told to run more than one worker."""
    if workers > 1:
        raise SystemExit(
            f"Petals Chat runs in one worker, not in {workers}: open inference sessions live in the memory of one "
            "process, and a request that reaches another would not find them. Use --workers 1 --threads 100."
        )


def on_starting(server: Any) -> None:
    refuse_more_workers(server.cfg.workers)


def nworkers_changed(server: Any, new_value: int, old_value: int | None) -> None:
    """SIGTTIN asks for one more worker while running."""
    if old_value is not None and new_value > 1:
        server.log.error("Petals Chat runs in one worker; the request for %d is ignored", new_value)
        server.num_workers = 1


def post_worker_init(worker: Any) -> None:
    """Load the models now that the worker serves, and begin to end as soon as it is told to."""
    from app import app, start
    from service import get_service

    start(app, [address[0] for address in worker.cfg.address if isinstance(address, tuple)])
    service = get_service(app)
    let_gunicorn_end = signal.getsignal(signal.SIGTERM)

    def end(signum: int, frame: Any) -> None:
        # Takes a while and must not be done in a signal handler; gunicorn meanwhile waits for running requests.
        threading.Thread(target=service.close, name="close", daemon=True).start()
        let_gunicorn_end(signum, frame)  # type: ignore[operator, misc]

    signal.signal(signal.SIGTERM, end)


def worker_int(worker: Any) -> None:
    """Ctrl-C, or a quick end: do not wait for running answers."""
    from app import app
    from service import get_service

    threading.Thread(target=get_service(app).close, args=(0.0,), name="close", daemon=True).start()


def worker_exit(server: Any, worker: Any) -> None:
    """Wait for everything below to have ended."""
    from app import app
    from service import get_service

    get_service(app).close(0.0)
