"""What several tests of the engine share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shipped(raw_store: Path) -> Path:
    """A store of the built-in model, its weights as they are."""
    return raw_store
