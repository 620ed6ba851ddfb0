from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.policy.keeping.lowest import Lowest


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), kinds=st.sampled_from([1, 3, 1000]))
def test_as_if_all_were_put_in_order_whatever_became_of_the_values(seed: int, kinds: int) -> None:
    random = np.random.default_rng(seed)
    lowest = Lowest()
    values_X = random.integers(0, kinds, size=500).astype(float)
    for _ in range(20):
        changed = random.integers(0, 500, size=int(random.integers(0, 300)))
        values_X[changed] = random.integers(0, kinds, size=len(changed)) * float(random.choice([1.0, 1e6]))
        values_X[random.integers(0, 500, size=100)] = np.inf
        wanted = int(random.integers(1, 600))
        order = np.argsort(values_X, kind="stable")
        expected = order[np.isfinite(values_X[order])].tolist()
        places = lowest.places(values_X, wanted)
        assert places == expected[:wanted]
