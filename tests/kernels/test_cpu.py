"""The compiled module's pool, scratch memory and instruction sets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moestro import _native
from moestro.kernels.cpu import CpuKernels, scratch_bytes


def attend(kernels: CpuKernels, *, rows: int, positions: int, heads: int, heads_kv: int, dim: int) -> torch.Tensor:
    pool = torch.ones(positions, heads_kv, 1, dim)
    return kernels.attention(
        torch.ones(rows, heads, dim),
        pool,
        pool,
        torch.arange(positions, dtype=torch.int32)[None],
        torch.zeros(rows, dtype=torch.int32),
        torch.arange(positions - rows, positions, dtype=torch.int32),
        scale=1.0,
    )


def test_isas_end_with_the_fallback_and_unknown_ones_are_named() -> None:
    isas = _native.available_isas()
    assert isas[-1] == "scalar"
    assert _native.get_isa() == isas[0]
    with pytest.raises(ValueError, match=r"'sse9'.*scalar"):
        _native.set_isa("sse9")


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_bad_thread_counts_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=str(threads)):
        CpuKernels(threads=threads)


def test_thread_count_is_the_last_set() -> None:
    CpuKernels(threads=3)
    assert _native.get_threads() == 3
    CpuKernels(threads=1)
    assert _native.get_threads() == 1


def test_workers_exist_as_many_as_asked() -> None:
    CpuKernels(threads=1)
    alone = len(os.listdir("/proc/self/task"))
    CpuKernels(threads=4).linear(torch.ones(64, 256), torch.ones(256, 256))
    assert len(os.listdir("/proc/self/task")) == alone + 3
    CpuKernels(threads=1)
    assert len(os.listdir("/proc/self/task")) == alone


def test_callers_from_several_threads_take_turns() -> None:
    kernels = CpuKernels(threads=3)
    x_TK, weight_NK = torch.randn(70, 300), torch.randn(120, 300)
    expected = [kernels.linear(x_TK[:tokens], weight_NK) for tokens in (1, 9, 70)]
    wrong = []

    def work() -> None:
        for turn in range(60):
            which = turn % 3
            if not torch.equal(kernels.linear(x_TK[: (1, 9, 70)[which]], weight_NK), expected[which]):
                wrong.append(turn)

    with ThreadPoolExecutor(6) as callers:
        for caller in [callers.submit(work) for _ in range(6)]:
            caller.result()
    assert not wrong


def test_pool_may_be_resized_while_others_call() -> None:
    kernels = CpuKernels(threads=2)
    x_TK, weight_NK = torch.randn(40, 256), torch.randn(100, 256)
    expected = kernels.linear(x_TK, weight_NK)
    stop = threading.Event()

    def resize() -> None:
        threads = 1
        while not stop.is_set():
            _native.set_threads(threads)
            threads = threads % 4 + 1

    resizer = threading.Thread(target=resize)
    resizer.start()
    try:
        assert all(torch.equal(kernels.linear(x_TK, weight_NK), expected) for _ in range(100))
    finally:
        stop.set()
        resizer.join()


def test_gil_is_released_during_a_kernel() -> None:
    kernels = CpuKernels(threads=1)
    x_TK, weight_NK = torch.ones(600, 1024), torch.ones(1024, 1024)
    _native.set_isa("scalar")  # makes the call long
    ticks: list[int] = []
    done = threading.Event()
    running = threading.Event()

    def call() -> None:
        running.set()
        kernels.linear(x_TK[:100], weight_NK[:200])
        done.set()

    caller = threading.Thread(target=call)
    caller.start()
    running.wait()
    while not done.is_set():
        ticks.append(1)
        done.wait(0.001)
    caller.join()
    _native.set_isa(_native.available_isas()[0])
    assert len(ticks) > 5


def test_forked_child_computes() -> None:
    program = """
import os, torch
from moestro.kernels.cpu import CpuKernels
kernels = CpuKernels(threads=3)
x, w = torch.randn(64, 256), torch.randn(256, 256)
expected = kernels.linear(x, w)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(kernels.linear(x, w), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(kernels.linear(x, w), expected)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_process_ends_cleanly_with_sleeping_workers() -> None:
    program = "import torch; from moestro.kernels.cpu import CpuKernels\n"
    program += "CpuKernels(threads=4).linear(torch.ones(64, 256), torch.ones(256, 256))"
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (signal.strsignal(-done.returncode) if done.returncode < 0 else "", done.stderr)
    assert done.stderr == ""


@pytest.mark.parametrize(("heads", "heads_kv", "rows"), [(4, 4, 40), (8, 2, 40), (64, 1, 3), (1, 1, 1)])
def test_scratch_stays_within_what_is_planned(isa: str, heads: int, heads_kv: int, rows: int) -> None:
    _native.set_threads(1)
    _native.set_threads(2)  # forgets the second thread's scratch; the first thread's may be from other tests
    before = _native.scratch_bytes()
    kernels = CpuKernels(threads=2)
    attend(kernels, rows=rows, positions=700, heads=heads, heads_kv=heads_kv, dim=33)
    kernels.linear(torch.ones(70, 600), torch.ones(64, 600))
    planned = scratch_bytes(threads=2, positions=700, value_dim=33)
    assert _native.scratch_bytes() <= max(planned, before + planned // 2)


def test_scratch_grows_with_the_positions() -> None:
    small = scratch_bytes(threads=2, positions=100_000, value_dim=128)
    assert scratch_bytes(threads=2, positions=200_000, value_dim=128) > 1.9 * small
    assert small < 2 * 16 * (100_000 + 200) * 4
    assert scratch_bytes(threads=4, positions=100_000, value_dim=128) == 2 * small


def test_sum_words_reads_everything() -> None:
    data = torch.arange(100_003, dtype=torch.int64)
    CpuKernels(threads=2)
    assert _native.sum_words(data.data_ptr(), data.nbytes) == int(data.sum())
    assert _native.sum_words(data.data_ptr(), 0) == 0
