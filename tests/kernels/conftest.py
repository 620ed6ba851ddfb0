from __future__ import annotations

from collections.abc import Iterator

import pytest

from moestro import _native


@pytest.fixture(params=_native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn, the portable fallback included."""
    before = _native.get_isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = _native.get_threads()
    yield
    _native.set_threads(before)
