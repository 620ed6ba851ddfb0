"""Which tokens of which requests go into the next step: decoding rows first, then prompts, up to the step's rows."""

from __future__ import annotations

import time

from moestro.engine.prefixes import Prefixes
from moestro.engine.sequence import Sequence
from moestro.engine.waiting import WaitingLine
from moestro.errors import MoestroError, PlaneReadError
from moestro.runtime.batch import PackedBatch, Segment
from moestro.runtime.variants import Variants


class Scheduler:
    """Who runs. A request starts when its whole KV room is free, so that it can never starve midway. With `alike` those
    start together whose prompts share tokens, and so experts.

    One that waits may take the place of one that runs and has a lower rank (a higher `priority`), once at most for each
    that gives way: what it has computed so far is kept as long as there is room, and computed again otherwise. One
    whose variant has no room beside those that run waits as well, and whoever comes after it.
    """

    def __init__(
        self,
        *,
        prefixes: Prefixes,
        max_sequences: int,
        step_rows: int,
        variants: Variants | None = None,
        alike: bool = False,
    ) -> None:
        self._prefixes, self._variants = prefixes, variants
        self._max_sequences = max_sequences
        self._step_rows = step_rows
        self._waiting = WaitingLine(alike=alike)
        self._running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def running(self) -> bool:
        """Whether there is anything for a step."""
        return bool(self._running)

    def add(self, sequence: Sequence) -> None:
        self._waiting.add(sequence)

    def next_step(self) -> tuple[PackedBatch, list[Sequence]]:
        """The packed batch of the next step, and the requests that get a new token from it, in order of logits.

        Some request runs, as `admit` has it.
        """
        taken: list[tuple[Segment, Sequence]] = []
        room = self._step_rows
        for sequence in sorted(self._running, key=_long_last):
            tokens = sequence.pending(room)
            if not tokens:
                continue
            complete = sequence.is_complete_after(len(tokens))
            decode = bool(sequence.token_ids) and len(tokens) == 1
            variant, budget = sequence.slot, sequence.budget
            segment = Segment(
                sequence.number, tokens, sequence.cached, sequence.blocks, complete, decode, budget, variant
            )
            taken.append((segment, sequence))
            room -= len(tokens)
        taken.sort(key=_variant)
        sampled = [sequence for segment, sequence in taken if segment.wants_logits]
        return PackedBatch([segment for segment, _ in taken]), sampled

    def commit(self, batch: PackedBatch) -> None:
        """The batch went through: its rows are cached. Until then, the same rows come again with the next step."""
        ends = {segment.request: segment.end for segment in batch.segments}
        for sequence in self._running:
            if sequence.number in ends:
                sequence.cached = ends[sequence.number]
                self._prefixes.written(sequence)

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
            self._stop(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def admit(self) -> list[Sequence]:
        """Have requests begin to run, as many as there is room for. Returns those that ended because they cannot."""
        failed: list[Sequence] = []
        while self._waiting:
            first = self._waiting.first(self._running)
            if self._prefixes.is_coming(first, self._running):
                break
            if len(self._running) == self._max_sequences and not self._make_way(first):
                break
            try:
                if not self._start(first):
                    break
            except MoestroError as error:
                self._waiting.remove(first)
                first.fail(error)
                failed.append(first)
                continue
            self._waiting.start(first)
            if not first.started_at:
                first.started_at = time.perf_counter()
                first.reused = first.cached
            self._running.append(first)
        return failed

    def _start(self, sequence: Sequence) -> bool:
        """Give it what it needs, if that can be had now. Raises MoestroError when its variant cannot be read."""
        variant = sequence.variant
        if variant is None:
            return self._prefixes.start(sequence)
        assert self._variants is not None
        if not self._variants.enter(variant):
            return False
        if self._prefixes.start(sequence):
            return True
        self._variants.leave(variant)
        return False

    def _stop(self, sequence: Sequence) -> None:
        """It runs no more, for now at least."""
        self._running.remove(sequence)
        self._prefixes.end(sequence)
        if sequence.variant is not None:
            assert self._variants is not None
            self._variants.leave(sequence.variant)

    def _make_way(self, first: Sequence) -> bool:
        """Have the last of those of lower rank give up its place, if there is one."""
        lower = [one for one in self._running if one.priority > first.priority and not one.yielded]
        if not lower:
            return False
        last = max(lower, key=lambda one: (one.priority, one.number))
        self._stop(last)
        last.yielded = True
        self._waiting.add_back(last)
        return True


def _variant(one: tuple[Segment, Sequence]) -> int:
    return one[0].variant


def _long_last(sequence: Sequence) -> bool:
    """Prompts, and what has to be computed again, come after those that need one row."""
    return sequence.cached + 1 < sequence.known_tokens or not sequence.token_ids
