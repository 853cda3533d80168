"""Settings of a swarm process: its threads; and killing its descendants."""

import contextlib

import psutil
import torch


def set_threads(count: int) -> None:
    """Limit the threads of PyTorch's operators in this process.

    With the default, one per core in every process, servers and clients on one machine compete for the cores: four
    parallel sessions were four times slower in total than one.
    """
    torch.set_num_threads(count)


def kill_descendants(pid: int | None = None) -> None:
    """Kill every process below ``pid`` (default: this process) at once, ``p2pd`` among them."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
