"""The promise of one number: peak resident memory stays within the process's floor plus what was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moestro.store.locate import locate_source
from moestro.store.pack import pack

PROMPT = "import os\n\ndef walk(path):\n    " * 12


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shipped") / "store"
    pack(locate_source("tiny-qwen3moe-28m"), folder)
    return folder


def _generate(store: Path, memory: str, before: Callable[[], None] | None = None) -> dict[str, object]:
    command = [sys.executable, "-m", "moestro.cli", "generate", str(store), "--prompt", PROMPT, "--json"]
    command += ["--memory", memory, "--context", "512", "--max-tokens", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, preexec_fn=before)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, object] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("memory", ["26MiB", "36MiB", "64MiB"])
def test_peak_memory_stays_within_floor_plus_budget(store: Path, memory: str) -> None:
    stats = _generate(store, memory)["stats"]
    assert isinstance(stats, dict)
    assert stats["misses"] > 0
    assert stats["peak_rss_bytes"] <= stats["process_floor_bytes"] + stats["memory_bytes"]


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    folder = Path("/sys/fs/cgroup/memory") / f"moestro-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(4 << 30))
    except OSError as error:
        pytest.skip(f"no memory cgroup (version 1) can be made here: {error}")
    yield folder
    folder.rmdir()


def test_it_runs_in_a_memory_cgroup_of_floor_plus_budget(store: Path, memory_cgroup: Path) -> None:
    """The limit counts page cache and kernel memory too; a process that needs more is killed."""
    free = _generate(store, "36MiB")
    stats = free["stats"]
    assert isinstance(stats, dict)
    limit = stats["process_floor_bytes"] + stats["memory_bytes"]
    (memory_cgroup / "memory.limit_in_bytes").write_text(str(limit))

    def enter() -> None:
        (memory_cgroup / "cgroup.procs").write_text(str(os.getpid()))

    held = _generate(store, "36MiB", enter)
    assert held["token_ids"] == free["token_ids"]
