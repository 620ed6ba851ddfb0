"""What several tests of the engine share."""

from __future__ import annotations

from pathlib import Path

import pytest

from moestro.store.locate import locate_source
from packing import pack_raw


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the built-in model, its weights as they are."""
    folder = tmp_path_factory.mktemp("shipped") / "store"
    pack_raw(locate_source("tiny-qwen3moe-28m"), folder)
    return folder
