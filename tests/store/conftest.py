"""What several tests of this room share."""

from __future__ import annotations

from pathlib import Path

import pytest

from moestro.store.locate import locate_source
from moestro.store.reader import Store
from packing import pack_raw


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The checkpoint of the model that comes with moestro."""
    return locate_source("tiny-qwen3moe-28m")


@pytest.fixture(scope="session")
def shipped_store(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of it. Do not change it."""
    return pack_raw(shipped, tmp_path_factory.mktemp("shipped") / "store")
