"""Large blocks do not stay in the heap."""

from __future__ import annotations

import subprocess
import sys

import pytest

PATTERN = """
import sys
import torch
from moestro.memory.budget import resident_bytes
from moestro.memory.heap import return_large_blocks
if sys.argv[1] == "bounded":
    return_large_blocks()
torch.ones(8)
before = resident_bytes()
for _ in range(3):
    block = torch.ones(30 << 18)
    top = torch.ones(64 << 8)
    del block
print((resident_bytes() - before) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
@pytest.mark.parametrize(("how", "most", "least"), [("bounded", 8, 0), ("as it is", 1 << 20, 25)])
def test_freed_blocks_go_back_to_the_system(how: str, most: int, least: int) -> None:
    """And glibc's habit is still what this is for."""
    done = subprocess.run([sys.executable, "-c", PATTERN, how], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    assert least <= int(done.stdout) <= most
