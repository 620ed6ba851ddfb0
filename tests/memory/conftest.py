"""Fixtures shared by the tests of this room."""

from __future__ import annotations

import pytest

from memory.plane_file import PlaneFile, write_plane_file


@pytest.fixture(scope="session")
def uniform_planes(tmp_path_factory: pytest.TempPathFactory) -> PlaneFile:
    """16 planes of two pages."""
    return write_plane_file(tmp_path_factory.mktemp("planes") / "uniform.bin", 16, (2,))


@pytest.fixture(scope="session")
def mixed_planes(tmp_path_factory: pytest.TempPathFactory) -> PlaneFile:
    """18 planes of one, two and three pages in turn."""
    return write_plane_file(tmp_path_factory.mktemp("planes") / "mixed.bin", 18, (1, 2, 3))
