"""A packed batch: the tokens of all requests of one step in a single row, and who owns which.

Shapes: T rows (tokens) of the batch, S sequences in it, M blocks of the longest table, R rows of all histories.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import torch

from moestro.policy.observation import RequestRows
from moestro.runtime.kv import BLOCK_ROWS, RowAddress

STEP_ROWS = 512
"""Most tokens in one forward pass. It never depends on the memory given, so that results cannot either."""

BASE = -1
"""In the place of a variant's number: none."""


class Run(NamedTuple):
    """Rows `first` to `end` (not included) of a step run on the variant of this number."""

    variant: int
    first: int
    end: int


@dataclass(frozen=True)
class Segment:
    """One sequence's share of a step: its new tokens, where they start, its KV blocks, whether logits are wanted.

    `request` is the request's number, by which traces know it; `decode` says that its new token is of the answer;
    `budget` are the nats that each of its tokens may lose to lower levels, 0 for none; `variant` is the number of the
    variant that it runs on, `BASE` for none.
    """

    request: int
    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    wants_logits: bool
    decode: bool = False
    budget: float = 0.0
    variant: int = BASE

    @property
    def end(self) -> int:
        """Length of the sequence after this step."""
        return self.start + len(self.token_ids)


class PackedBatch:
    """`segments` back to back: rows of segment i follow those of segment i - 1. They ascend by variant.

    `runs` are the rows of variants; those before them are the base's.

    `every_row`: all rows of segments that want logits get them, not the last row alone.
    """

    def __init__(self, segments: Sequence[Segment], *, every_row: bool = False) -> None:
        assert segments
        assert all(segment.token_ids for segment in segments)
        self.segments = tuple(segments)
        lengths = [len(segment.token_ids) for segment in segments]
        self.rows = sum(lengths)
        self.runs = _runs(segments, lengths)
        self.token_ids_T = torch.tensor([token for segment in segments for token in segment.token_ids])
        positions_T = np.concatenate([np.arange(segment.start, segment.end) for segment in segments])
        sequence_T = np.repeat(np.arange(len(segments)), lengths)
        self.positions_T = torch.from_numpy(positions_T)
        self.sequence_T = torch.from_numpy(sequence_T.astype(np.int32))
        self.position32_T = torch.from_numpy(positions_T.astype(np.int32))
        self.block_table_SM = _block_table(segments)
        self.new_rows = _row_address(self.block_table_SM.numpy(), sequence_T, positions_T)
        ends = np.cumsum(lengths)
        self.logit_rows = torch.tensor(
            [
                row
                for end, length, segment in zip(ends.tolist(), lengths, segments, strict=True)
                if segment.wants_logits
                for row in range(end - (length if every_row else 1), end)
            ],
            dtype=torch.int64,
        )

    def parts(self) -> Iterator[PackedBatch]:
        """The rows of the base and of each variant, as steps of their own, with the logits that they want here."""
        end = 0
        for _, some in groupby(self.segments, key=lambda segment: segment.variant):
            part = PackedBatch(tuple(some))
            first, end = end, end + part.rows
            part.logit_rows = self.logit_rows[(self.logit_rows >= first) & (self.logit_rows < end)] - first
            yield part

    def requests_of(self, rows: np.ndarray) -> frozenset[int]:
        """The requests that own these rows."""
        return frozenset(self.segments[index].request for index in set(self.sequence_T.numpy()[rows].tolist()))

    @cached_property
    def request_rows(self) -> tuple[RequestRows, ...]:
        """Which rows are whose."""
        ends = accumulate(len(segment.token_ids) for segment in self.segments)
        return tuple(
            RequestRows(segment.request, end - len(segment.token_ids), end, segment.decode)
            for segment, end in zip(self.segments, ends, strict=True)
        )

    @cached_property
    def history(self) -> RowAddress:
        """Every cached row of every sequence, sequence after sequence (R rows), this step's rows included."""
        lengths = [segment.end for segment in self.segments]
        sequence_R = np.repeat(np.arange(len(lengths)), lengths)
        positions_R = np.concatenate([np.arange(length) for length in lengths])
        return _row_address(self.block_table_SM.numpy(), sequence_R, positions_R)

    @cached_property
    def history_table(self) -> torch.Tensor:
        """Block table of gathered histories when each row counts as a block of its own: int32 [S, longest history]."""
        lengths = [segment.end for segment in self.segments]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        table = np.zeros((len(lengths), max(lengths)), dtype=np.int32)
        for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            table[index, :length] = np.arange(start, start + length)
        return torch.from_numpy(table)


def _runs(segments: Sequence[Segment], lengths: Sequence[int]) -> tuple[Run, ...]:
    if all(segment.variant == BASE for segment in segments):
        return ()
    runs: list[Run] = []
    end = 0
    for segment, length in zip(segments, lengths, strict=True):
        first, end = end, end + length
        if runs and runs[-1].variant == segment.variant:
            first = runs.pop().first
        runs.append(Run(segment.variant, first, end))
    assert [run.variant for run in runs] == sorted({run.variant for run in runs}), "segments are not by variant"
    return tuple(run for run in runs if run.variant != BASE)


def _block_table(segments: Sequence[Segment]) -> torch.Tensor:
    table = np.zeros((len(segments), max(len(segment.blocks) for segment in segments)), dtype=np.int32)
    for index, segment in enumerate(segments):
        assert len(segment.blocks) * BLOCK_ROWS >= segment.end, "a sequence outgrew its KV blocks"
        table[index, : len(segment.blocks)] = segment.blocks
    return torch.from_numpy(table)


def _row_address(table_SM: np.ndarray, sequence_T: np.ndarray, positions_T: np.ndarray) -> RowAddress:
    blocks_T = table_SM[sequence_T, positions_T // BLOCK_ROWS].astype(np.int64)
    return RowAddress(torch.from_numpy(blocks_T), torch.from_numpy(positions_T % BLOCK_ROWS))
