"""The models that are served: loaded in the background, each with a state that anybody may ask for.

Nothing heavy is imported before ``start``: importing the app costs nothing.
"""

import functools
import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from config import ModelConfig, Settings
from errors import ModelNotFound, ModelNotReady
from swarm.errors import ModelUnavailable, SwarmError, SwarmUnreachable, format_blocks

if TYPE_CHECKING:
    from swarm.client import Swarm, SwarmModel
    from swarm.local import LocalSwarm
    from swarm.session import HistoryBudget

log = logging.getLogger(__name__)

# How often a model whose blocks are not all served yet looks again: a person waits, and a look costs milliseconds.
BLOCKS_POLL = 1.0  # seconds
# Between two tries to reach a swarm that does not answer: short enough for a swarm that is just being started.
SWARM_RETRY = 5.0  # seconds
# Of the free memory, for the attention caches of all embedded servers; the weights and other programs need the rest.
CACHE_SHARE = 0.25

State = Literal["loading", "ready", "blocks_missing", "failed"]


@dataclass(frozen=True)
class ModelStatus:
    """The state of a model, and what there is to say about it."""

    state: State
    message: str


class ServedModel:
    """One model: its configuration, its state, and the model itself once it is loaded."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.model: SwarmModel | None = None
        self.error: SwarmError | None = None
        self.progress = "waiting to be loaded"
        self.fraction: float | None = None  # how much of that is done, where it is known
        self.ready = False  # whether it has answered once

    @property
    def status(self) -> ModelStatus:
        """The state now; whether blocks are missing is looked up, not remembered."""
        if self.error is not None:
            return ModelStatus("failed", str(self.error))
        if self.model is None:
            return ModelStatus("loading", self.progress)
        if missing := self.model.state.missing_blocks():
            return ModelStatus("blocks_missing", f"no server holds {format_blocks(missing)}")
        return ModelStatus("ready", "ready") if self.ready else ModelStatus("loading", self.progress)

    def report(self, message: str) -> None:
        """Tell the log, and whoever asks, how far the loading is."""
        self.progress, self.fraction = message, None
        log.info("%s: %s", self.config.name, message)

    def report_fraction(self, done: float) -> None:
        self.fraction = done


class Models:
    """All models of the program, and the swarm behind them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Called when a model's servers have no attention cache left for so many tokens; see SwarmState.make_room.
        self.make_room: Callable[[str, int], bool] = lambda name, tokens: False
        self.served = {config.name: ServedModel(config) for config in settings.models()}
        self._local: LocalSwarm | None = None
        self._swarm: Swarm | None = None
        self._budget: HistoryBudget | None = None
        self._stop = threading.Event()
        self._loading = threading.Lock()  # Transformers patches torch.nn while it loads: one model at a time

    def start(self) -> None:
        """Begin to load in the background."""
        threading.Thread(target=self._load_all, name="load-models", daemon=True).start()

    def find(self, name: str) -> ServedModel:
        """Return a model in whatever state it is.

        :raises ModelNotFound: if no such model is served
        """
        served = self.served.get(name)
        if served is None:
            raise ModelNotFound(f"no model {name!r} is served here")
        return served

    def get(self, name: str | None) -> "SwarmModel":
        """Return a model that can be used; None: the default model.

        :raises ModelNotFound: if no such model is served
        :raises ModelUnavailable, ModelNotReady: if it failed to load, or is not loaded yet
        """
        served = self.find(name or self.settings.default_model)
        if served.error is not None:
            raise served.error
        if served.model is None or not served.ready:
            raise ModelNotReady(f"{served.config.name} is not ready yet: {served.status.message}")
        return served.model

    @property
    def initial_peers(self) -> list[str]:
        """Multiaddrs by which others join the swarm; none while an own one is not founded yet."""
        return self._swarm.initial_peers if self._swarm is not None else list(self.settings.INITIAL_PEERS)

    @property
    def status(self) -> dict[str, ModelStatus]:
        return {name: served.status for name, served in self.served.items()}

    def _load_all(self) -> None:
        started = time.monotonic()
        self._report_all("connecting to the swarm")
        try:
            self._connect()
        except Exception as error:  # whatever it was, the models' states must tell it
            self._fail_all(error)
            return
        threads = [
            threading.Thread(target=self._load, args=(served, started), name=f"load-{name}", daemon=True)
            for name, served in self.served.items()
        ]
        for thread in threads:
            thread.start()

    def _connect(self) -> None:
        """Join the swarm, trying until it answers; or found the embedded one."""
        from swarm.compat import set_threads

        from swarm.client import Swarm
        from swarm.session import HistoryBudget

        set_threads(self.settings.CLIENT_THREADS)
        self._budget = HistoryBudget(self.settings.HISTORY_MB * 2**20)
        if not self.settings.INITIAL_PEERS:
            from swarm.local import LocalSwarm

            self._local = LocalSwarm(self.settings.SWARM_HOST_MADDRS)
            self._swarm = self._local.swarm
            for maddr in self._swarm.initial_peers:
                log.info("this program's own swarm: others join with --initial-peers %s", maddr)
            return
        while not self._stop.is_set():
            try:
                self._swarm = Swarm.join(self.settings.INITIAL_PEERS)
                return
            except SwarmUnreachable as error:
                self._report_all(f"waiting for the swarm: {error}")
                self._stop.wait(SWARM_RETRY)

    def _report_all(self, message: str) -> None:
        for served in self.served.values():
            served.report(message)

    def _fail_all(self, error: Exception) -> None:
        log.error("no model can be loaded", exc_info=error)
        if not isinstance(error, SwarmError):
            error = ModelUnavailable(f"{type(error).__name__}: {error}")
        for served in self.served.values():
            served.error = error

    def _load(self, served: ServedModel, started: float) -> None:
        """Bring one model up; a failure is this model's alone."""
        from swarm.compat import spare_collector

        try:
            self._start_server(served)
            with self._loading:
                served.model = model = self._load_client(served)
            model.state.make_room = functools.partial(self.make_room, served.config.name)
            self._await_blocks(served, model)
            self._warm_up(served, model)
        except SwarmError as error:
            log.error("%s: %s", served.config.name, error)
            served.error = error
        except Exception as error:
            log.error("%s: loading failed", served.config.name, exc_info=error)
            served.error = ModelUnavailable(f"{served.config.name}: {type(error).__name__}: {error}")
        else:
            if served.ready:
                spare_collector()
                log.info("%s: ready after %.1f s", served.config.name, time.monotonic() - started)

    def _start_server(self, served: ServedModel) -> None:
        """In the embedded swarm: prepare the model's files and start a server for all its blocks."""
        if self._local is None:
            return
        from transformers import AutoConfig

        from swarm import weights
        from swarm.hardware import attn_cache_tokens
        from swarm.local import ServerOptions

        name, settings = served.config.name, self.settings
        path = weights.locate(
            name, cache_dir=settings.cache_dir, progress=served.report, fraction=served.report_fraction
        )
        served.report("starting a server of the embedded swarm")
        dtype, share = settings.torch_dtype(), CACHE_SHARE / len(self.served)
        config = AutoConfig.from_pretrained(path)
        cache_tokens = settings.ATTN_CACHE_TOKENS or attn_cache_tokens(config, dtype, share, settings.device())
        self._local.start_server(
            ServerOptions(
                name,
                device=settings.device(),
                torch_dtype=dtype,
                attn_cache_tokens=cache_tokens,
                threads=settings.SERVER_THREADS or None,
                cache_dir=settings.cache_dir,
                # With a minute more than the app keeps what nobody uses, the app decides.
                idle_timeout=settings.SESSION_TIMEOUT + settings.RESUME_TIMEOUT + 60,
                # Reachable by the same machines as the swarm's first peer, on a port of its own.
                host_maddrs=[re.sub(r"/(tcp|udp)/\d+", r"/\1/0", maddr) for maddr in settings.SWARM_HOST_MADDRS],
            )
        )

    def _load_client(self, served: ServedModel) -> "SwarmModel":
        from swarm.client import SwarmModel
        from swarm.session import SessionLimits

        settings = self.settings
        served.report("loading tokenizer, embeddings and head")
        assert self._swarm is not None  # _connect has returned
        return SwarmModel.load(
            served.config.name,
            self._swarm,
            cache_dir=settings.cache_dir,
            device=settings.device(),
            torch_dtype=settings.torch_dtype(),
            update_period=settings.UPDATE_PERIOD,
            limits=SessionLimits(
                step_timeout=settings.STEP_TIMEOUT,
                recovery_timeout=settings.RECOVERY_TIMEOUT,
                cache_timeout=settings.QUEUE_TIMEOUT,
            ),
            budget=self._budget,
        )

    def _await_blocks(self, served: ServedModel, model: "SwarmModel") -> None:
        served.report("waiting for servers that hold its blocks")
        state = model.state
        state.start(timeout=BLOCKS_POLL)
        while not self._stop.is_set() and not state.wait(lambda: not state.missing_blocks(), BLOCKS_POLL):
            served.progress = served.status.message

    def _warm_up(self, served: ServedModel, model: "SwarmModel") -> None:
        """Compute one token: a server that has announced its blocks may need a moment more until it answers."""
        served.report("computing a first token")
        token_id = next(iter(model.tokenizer.get_vocab().values()))
        with model.open_session(max_length=2) as session:
            session.step([token_id], cancelled=self._stop.is_set)
        served.ready = True

    def close(self) -> None:
        """Let go of all models, then of the swarm; embedded servers end."""
        self._stop.set()
        for served in self.served.values():
            if served.model is not None:
                served.model.close()
        if self._local is not None:
            self._local.close()
        elif self._swarm is not None:
            self._swarm.close()
