"""How planes are read, one thing changed at a time: decoding and prompts of one store under little memory.

    python benchmarks/io.py STORE --share 0.25 --variants default,single,threads=4 --runs 3 --tokens 48

Variants: `default`; `single` (no two planes in a request); `threads=N`; `buffered` (through the page cache);
`small-pages` (4 KiB); `order=arrival|hebf|johnson`. Beside each one, plain direct reads of whole experts in the same
process, and what the limit would be: the bytes that were read at that speed, or the computation alone, whichever is
longer. The computation is measured by --share 1 (`--compute-ms` is what it found).
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from moestro import LLM, SamplingParams
from moestro.config import RuntimeOptions
from moestro.memory import pages
from moestro.memory.direct import FileReader
from moestro.memory.pages import HostBuffer
from moestro.memory.transfer import THREADS, TransferEngine
from moestro.runtime import open as runtime_open
from moestro.runtime.subject import Subject
from moestro.store.reader import Store

CONTEXT, PROMPT, LONG_PROMPT = 512, 32, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--variants", default="default")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--compute-ms", type=float, default=0.0)
    asked = parser.parse_args()
    store = Store.open(asked.store)
    for variant in asked.variants.split(","):
        with _changed(variant) as options:
            _measure(store, variant, options, asked)


@contextmanager
def _changed(variant: str) -> Iterator[dict[str, str]]:
    """What a variant changes below the options, and its options."""
    name, _, value = variant.partition("=")
    threads = int(value) if name == "threads" else THREADS
    request = {"request_bytes": 4096} if name == "single" else {}
    with patch.object(runtime_open, "_transfers", lambda _, clock: TransferEngine(threads, clock=clock, **request)):
        if name == "buffered":
            with patch.object(FileReader, "_open_direct", lambda *_: None):
                yield {}
        elif name == "small-pages":
            with patch.object(pages, "_ask_for_huge_pages", _forbid_huge_pages):
                yield {}
        else:
            yield {"order": value} if name == "order" else {}


def _forbid_huge_pages(mapping: mmap.mmap, _start: int, _nbytes: int) -> None:
    mapping.madvise(mmap.MADV_NOHUGEPAGE)


def _measure(store: Store, variant: str, options: dict[str, str], asked: argparse.Namespace) -> None:
    manifest = store.manifest
    planes = [
        plane for plane in store.layers[0].layout.planes if not manifest.levels or plane.level <= manifest.exact_level
    ]
    chain = sum(plane.nbytes for plane in planes)
    experts = chain * sum(layer.num_experts for layer in store.layers)
    memory = Subject.of_store(store).plan(RuntimeOptions(context=CONTEXT)).bytes_for_experts(asked.share)
    with LLM(store.path, memory=memory, context=CONTEXT, **options) as llm:
        _decode(llm, asked, seed=0)  # touches the memory, fills the cache
        runs = [_decode(llm, asked, seed=run + 1) for run in range(asked.runs)]
        prefill = statistics.median(_prefill(llm, seed=run) for run in range(asked.runs))
        arena = llm.plan.arena_bytes / experts
        slowest = llm.stats().slowest_read_s
    plain = _plain_reads(store, chain)
    ms, megabytes, gigabytes_per_s, stall = (statistics.median(column) for column in zip(*runs, strict=True))
    roofline = max(megabytes / plain if plain else 0.0, asked.compute_ms)  # MB at GB/s are ms
    print(
        f"{variant:16s} {arena:.0%} of experts: {ms:6.1f} ms/token ({1e3 / ms:5.2f} tokens/s, "
        f"{min(run[0] for run in runs):.1f} to {max(run[0] for run in runs):.1f} ms), {megabytes:.0f} MB/token "
        f"at {gigabytes_per_s:.2f} GB/s while reading, plain {plain:.2f}; waits {stall:.0%}; "
        f"limit {roofline:.1f} ms, {ms / max(roofline, 1e-9):.2f}x; prompt {prefill:.1f} tokens/s; "
        f"slowest request {1e3 * slowest:.0f} ms",
        flush=True,
    )


def _decode(llm: LLM, asked: argparse.Namespace, *, seed: int) -> tuple[float, float, float, float]:
    """Milliseconds and megabytes per token, gigabytes per second while the disk is busy, share of time waited."""
    sampling = SamplingParams(max_tokens=asked.tokens + 1, temperature=asked.temperature, seed=seed, ignore_eos=True)
    pieces = llm.stream(_prompt(PROMPT, seed), sampling)
    next(pieces)
    before, busy, start = llm.stats(), llm._model.transfers.stats.busy_seconds, time.perf_counter()
    for _ in pieces:
        pass
    seconds, after = time.perf_counter() - start, llm.stats()
    nbytes, busy = after.bytes_read - before.bytes_read, llm._model.transfers.stats.busy_seconds - busy
    waited = after.stall_s - before.stall_s
    return 1e3 * seconds / asked.tokens, nbytes / asked.tokens / 1e6, nbytes / max(busy, 1e-9) / 1e9, waited / seconds


def _prefill(llm: LLM, *, seed: int) -> float:
    start = time.perf_counter()
    llm.generate([_prompt(LONG_PROMPT, 100 + seed)], SamplingParams(max_tokens=1, ignore_eos=True))
    return LONG_PROMPT / (time.perf_counter() - start)


def _prompt(length: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(1000, 50000) for _ in range(length)]


def _plain_reads(store: Store, nbytes: int) -> float:
    """Gigabytes per second of direct reads of whole experts, two at a time, the median of three."""
    room = pages.round_up(nbytes, 2 << 20)
    buffer = HostBuffer(2 * room)
    buffer.populate()
    extent = store.plane((0, 0, 0))
    descriptor = os.open(extent.file, os.O_RDONLY | os.O_DIRECT)
    try:
        return statistics.median(_plain_run(store, descriptor, buffer, nbytes, room) for _ in range(3))
    except OSError:
        return 0.0
    finally:
        os.close(descriptor)


def _plain_run(store: Store, descriptor: int, buffer: HostBuffer, nbytes: int, room: int) -> float:
    done, start = [0, 0], time.perf_counter()

    def work(number: int) -> None:
        chance, view = random.Random(number), buffer.view(number * room, nbytes)
        while time.perf_counter() < start + 0.7:
            layer = chance.randrange(len(store.layers))
            expert = chance.randrange(store.layers[layer].num_experts)
            done[number] += os.preadv(descriptor, [view], store.plane((layer, expert, 0)).offset)

    workers = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - start) / 1e9


if __name__ == "__main__":
    main()
