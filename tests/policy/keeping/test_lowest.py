from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro._native import lowest


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 300),
    kinds=st.sampled_from([1, 3, 1000]),
    wanted=st.integers(1, 400),
    barred=st.floats(0, 1),
    kind=st.sampled_from([np.float32, np.float64]),
)
def test_as_if_all_were_put_in_order(seed: int, count: int, kinds: int, wanted: int, barred: float, kind: type) -> None:
    random = np.random.default_rng(seed)
    values_X = random.integers(-kinds, kinds, size=count).astype(kind)
    bars_X = np.where(random.random(count) < barred, np.inf, 0).astype(kind)
    order = np.argsort(values_X + bars_X, kind="stable")
    expected = order[np.isfinite(bars_X[order])].tolist()
    assert lowest(values_X, bars_X, wanted) == expected[:wanted]


def test_what_does_not_fit_is_refused() -> None:
    values_X = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="as many bars"):
        lowest(values_X, values_X[:2], 1)
    with pytest.raises(ValueError, match="none are wanted"):
        lowest(values_X, values_X, 0)
    with pytest.raises(TypeError):
        lowest(values_X, np.zeros(3), 1)  # type: ignore[call-overload]
