"""What processes hold beside weights: helpers, and pages of libraries that only loading needs."""

import re
import sys
from pathlib import Path

import swarm.compat  # noqa: F401

import pytest
import torch

from swarm import hardware

SMAPS = """\
7f0000000000-7f0000003000 r-xp 00000000 fe:00 17                         /lib/libone.so.2
Rss:                  12 kB
Anonymous:             0 kB
7f0000003000-7f0000004000 r--p 00003000 fe:00 17                         /lib/libone.so.2
Rss:                   4 kB
Anonymous:             4 kB
7f0000004000-7f0000005000 rw-p 00004000 fe:00 17                         /lib/libone.so.2
Rss:                   4 kB
Anonymous:             0 kB
7f0000005000-7f0000007000 r--p 00000000 fe:00 18                         /model/model.safetensors
Rss:                   8 kB
Anonymous:             0 kB
7f0000007000-7f0000009000 r--p 00000000 00:00 0
Rss:                   8 kB
Anonymous:             0 kB
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems tell otherwise what memory is made of")


def test_only_what_a_library_has_in_its_file_is_let_go() -> None:
    """Not what the linker has changed, nor what can be written to, nor what is no library and may be unmapped."""
    assert list(hardware.untouched_mappings(SMAPS.splitlines(True))) == [(0x7F0000000000, 0x3000)]


def test_libraries_work_once_their_pages_are_let_go() -> None:
    before = resident("libtorch_cpu.so")
    hardware.return_library_pages()
    assert resident("libtorch_cpu.so") < before
    assert torch.ones(100, 100).mm(torch.ones(100, 100)).sum() == 100**3


def resident(library: str) -> int:
    """Return how much of a library is in this process's memory, kB."""
    text = Path("/proc/self/smaps").read_text()
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    return sum(int(re.findall(r"^Rss: +(\d+)", part, re.MULTILINE)[0]) for part in parts if library in part)
