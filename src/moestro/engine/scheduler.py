"""Which tokens of which requests go into the next step: decoding rows first, then prompts, up to the step's rows."""

from __future__ import annotations

import time
from collections import deque

from moestro.engine.sequence import Sequence
from moestro.errors import PlaneReadError
from moestro.runtime.batch import PackedBatch, Segment
from moestro.runtime.kv import KVPool, blocks_for


class Scheduler:
    """First come, first served. A request starts when its whole KV room is free, so that it can never starve midway."""

    def __init__(self, *, kv: KVPool, max_sequences: int, step_rows: int) -> None:
        self._kv = kv
        self._max_sequences = max_sequences
        self._step_rows = step_rows
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def next_step(self) -> tuple[PackedBatch, list[Sequence]]:
        """The packed batch of the next step, and the requests that get a new token from it, in order of logits."""
        self._admit()
        segments: list[Segment] = []
        sampled: list[Sequence] = []
        room = self._step_rows
        for sequence in sorted(self._running, key=_prefill_last):
            tokens = sequence.pending(room)
            if not tokens:
                continue
            complete = sequence.is_complete_after(len(tokens))
            decode = bool(sequence.token_ids)
            segments.append(
                Segment(sequence.number, tokens, sequence.cached, sequence.blocks, complete, decode, sequence.budget)
            )
            if complete:
                sampled.append(sequence)
            room -= len(tokens)
        return PackedBatch(segments), sampled

    def commit(self, batch: PackedBatch) -> None:
        """The batch went through: its rows are cached. Until then, the same rows come again with the next step."""
        ends = {segment.request: segment.end for segment in batch.segments}
        for sequence in self._running:
            sequence.cached = ends.get(sequence.number, sequence.cached)

    def fail(self, batch: PackedBatch, error: PlaneReadError) -> list[Sequence]:
        """End the requests of a failed step that needed the plane, all of them if that is not known."""
        asked = {segment.request for segment in batch.segments}
        stepped = [sequence for sequence in self._running if sequence.number in asked]
        failed = [sequence for sequence in stepped if sequence.number in error.requests] or stepped
        for sequence in failed:
            sequence.fail(error)
        return failed

    def retire(self) -> list[Sequence]:
        """Free what ended requests held. Returns them."""
        ended = [sequence for sequence in self._running if sequence.finish_reason is not None]
        for sequence in ended:
            self.drop(sequence)
        return ended

    def drop(self, sequence: Sequence) -> None:
        """Take a request out, whether it has ended or not."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._kv.release(sequence.blocks)
            sequence.blocks = []
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_sequences:
            needed = blocks_for(self._waiting[0].most_rows)
            if needed > self._kv.free_blocks:
                return
            sequence = self._waiting.popleft()
            sequence.blocks = self._kv.allocate(needed)
            sequence.started_at = time.perf_counter()
            self._running.append(sequence)


def _prefill_last(sequence: Sequence) -> bool:
    return not sequence.token_ids
