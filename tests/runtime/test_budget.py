"""The promise of one number: peak resident memory stays within the process's floor plus what was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROMPT = "import os\n\ndef walk(path):\n    " * 12


@pytest.fixture(scope="module")
def store(raw_store: Path) -> Path:
    return raw_store


def _generate(store: Path, memory: str, before: Callable[[], None] | None = None) -> dict[str, object]:
    command = [sys.executable, "-m", "moestro.cli", "generate", str(store), "--prompt", PROMPT, "--json"]
    command += ["--memory", memory, "--context", "512", "--max-tokens", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, preexec_fn=before)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, object] = json.loads(done.stdout)
    return result


LEAST = """
import json, sys
from moestro import LLM, SamplingParams
from moestro.errors import BudgetError
store, context, sequences = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
temperatures = [float(one) for one in sys.argv[4:]]
try:
    LLM(store, memory="1MiB", context=context, max_sequences=sequences)
except BudgetError as error:
    least = int(str(error).split("(")[1].split(" ")[0])
if sequences > 1:  # beside one whole context there are to be the others
    with LLM(store, memory=least, context=context, max_sequences=sequences) as llm:
        least += llm.plan.missing_kv_bytes
with LLM(store, memory=least, context=context, max_sequences=sequences) as llm:
    prompts = [[(7 * i + 31 * n) % 4000 for i in range(context - 20)] for n in range(2 * sequences)]
    for temperature in temperatures:
        llm.generate(prompts, SamplingParams(max_tokens=20, temperature=temperature, ignore_eos=True))
    stats = llm.stats()
    assert llm.plan.contexts_at_once == sequences
print(json.dumps([stats.peak_rss_bytes, stats.process_floor_bytes, stats.memory_bytes, stats.evictions]))
"""


@pytest.mark.parametrize(
    ("context", "sequences", "temperatures"), [(1024, 1, ["1", "0"]), (256, 8, ["1"]), (512, 6, ["0"])]
)
def test_the_least_memory_is_enough_for_full_contexts(
    store: Path, context: int, sequences: int, temperatures: list[str]
) -> None:
    """No slack at all: the arena has two slots, every step has all its rows."""
    command = [sys.executable, "-c", LEAST, str(store), str(context), str(sequences), *temperatures]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, floor, memory, evictions = json.loads(done.stdout)
    assert evictions > 0
    assert peak <= floor + memory, f"{(peak - floor) / 2**20:.2f} MiB used of {memory / 2**20:.2f}"


@pytest.fixture(scope="module")
def free(store: Path) -> dict[str, object]:
    """What a process without a limit does in 40 MiB."""
    return _generate(store, "40MiB")


def test_peak_memory_stays_within_floor_plus_budget(free: dict[str, object]) -> None:
    stats = free["stats"]
    assert isinstance(stats, dict)
    assert stats["misses"] > 0
    assert stats["peak_rss_bytes"] <= stats["process_floor_bytes"] + stats["memory_bytes"]


CGROUPS = ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max"))
"""Where memory cgroups of version 1 and 2 are, and the file that holds their limit."""


@pytest.fixture
def memory_limit() -> Iterator[Path]:
    """The file that limits a new memory cgroup; needs root and a writable hierarchy."""
    for parent, name in CGROUPS:
        folder = parent / f"moestro-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / name).write_text(str(4 << 30))
            yield folder / name
            return
        except OSError:
            continue
        finally:
            folder.rmdir()
    pytest.skip("no memory cgroup can be made here (that takes root and a writable /sys/fs/cgroup)")


def test_it_runs_in_a_memory_cgroup_of_floor_plus_budget(
    store: Path, free: dict[str, object], memory_limit: Path
) -> None:
    """The limit counts page cache and kernel memory too; a process that needs more is killed."""
    stats = free["stats"]
    assert isinstance(stats, dict)
    limit = stats["process_floor_bytes"] + stats["memory_bytes"]
    memory_limit.write_text(str(limit))

    def enter() -> None:
        (memory_limit.parent / "cgroup.procs").write_text(str(os.getpid()))

    held = _generate(store, "40MiB", enter)
    assert held["token_ids"] == free["token_ids"]
