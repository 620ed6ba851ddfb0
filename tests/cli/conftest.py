"""Fixtures shared by the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.damage import copy_store
from cli.running import MODEL
from moestro.calibration import pack
from moestro.config import PackOptions
from moestro.store.locate import locate_source


@pytest.fixture(scope="session")
def store(raw_store: Path) -> Path:
    """A store of the built-in model. Do not change it."""
    return raw_store


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the built-in model as packing makes it, but for the calibration. Do not change it."""
    folder = tmp_path_factory.mktemp("quantised") / "store"
    return pack(locate_source(MODEL), folder, options=PackOptions(calibration=False)).path


@pytest.fixture
def damaged(store: Path, tmp_path: Path) -> Path:
    """A copy of the store, to be damaged."""
    return copy_store(store, tmp_path / "store")
