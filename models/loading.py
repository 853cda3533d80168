"""The models that are served: loaded in the background, each with a state that can be asked for at any time.

Nothing heavy is imported before ``start``: importing the app costs nothing.
"""

import contextlib
import datetime
import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from config import Settings
from errors import ModelNotFound, ModelNotReady
from models.catalog import KNOWN_MODELS, AnswerMarkup, ChatFormat, ModelConfig, State, configured, markup_of
from models.derived_format import derive_format
from models.draft_models import load_draft_model
from swarm.background import Loop, growing_delays
from swarm.errors import CacheFull, ClockOff, ModelUnavailable, SwarmError, SwarmUnreachable, format_blocks
from swarm.waiter import Until

if TYPE_CHECKING:
    from swarm.client.history import HistoryBudget
    from swarm.client.membership import Swarm
    from swarm.client.model import SwarmModel
    from swarm.client.routing import CacheRelief
    from swarm.local import LocalServer, LocalSwarm

log = logging.getLogger(__name__)

# How often a model whose blocks are not all served yet looks again: a person waits, and a look costs milliseconds.
BLOCKS_POLL = 1.0  # seconds
# Between two tries to be in a swarm, or to bring up a model: short at first, for a swarm that is just being started.
# A fault of configuration need not stay one: a directory may be mounted, access to a hub's model granted.
# Such a try fails early and costs milliseconds, and a request to the hub in a minute harms nobody.
FIRST_RETRY, LAST_SWARM_RETRY, LAST_MODEL_RETRY = 1.0, 30.0, 60.0  # seconds
# How often to check whether a model has come into doubt.
KEEP_PERIOD = 1.0  # seconds
# Of the free memory, for the attention caches of all embedded servers; the weights and other programs need the rest.
CACHE_SHARE = 0.25


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
        self.error: SwarmError | None = None  # of the last try to bring it up, or to get an answer
        self.retry_in: Callable[[], float | None] = lambda: None  # seconds until the next one
        self.progress = "waiting to be loaded"
        self.fraction: float | None = None  # how much of that is done, where it is known
        self.server: LocalServer | None = None  # of the embedded swarm; it is started again if it dies
        self.ready = False  # whether it has answered once
        self.draft_error: str | None = None  # why its draft model is not used
        self._derived: tuple[datetime.date, ChatFormat] | None = None  # see ``chat``

    @property
    def status(self) -> ModelStatus:
        """The state now; what is known of the swarm is looked up, not remembered. Never waits."""
        if self.model is not None and (status := self._swarm_status(self.model)) is not None:
            return status
        answers = self.ready and self.model is not None and not self.model.state.doubtful
        if self.error is not None and not answers:
            return failed(self.error, self.retry_in())
        return ModelStatus("ready", "ready") if self.ready else ModelStatus("loading", self.progress)

    @property
    def loaded(self) -> "SwarmModel":
        """The model, once it has answered: whatever the swarm is like now, its sessions wait until it is there again.

        :raises ModelUnavailable, ModelNotReady: if it failed to load, or is not loaded yet
        """
        if self.model is not None and self.ready:
            return self.model
        if self.error is not None:
            raise self.error
        if self.server is not None and (failure := self.server.failure) is not None:
            raise ModelUnavailable(f"{self.config.name}: its server fails: {failure}")
        raise ModelNotReady(f"{self.config.name} is not ready yet: {self.status.message}")

    def _swarm_status(self, model: "SwarmModel") -> ModelStatus | None:
        """What is wrong with the swarm, if anything is, whatever the model itself is like."""
        state = model.state
        if not state.connected:
            return ModelStatus("rejoining", "this program joins its swarm again")
        if state.stale:
            return ModelStatus("stale", f"the swarm was last read {state.view_age or 0:.0f} s ago")
        if missing := state.missing_blocks():
            if self.server is not None and (failure := self.server.failure) is not None:
                return failed(f"its server fails: {failure}", self.server.retry_in)
            return ModelStatus("blocks_missing", f"no server holds {format_blocks(missing)}")
        return None

    @property
    def markup(self) -> AnswerMarkup:
        """What the model's answers are made of, beside text.

        :raises ModelUnavailable, ModelNotReady: if it failed to load, or is not loaded yet
        """
        tokenizer = self.loaded.tokenizer
        found = tokenizer.chat_template or ""
        return markup_of(tokenizer.added_tokens, "".join(found.values()) if isinstance(found, dict) else found)

    @property
    def chat(self) -> ChatFormat:
        """How the page writes conversations: as the catalogue says, or else the model's template, if it can be had."""
        if self.model is None or self.config.name in KNOWN_MODELS:
            return self.config.chat
        today = datetime.date.today()  # templates may write it
        if self._derived is None or self._derived[0] != today:
            self._derived = today, derive_format(self.model.tokenizer) or self.config.chat
        return self._derived[1]

    def report(self, message: str) -> None:
        """Report how far the loading is: to the log, and in the state."""
        self.progress, self.fraction = message, None
        log.info("%s: %s", self.config.name, message)

    def report_fraction(self, done: float) -> None:
        self.fraction = done


class Models:
    """All models of the program, and the swarm behind them."""

    def __init__(self, settings: Settings, relief: "CacheRelief | None" = None) -> None:
        """:param relief: frees attention cache when the servers have none left"""
        self.settings = settings
        self._relief = relief
        self.served = {config.name: ServedModel(config) for config in configured(settings.MODELS)}
        self._local: LocalSwarm | None = None
        self._swarm: Swarm | None = None
        self._budget: HistoryBudget | None = None
        self._keepers: list[Loop] = []
        self._stop = threading.Event()

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

    @property
    def initial_peers(self) -> list[str]:
        """Multiaddrs by which others join the swarm; none while an own one is not founded yet."""
        return self._swarm.initial_peers if self._swarm is not None else list(self.settings.INITIAL_PEERS)

    @property
    def status(self) -> dict[str, ModelStatus]:
        return {name: served.status for name, served in self.served.items()}

    @property
    def loops(self) -> list[Loop]:
        """What runs in the background for as long as the program does."""
        watch = [self._swarm.loop] if self._swarm is not None else []
        readers = [served.model.state.reader for served in self.served.values() if served.model is not None]
        return [*watch, *readers, *self._keepers]

    def _load_all(self) -> None:
        started = time.monotonic()
        self._report_all("connecting to the swarm")
        delays = growing_delays(FIRST_RETRY, LAST_SWARM_RETRY)
        while not self._stop.is_set():
            try:
                self._connect()
                break
            except Exception as error:  # whatever it was, the models' states must report it
                self._wait_unconnected(error, next(delays))
        if self._stop.is_set():  # the program ended meanwhile, before there was a swarm to leave
            self._leave_swarm()
            return
        self._keepers = [self._keeper(served, started) for served in self.served.values()]
        for keeper in self._keepers:
            keeper.start()

    def _connect(self) -> None:
        """Join the swarm, or found the embedded one.

        :raises SwarmUnreachable: if that fails
        """
        from swarm import collector, fork_server

        if not self.settings.INITIAL_PEERS:
            fork_server.prepare(str(self.settings.cache_dir))  # it loads while this process does
        with collector.paused():
            from swarm.client.history import HistoryBudget
            from swarm.client.membership import Swarm
            from swarm.process import set_threads

        set_threads(self.settings.CLIENT_THREADS)
        self._budget = HistoryBudget(self.settings.HISTORY_MB * 2**20)
        if self.settings.INITIAL_PEERS:
            self._swarm = Swarm.join(self.settings.INITIAL_PEERS)
        else:
            from swarm.local import LocalSwarm

            try:
                self._local = LocalSwarm(self.settings.SWARM_HOST_MADDRS)
            except SwarmUnreachable as error:
                raise SwarmUnreachable(f"SWARM_HOST_MADDRS: {error}") from error
            self._swarm = self._local.swarm
            for maddr in self._swarm.initial_peers:
                log.info("this program's own swarm: others join with --initial-peers %s", maddr)
        for served in self.served.values():
            served.error = None

    def _wait_unconnected(self, error: Exception, delay: float) -> None:
        """Report why this program is in no swarm, and wait until the next try."""
        is_absent = isinstance(error, SwarmUnreachable) and not isinstance(error, ClockOff)
        if is_absent and self.settings.INITIAL_PEERS:  # it may not have been started yet
            self._report_all(f"waiting for the swarm: {error}")
        else:
            unforeseen = None if isinstance(error, SwarmError) else error
            log.error("no model can be loaded, again in %.0f s: %s", delay, error, exc_info=unforeseen)
            next_try = time.monotonic() + delay
            for served in self.served.values():
                served.retry_in = lambda: max(0.0, next_try - time.monotonic())
                served.error = as_swarm_error(error)
        self._stop.wait(delay)

    def _report_all(self, message: str) -> None:
        for served in self.served.values():
            served.report(message)

    def _keeper(self, served: ServedModel, started: float) -> Loop:
        """Return a loop that brings a model up and looks after it."""
        keeper = Loop(
            f"keep-model {served.config.name}",
            lambda: self._keep(served, started),
            KEEP_PERIOD,
            first_delay=FIRST_RETRY,
            last_delay=LAST_MODEL_RETRY,
            expected=(SwarmError,),
        )
        served.retry_in = lambda: keeper.retry_in
        return keeper

    def _keep(self, served: ServedModel, started: float) -> None:
        """Bring a model up, or see whether one in doubt still answers. A failure is this model's alone."""
        if self._stop.is_set():
            return
        try:
            if not served.ready:
                self._bring_up(served, started)
            elif served.model is not None and served.model.state.doubtful:
                with contextlib.suppress(CacheFull):  # its servers live, and are busy
                    self._warm_up(served, served.model)
        except Exception as error:
            if self._stop.is_set():
                return
            served.error = as_swarm_error(error)
            raise
        served.error = None

    def _bring_up(self, served: ServedModel, started: float) -> None:
        """Do what is left to be done until the model answers."""
        from swarm import collector

        if served.model is None:
            self._start_server(served)
            served.model = self._load_client(served)
        self._await_blocks(served, served.model)
        self._warm_up(served, served.model)
        served.ready = True
        served.draft_error = load_draft_model(self.settings, served.model)
        collector.freeze()
        log.info("%s: ready after %.1f s", served.config.name, time.monotonic() - started)

    def _start_server(self, served: ServedModel) -> None:
        """In the embedded swarm: prepare the model's files and start a server for all its blocks, if there is none."""
        if self._local is None or served.server is not None:
            return
        from swarm import weights
        from swarm.families.configuration import read_supported
        from swarm.hardware import attn_cache_tokens
        from swarm.options import ServerOptions

        name, settings = served.config.name, self.settings
        path = weights.locate(
            name, cache_dir=settings.cache_dir, progress=weights.Progress(served.report, served.report_fraction)
        )
        served.report("starting a server of the embedded swarm")
        dtype, share = settings.torch_dtype(), CACHE_SHARE / len(self.served)
        config = read_supported(path)  # before a server is started that would refuse it
        cache_tokens = settings.ATTN_CACHE_TOKENS or attn_cache_tokens(config, dtype, share, settings.device())
        served.server = self._local.start_server(
            ServerOptions(
                name,
                device=settings.device(),
                dtype=settings.TORCH_DTYPE or None,
                attn_cache_tokens=cache_tokens,
                threads=settings.SERVER_THREADS or None,
                cache_dir=settings.cache_dir,
                # With a minute more than the app keeps what nobody uses, the app decides.
                idle_timeout=settings.SESSION_TIMEOUT + settings.RESUME_TIMEOUT + 60,
                # Reachable by the same machines as the swarm's first peer, on a port of its own.
                host_maddrs=tuple(re.sub(r"/(tcp|udp)/\d+", r"/\1/0", maddr) for maddr in settings.SWARM_HOST_MADDRS),
            )
        )

    def _load_client(self, served: ServedModel) -> "SwarmModel":
        from swarm.client.model import SwarmModel
        from swarm.client.terms import SessionLimits

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
            relief=self._relief,
        )

    def _await_blocks(self, served: ServedModel, model: "SwarmModel") -> None:
        served.report("waiting for servers that hold its blocks")
        state = model.state
        state.start(timeout=BLOCKS_POLL)
        while not self._stop.is_set() and not state.wait(lambda: not state.missing_blocks(), BLOCKS_POLL):
            served.progress = f"no server holds {format_blocks(state.missing_blocks())}"

    def _warm_up(self, served: ServedModel, model: "SwarmModel") -> None:
        """Compute one token: a server that has announced its blocks may need a moment more until it answers."""
        served.report("computing a first token")
        token_id = next(iter(model.tokenizer.get_vocab().values()))
        with model.open_session(max_length=2) as session:
            session.step([token_id], waiter=Until(self._stop))

    def close(self) -> None:
        """Release all models, then the swarm; embedded servers end."""
        self._stop.set()
        for keeper in self._keepers:
            keeper.stop()
        for served in self.served.values():
            if served.model is not None:
                served.model.close()
        self._leave_swarm()

    def _leave_swarm(self) -> None:
        if self._local is not None:
            self._local.close()
        elif self._swarm is not None:
            self._swarm.close()


def failed(reason: object, retry_in: float | None) -> ModelStatus:
    """Return the state of a model that does not answer.

    :param retry_in: seconds until the next try; None if it is under way
    """
    return ModelStatus("failed", f"{reason}; again {'now' if retry_in is None else f'in {retry_in:.0f} s'}")


def as_swarm_error(error: Exception) -> SwarmError:
    """Return the error for a request whose model is not available."""
    return error if isinstance(error, SwarmError) else ModelUnavailable(f"{type(error).__name__}: {error}")
