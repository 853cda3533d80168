"""What a session is opened with: its maximum length, how long it waits for the swarm, and which ways it goes."""

from dataclasses import dataclass

from swarm.client.history import HistoryBudget
from swarm.client.routing import SwarmState


@dataclass(frozen=True)
class SessionLimits:
    """How long a session waits for the swarm, and which ways it goes."""

    connect_timeout: float = 5.0  # seconds to open a stream to a server
    step_timeout: float = 120.0  # seconds for one server to answer one step
    probe_after: float = 1.0  # seconds a step may take before its server is probed
    probe_timeout: float = 2.0  # seconds for the probe, and for which a live server's process may be silent
    recovery_timeout: float = 60.0  # seconds to wait for lost blocks to be served again
    cache_timeout: float = 10.0  # seconds to wait for a server with free attention cache
    # Whether servers may pass their outputs on to one another, and a prompt's chunks may follow one another.
    pushing: bool = True
    pipelining: bool = True


@dataclass(frozen=True)
class SessionTerms:
    """What a session is opened with, shared by its chain and its spans."""

    state: SwarmState
    limits: SessionLimits
    budget: HistoryBudget
    max_length: int  # tokens of a row, prefix included
    rows: int = 1
