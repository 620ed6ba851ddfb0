"""Speed of a model through the same engine that serves it, beside what the machine allows for the bytes it moved.

A run of one request: its prompt goes in until its first token is there (prefill), then tokens are decoded one by one.
Several requests begin one after another, as if they arrived then; decoding is measured when all of them decode.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moestro.config import BenchOptions, RuntimeOptions, SamplingParams
from moestro.engine.bandwidth import disk_bandwidth, memory_bandwidth, multiplications_per_second
from moestro.engine.llm import LLM
from moestro.engine.results import Delta, Stats
from moestro.engine.roofline import Bound, Costs, Machine, Work, bound_of
from moestro.errors import RequestError
from moestro.memory.budget import peak_resident_bytes
from moestro.runtime.batch import STEP_ROWS
from moestro.runtime.plan import compute_threads
from moestro.runtime.replay import Replay
from moestro.runtime.subject import Subject
from moestro.store.reader import Store
from moestro.trace import Trace


@dataclass(frozen=True)
class Spread:
    """Of the runs."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Phase:
    """Prefill or decoding, all runs together.

    `hits` and `misses` count experts of a layer and step that were in memory or not; `wasted_bytes` are those of
    `bytes_read` that were read ahead for nothing. `bound` is the least time per token, by what was longest;
    `roofline_tokens_per_s` the rate that it allows.
    """

    tokens_per_s: Spread
    tokens: int
    hits: int
    misses: int
    bytes_read: int
    wasted_bytes: int
    bytes_read_per_token: float
    stall_share: float
    memory_bytes_per_token: float
    bound: Bound
    roofline_tokens_per_s: float


@dataclass(frozen=True)
class BenchResult:
    """What was measured. Sizes in bytes, times in seconds; `peak_rss_bytes` is from before the machine was measured."""

    prefill: Phase
    decode: Phase
    machine: Machine
    stats: Stats
    threads: int
    load_s: float
    peak_rss_bytes: int
    dense_bytes_per_step: int


@dataclass(frozen=True)
class BenchProgress:
    """Runs done and in all, warming up included."""

    done: int
    total: int


def bench(
    store_path: Path,
    *,
    options: RuntimeOptions | None = None,
    what: BenchOptions | None = None,
    progress: Callable[[BenchProgress], None] | None = None,
) -> BenchResult:
    """Measure a store. `options.max_sequences` is taken from `what`; a context of 0 is the least that the runs need.
    Nothing is learned from them. Where levels are chosen per token, the bytes of experts count as at the full level.

    Raises:
        RequestError: the text is too short, or a run does not fit the context.
        TraceError: the routing to be replayed cannot be read, or is of a model of another shape.
        MoestroError: as `LLM`.
    """
    what = what or BenchOptions()
    return _Bench(store_path, options or RuntimeOptions(), what, progress or (lambda _: None)).run()


@dataclass
class _Sample:
    """One phase of one run."""

    seconds: float
    tokens: int
    before: Stats
    after: Stats
    work: Work

    def count(self, name: str) -> int:
        return int(getattr(self.after, name) - getattr(self.before, name))


class _Bench:
    def __init__(
        self, path: Path, options: RuntimeOptions, what: BenchOptions, progress: Callable[[BenchProgress], None]
    ) -> None:
        self._what, self._progress = what, progress
        self._subject = Subject.of_store(Store.open(path))
        self._replay = self._read_trace()
        self._chunks = [
            (first, min(first + STEP_ROWS, what.prompt_tokens)) for first in range(0, what.prompt_tokens, STEP_ROWS)
        ]
        # Requests decode while others are prompted, and until all have caught up.
        self._spare = (len(self._chunks) + 1) * (what.concurrency - 1) + 2
        needed = what.prompt_tokens + what.gen_tokens + self._spare
        # A measurement, under replayed routing above all, is nothing to be remembered, in the store or between runs.
        self._options = replace(
            options,
            max_sequences=what.concurrency,
            context=options.context or needed,
            learn="off",
            prefix_cache=False,
            lend_kv=False,
            guides=False,
        )
        if self._options.context < needed:
            raise RequestError(
                f"A run needs a context of {needed} tokens, and {options.context} were asked for. Leave --context out, "
                "or ask for fewer tokens."
            )
        self._samples: dict[str, list[_Sample]] = {"prefill": [], "decode": []}
        self._text_ids: list[int] = []

    def run(self) -> BenchResult:
        what, path = self._what, self._subject.path
        runs = [True] * what.repeat if what.cold else [False] * what.warmup + [True] * what.repeat
        llm = None if what.cold else self._open(path)
        try:
            for number, measured in enumerate(runs):
                if what.cold:
                    if llm is not None:
                        llm.close()
                    evict(path)
                    llm = self._open(path)
                assert llm is not None
                self._one_run(llm, number, measured=measured)
                self._progress(BenchProgress(number + 1, len(runs)))
            assert llm is not None
            stats, plan, load_s = llm.stats(), llm.plan, self._load_s
        finally:
            if llm is not None:
                llm.close()
        peak = peak_resident_bytes()
        threads = compute_threads(self._options)
        store = Store.open(path)
        machine = Machine(
            memory_bandwidth=memory_bandwidth(),
            disk_bandwidth=disk_bandwidth(store, plan.level),
            multiplications_per_s=multiplications_per_second(store, plan.level, threads),
        )
        return BenchResult(
            prefill=_phase(self._samples["prefill"], machine),
            decode=_phase(self._samples["decode"], machine),
            machine=machine,
            stats=stats,
            threads=threads,
            load_s=load_s,
            peak_rss_bytes=peak,
            dense_bytes_per_step=self._costs.dense_bytes,
        )

    def _read_trace(self) -> Replay | None:
        if not self._what.replay_routing:
            return None
        trace = Trace.load(self._what.replay_routing)
        experts = [layer.num_experts for layer in self._subject.skeleton.expert_layers]
        return Replay(trace, experts=experts, picks=self._subject.experts_per_token)

    def _open(self, path: Path) -> LLM:
        started = time.perf_counter()
        llm = LLM(path, options=self._options)
        self._load_s = time.perf_counter() - started
        if self._replay is not None:
            llm._open.runner.replay_routing(self._replay)
        self._costs = Costs.of(Store.open(path), self._subject.skeleton, llm.plan)
        if self._what.text and not self._text_ids:
            self._text_ids = _ids_of(llm, Path(self._what.text), self._what.prompt_tokens)
        return llm

    def _prompts(self, number: int) -> list[list[int]]:
        what, vocabulary = self._what, int(self._subject.skeleton.config.vocab_size)
        if self._text_ids:
            places = len(self._text_ids) // what.prompt_tokens
            starts = [
                (number * what.concurrency + one) % places * what.prompt_tokens for one in range(what.concurrency)
            ]
            return [self._text_ids[start : start + what.prompt_tokens] for start in starts]
        random = np.random.default_rng([what.seed, number])
        return [list(map(int, random.integers(vocabulary, size=what.prompt_tokens))) for _ in range(what.concurrency)]

    def _one_run(self, llm: LLM, number: int, *, measured: bool) -> None:
        what = self._what
        streams = [
            llm.stream(prompt, self._sampling(number * what.concurrency + one))
            for one, prompt in enumerate(self._prompts(number))
        ]
        try:
            stats, started = llm.stats(), time.perf_counter()
            for stream in streams:
                next(stream)
            seconds, after = time.perf_counter() - started, llm.stats()
            prefill = self._prefill(seconds, stats, after)
            if len(streams) > 1:
                _round(streams)  # the first ones are ahead
            stats, started = llm.stats(), time.perf_counter()
            for _ in range(what.gen_tokens):
                _round(streams)
            decode = self._decode(time.perf_counter() - started, stats, llm.stats())
        finally:
            for stream in streams:
                stream.close()  # type: ignore[attr-defined]
        if measured:
            self._samples["prefill"].append(prefill)
            self._samples["decode"].append(decode)

    def _sampling(self, number: int) -> SamplingParams:
        most = self._what.gen_tokens + self._spare
        seed = self._what.seed * 1_000_003 + number
        return SamplingParams(max_tokens=most, temperature=1.0, seed=seed, ignore_eos=True)

    def _prefill(self, seconds: float, before: Stats, after: Stats) -> _Sample:
        chunks = self._chunks * self._what.concurrency
        return self._sample(seconds, chunks, len(chunks), self._what.concurrency, before, after)

    def _decode(self, seconds: float, before: Stats, after: Stats) -> _Sample:
        what = self._what
        first = what.prompt_tokens
        chunks = [(place, place + 1) for place in range(first, first + what.gen_tokens)] * what.concurrency
        return self._sample(seconds, chunks, what.gen_tokens, len(chunks), before, after)

    def _sample(
        self, seconds: float, chunks: list[tuple[int, int]], steps: int, logit_rows: int, before: Stats, after: Stats
    ) -> _Sample:
        tokens = sum(last - first for first, last in chunks)
        sample = _Sample(seconds, tokens, before, after, Work(0, 0, 0))
        # What was read ahead for nothing was not needed: the bound is stricter without it.
        needed = max(0, sample.count("bytes_read") - sample.count("wasted_bytes"))
        sample.work = self._costs.work(
            chunks,
            steps=steps,
            logit_rows=logit_rows,
            experts=sample.count("hits") + sample.count("misses"),
            disk_bytes=needed,
        )
        return sample


def evict(folder: Path) -> None:
    """Have the system drop what it caches of the files in a folder (those that are not being written)."""
    for path in folder.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _round(streams: list[Iterator[Delta]]) -> None:
    """One step: the last stream runs it, the others have got their tokens from the step before."""
    for stream in streams:
        next(stream)


def _ids_of(llm: LLM, path: Path, least: int) -> list[int]:
    """The text as token ids. Raises RequestError, OSError."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text ({error}). Expected a text file.") from error
    token_ids: list[int] = llm.tokenizer(text)["input_ids"]
    if len(token_ids) < least:
        raise RequestError(f"{path} has {len(token_ids)} tokens, expected at least a prompt's {least}.")
    return token_ids


def _phase(samples: list[_Sample], machine: Machine) -> Phase:
    seconds, tokens = sum(one.seconds for one in samples), sum(one.tokens for one in samples)
    counts = {
        name: sum(one.count(name) for one in samples) for name in ("hits", "misses", "bytes_read", "wasted_bytes")
    }
    work = Work(
        memory_bytes=sum(one.work.memory_bytes for one in samples) / tokens,
        disk_bytes=sum(one.work.disk_bytes for one in samples) / tokens,
        multiplications=sum(one.work.multiplications for one in samples) / tokens,
    )
    bound = bound_of(work, machine)
    return Phase(
        tokens_per_s=Spread.of([one.tokens / one.seconds for one in samples]),
        tokens=tokens,
        **counts,
        bytes_read_per_token=counts["bytes_read"] / tokens,
        stall_share=sum(one.after.stall_s - one.before.stall_s for one in samples) / seconds,
        memory_bytes_per_token=work.memory_bytes,
        bound=bound,
        roofline_tokens_per_s=1 / bound.seconds,
    )
