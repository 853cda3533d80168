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
    # Servers this far away, seconds of round trip, get their inputs from the server before them. On one machine or in
    # one room that takes more work than it saves time. Infinity: none do.
    push_from: float = 0.005
    pipelining: bool = True  # whether a prompt's chunks follow one another


@dataclass(frozen=True)
class SessionTerms:
    """What a session is opened with, shared by its chain and its spans."""

    state: SwarmState
    limits: SessionLimits
    budget: HistoryBudget
    max_length: int  # tokens of a row, prefix included
    rows: int = 1
