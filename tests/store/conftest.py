"""What several tests of this room share."""

from __future__ import annotations

from pathlib import Path

import pytest

from moestro.store.locate import locate_source
from moestro.store.reader import Store


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The checkpoint of the model that comes with moestro."""
    return locate_source("tiny-qwen3moe-28m")


@pytest.fixture(scope="session")
def shipped_store(raw_store: Path) -> Store:
    """A store of it. Do not change it."""
    return Store.open(raw_store)
