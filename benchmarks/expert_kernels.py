"""Speed of the compiled experts at every level, beside the speed at which this machine reads memory.

    python benchmarks/expert_kernels.py [--tokens 1,4,16,128] [--levels 2,3,4,8] [--threads N] [--isa NAME]

The shape is OLMoE's: hidden 2048, expert width 1024, eight experts in a call. Calls go through 64 experts in turn, far
more bytes than any cache holds. Medians; one call's time is divided by its experts. Codes are random.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from moestro import _native
from moestro.kernels.cpu import CpuKernels
from moestro.kernels.specs import ActivationSpec, ExpertJobs, ExpertSpec, MatrixSpec
from moestro.quant import LEVELS, make_encoding
from moestro.quant.groups import group_size, groups, padded_rows
from moestro.quant.tiles import HEADER

EXPERTS = 64
IN_A_CALL = 8


@dataclass(frozen=True)
class Pool:
    """Planes of all experts in one piece of memory, and where each lies: [EXPERTS, 4]."""

    spec: ExpertSpec
    memory: torch.Tensor
    planes: np.ndarray
    plane_bytes: tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,4,16,128", help="tokens of each expert")
    parser.add_argument("--levels", default="2,3,4,8")
    parser.add_argument("--encoding", default="nested")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", default=_native.available_isas()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    arguments = parser.parse_args()
    _native.set_isa(arguments.isa)
    kernels = CpuKernels(threads=arguments.threads)
    pool = make_pool(arguments.encoding, arguments.hidden, arguments.width)
    bandwidth = read_bandwidth(pool, arguments.seconds)
    print(f"{arguments.isa}, {arguments.threads} threads; plain reading {bandwidth / 1e9:.1f} GB/s")
    print("| level | tokens | us per expert | GB/s | of plain reading | GMAC/s |\n|---|---|---|---|---|---|")
    for level in map(int, arguments.levels.split(",")):
        for tokens in map(int, arguments.tokens.split(",")):
            seconds = time_experts(kernels, pool, level, tokens, arguments.seconds)
            rate = sum(pool.plane_bytes[: LEVELS.index(level) + 1]) / seconds
            macs = tokens * 3 * arguments.hidden * arguments.width / seconds
            print(
                f"| {level} | {tokens} | {seconds * 1e6:.1f} | {rate / 1e9:.1f} | {rate / bandwidth:.0%} "
                f"| {macs / 1e9:.0f} |",
                flush=True,
            )


def make_pool(encoding: str, hidden: int, width: int) -> Pool:
    """Random codes under modest scales."""
    maker = make_encoding(encoding)
    shapes = ((2 * width, hidden), (hidden, width))
    sizes = [[maker.plane_bytes(*shape, level) for shape in shapes] for level in LEVELS]
    starts = [[0, -(-up // 64) * 64] for up, _ in sizes]
    plane_bytes = tuple(-(-(start[1] + size[1]) // 4096) * 4096 for start, size in zip(starts, sizes, strict=True))
    memory = mmap.mmap(-1, EXPERTS * sum(plane_bytes))
    memory.madvise(mmap.MADV_HUGEPAGE)
    pool = torch.frombuffer(memory, dtype=torch.uint8)
    pool.view(torch.int64).random_()
    planes = np.zeros((EXPERTS, len(LEVELS)), dtype=np.int64)
    place = 0
    for expert in range(EXPERTS):
        for plane, size in enumerate(plane_bytes):
            planes[expert, plane] = pool.data_ptr() + place
            if plane == 0:
                for start, shape, region_bytes in zip(starts[0], shapes, sizes[0], strict=True):
                    set_scales(pool[place + start : place + start + region_bytes], *shape)
            place += size
    up, down = (
        MatrixSpec(encoding, *shape, group_size(shape[1]), tuple(start[which] for start in starts))  # type: ignore[arg-type]
        for which, shape in enumerate(shapes)
    )
    spec = ExpertSpec(up, down, None, None, "halves", ActivationSpec("silu"))
    return Pool(spec, pool, planes, plane_bytes)


def set_scales(region: torch.Tensor, rows: int, columns: int) -> None:
    header = torch.tensor([2.0**-9, 1.75, 0.96, 0.5, 0.03, 16.0, 1.0] + [0.0] * 9)
    region[:HEADER] = header.view(torch.uint8)
    lanes = region[HEADER:].view(padded_rows(rows) // 16, groups(columns), -1)
    lanes[..., :64] = torch.full((32,), 0.1, dtype=torch.float16).view(torch.uint8)


def time_experts(kernels: CpuKernels, pool: Pool, level: int, tokens: int, seconds: float) -> float:
    """Seconds per expert."""
    rows = IN_A_CALL * tokens
    hidden_TH = torch.randn(tokens, pool.spec.up.columns)
    out_PH = torch.empty(rows, pool.spec.up.columns)
    lists = (
        np.full(IN_A_CALL, level, dtype=np.int32),
        np.arange(0, rows + 1, tokens, dtype=np.int32),
        np.tile(np.arange(tokens, dtype=np.int32), IN_A_CALL),
        np.arange(rows, dtype=np.int32),
    )
    chosen = [np.ascontiguousarray(pool.planes[first : first + IN_A_CALL]) for first in range(0, EXPERTS, IN_A_CALL)]
    calls = [ExpertJobs(planes, *lists) for planes in chosen]
    return (
        median_seconds(lambda turn: kernels.experts(pool.spec, calls[turn % len(calls)], hidden_TH, out_PH), seconds)
        / IN_A_CALL
    )


def read_bandwidth(pool: Pool, seconds: float) -> float:
    """Bytes per second of a plain read on all threads."""
    size = pool.memory.nbytes
    return size / median_seconds(lambda _: _native.sum_words(pool.memory.data_ptr(), size), seconds)


def median_seconds(call: Callable[[int], object], seconds: float) -> float:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 10 or time.perf_counter() < end:
        start = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
