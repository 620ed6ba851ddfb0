"""Which pack options go together."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.config import LEVELS, PackOptions
from moestro.errors import PackError
from moestro.quant import ENCODINGS
from moestro.quant import LEVELS as CODE_LEVELS


def test_the_defaults() -> None:
    options = PackOptions()
    assert (options.promised_levels, options.exact_level, options.dense_bits) == ((2, 3, 4, 8), 4, 8)
    assert not options.is_raw
    assert PackOptions(levels="raw").promised_levels == ()


@given(st.lists(st.sampled_from(LEVELS), min_size=1, unique=True).map(sorted))
def test_any_levels_in_order(levels: list[int]) -> None:
    text = ",".join(map(str, levels))
    assert PackOptions(levels=text, exact_level=levels[0]).promised_levels == tuple(levels)
    assert PackOptions(levels=text.replace(",", " , "), exact_level=levels[0]).promised_levels == tuple(levels)


@pytest.mark.parametrize("levels", ["", "5", "4,2", "2,2,4", "2,,4", "2;4", "raw,4", "2.0", "RAW", "all", "2,4,"])
def test_levels_that_are_none(levels: str) -> None:
    with pytest.raises(PackError, match=r"levels is .*, expected 'raw' or some of 2, 3, 4, 8, ascending"):
        PackOptions(levels=levels)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"levels": "2,3"}, "exact_level is 4, expected one of the levels 2,3"),
        ({"exact_level": 5}, "exact_level is 5, expected one of the levels 2,3,4,8"),
        ({"encoding": "odd"}, "encoding is 'odd', expected one of: nested, signs"),
        ({"dense_bits": 5}, "dense_bits is 5, expected 16"),
        ({"dense_bits": "8"}, "expected a value of type int"),
        ({"calibration": False, "calibrate": "a.txt"}, "calibrate is 'a.txt', which has no effect"),
        ({"levels": "raw", "encoding": "signs"}, "encoding is 'signs', which has no effect on raw levels"),
        ({"levels": "raw", "exact_level": 8}, "exact_level is 8, which has no effect on raw levels"),
        ({"levels": "raw", "dense_bits": 4}, "dense_bits is 4, which has no effect on raw levels"),
        ({"levels": "raw", "calibrate": "a.txt"}, "calibrate is 'a.txt', which has no effect on raw levels"),
        ({"levels": "raw", "calibration": False}, "calibration is False, which has no effect on raw levels"),
    ],
)
def test_what_does_not_go_together_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PackError) as caught:
        PackOptions(**given)
    assert message in str(caught.value)


def test_raw_weights_have_sixteen_bits() -> None:
    assert PackOptions(levels="raw", dense_bits=16).is_raw


def test_the_names_are_those_of_the_codes() -> None:
    assert LEVELS == CODE_LEVELS
    for encoding in ENCODINGS:
        assert PackOptions(encoding=encoding).encoding == encoding
