"""What is found out about a machine, and what it means in words."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from moestro import _native
from moestro.cores import available_cores
from moestro.doctor.reads import DiskReadings, choose, measure_reads
from moestro.doctor.sample import planes_file, temporary_file
from moestro.kernels import make_kernels
from moestro.memory.budget import format_bytes, machine_bytes
from moestro.memory.disk_profile import DiskProfile, device_of

_MATRIX_ROWS, _MATRIX_COLUMNS = 32768, 2048  # 128 MiB in bfloat16: more than any processor's caches
_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Bytes, bytes per second, and what was chosen. `read_file` is what was read: a store's planes, or "" for a
    temporary file; `chain_bytes` (0 without a store) what an expert's planes take at the store's exact level, and
    `token_bytes` those of all the experts that a token uses.
    """

    path: str
    read_file: str
    disk: DiskReadings
    profile: DiskProfile
    memory_bytes_per_s: float
    machine_bytes: int
    cores: int
    isa: str
    chain_bytes: int
    token_bytes: int

    def words(self) -> list[str]:
        """What it means for moestro, a sentence or two for each thing."""
        return [
            text for text in (self._speed(), self._pages(), self._cache(), self._computing(), self._token()) if text
        ]

    def _speed(self) -> str:
        chosen, slow = self.profile, min(one.bytes_per_s for one in self.disk.grid)
        return (
            f"{chosen.threads} reads at a time of up to {format_bytes(chosen.request_bytes)} reach "
            f"{_rate(chosen.bytes_per_s)}; the slowest combination tried reached {_rate(slow)}. Models on this disk "
            "will be read that way."
        )

    def _pages(self) -> str:
        huge, small = self.profile.bytes_per_s, self.disk.small_pages_bytes_per_s
        if not self.disk.direct:
            return "The file system refuses direct reads: planes take memory in the page cache beside the budget."
        if huge > 1.2 * small:
            return f"Huge pages matter here: reads into 4 KiB pages reach {_rate(small)}. moestro asks for huge pages."
        return f"Huge pages make little difference: reads into 4 KiB pages reach {_rate(small)}."

    def _cache(self) -> str:
        if not self.disk.direct:
            return ""
        return f"Reads through the page cache reach {_rate(self.disk.buffered_bytes_per_s)}; moestro reads past it."

    def _computing(self) -> str:
        ratio = self.memory_bytes_per_s / self.profile.bytes_per_s
        return (
            f"The processor ({self.cores} cores, kernels for {self.isa}) computes with weights at "
            f"{_rate(self.memory_bytes_per_s)}, {ratio:.0f} times as fast as the disk brings them: of {ratio:.0f} "
            "experts that a token uses, about one can be read without waiting. "
            f"This process may use {format_bytes(self.machine_bytes)} of memory."
        )

    def _token(self) -> str:
        if not self.chain_bytes:
            return ""
        speed = self.profile.bytes_per_s
        return (
            f"An expert of this store has {format_bytes(self.chain_bytes)}, {1e3 * self.chain_bytes / speed:.2f} ms; "
            f"if none were in memory, a token's experts ({format_bytes(self.token_bytes)}) would take "
            f"{1e3 * self.token_bytes / speed:.0f} ms: at least {speed / self.token_bytes:.1f} tokens per second."
        )


def examine(path: Path, *, store: Path | None = None) -> Diagnosis:
    """Measure the disk that holds `path`, or the files of `store` and nothing else; the rest of the machine as well.

    Takes some ten seconds and 128 MiB of memory.

    Raises:
        DiskError: the disk cannot be measured there.
        StoreError: `store` is no store.
    """
    where = path if store is None else store
    with _file(where, store) as file:
        readings, device = measure_reads(file), device_of(file)
    best = choose(readings.grid)
    cores = available_cores()
    chain_bytes, token_bytes = (0, 0) if store is None else _expert_bytes(store)
    return Diagnosis(
        path=str(where),
        read_file=str(file) if store is not None else "",
        disk=readings,
        profile=DiskProfile(
            device=device, threads=best.threads, request_bytes=best.block_bytes, bytes_per_s=best.bytes_per_s
        ),
        memory_bytes_per_s=_memory_speed(cores),
        machine_bytes=machine_bytes(),
        cores=cores,
        isa=_native.get_isa(),
        chain_bytes=chain_bytes,
        token_bytes=token_bytes,
    )


@contextmanager
def _file(where: Path, store: Path | None) -> Iterator[Path]:
    if store is not None:
        yield planes_file(store)
    else:
        with temporary_file(where) as file:
            yield file


def _expert_bytes(path: Path) -> tuple[int, int]:
    """Of one expert at the store's exact level, and of all that a token uses."""
    from moestro.runtime.subject import Subject

    subject = Subject.open(str(path))
    each = subject.shape(0).bytes_per_expert
    return max(each), sum(nbytes * picks for nbytes, picks in zip(each, subject.experts_per_token, strict=True))


def _memory_speed(threads: int) -> float:
    """Bytes per second at which the kernels take in a matrix that is in no cache: the median of some runs."""
    kernels = make_kernels("auto", threads=threads)
    matrix_NK = torch.ones(_MATRIX_ROWS, _MATRIX_COLUMNS, dtype=torch.bfloat16)
    row_1K = torch.ones(1, _MATRIX_COLUMNS)
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        kernels.linear(row_1K, matrix_NK, None)
        seconds.append(time.perf_counter() - start)
    return matrix_NK.nbytes / statistics.median(seconds)


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.1f} MB/s"
