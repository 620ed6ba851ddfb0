"""Packing: rows, positions, owners and block tables of one step."""

from __future__ import annotations

import pytest

from moestro.runtime.batch import PackedBatch, Segment


def test_rows_of_three_sequences_lie_back_to_back() -> None:
    batch = PackedBatch(
        [
            Segment(7, [10, 11, 12], 15, (4, 2), False),
            Segment(8, [20], 0, (5,), True),
            Segment(9, [30, 31], 33, (0, 1, 3), True),
        ]
    )
    assert batch.token_ids_T.tolist() == [10, 11, 12, 20, 30, 31]
    assert batch.positions_T.tolist() == [15, 16, 17, 0, 33, 34]
    assert batch.sequence_T.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.block_table_SM.tolist() == [[4, 2, 0], [5, 0, 0], [0, 1, 3]]
    assert batch.new_rows.block_T.tolist() == [4, 2, 2, 5, 3, 3]
    assert batch.new_rows.row_T.tolist() == [15, 0, 1, 0, 1, 2]
    assert batch.logit_rows.tolist() == [3, 5]


def test_every_row_can_get_logits_of_those_that_want_them() -> None:
    segments = [Segment(7, [1, 2], 0, (0,), True), Segment(8, [3], 0, (1,), False), Segment(9, [4, 5], 0, (2,), True)]
    assert PackedBatch(segments, every_row=True).logit_rows.tolist() == [0, 1, 3, 4]
    assert PackedBatch(segments).logit_rows.tolist() == [1, 4]


def test_history_covers_each_sequence_up_to_its_new_rows() -> None:
    batch = PackedBatch([Segment(0, [1], 2, (3,), True), Segment(1, [1, 1], 0, (1,), True)])
    assert batch.history.block_T.tolist() == [3, 3, 3, 1, 1]
    assert batch.history.row_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.history_table.tolist() == [[0, 1, 2], [3, 4, 0]]


def test_a_sequence_cannot_outgrow_its_blocks() -> None:
    with pytest.raises(AssertionError, match="outgrew"):
        PackedBatch([Segment(0, [1], 16, (0,), True)])
