"""Fixtures shared by the tests of this room."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from memory.cache_bench import Bench
from memory.gated import Gate
from memory.plane_file import PAGE, PlaneFile, write_plane_file
from moestro.memory.pages import HostBuffer
from moestro.memory.transfer import TransferEngine
from moestro.policy import LRU

CHAINS = ((2, 1, 1), (3,), (1, 2, 1, 3))
"""Pages of the planes of a chain."""


@pytest.fixture(scope="session")
def uniform_planes(tmp_path_factory: pytest.TempPathFactory) -> PlaneFile:
    """16 planes of two pages."""
    return write_plane_file(tmp_path_factory.mktemp("planes") / "uniform.bin", 16, [(2,)])


@pytest.fixture(scope="session")
def mixed_planes(tmp_path_factory: pytest.TempPathFactory) -> PlaneFile:
    """18 planes of one, two and three pages in turn."""
    return write_plane_file(tmp_path_factory.mktemp("planes") / "mixed.bin", 18, [(1,), (2,), (3,)])


@pytest.fixture(scope="session")
def chain_planes(tmp_path_factory: pytest.TempPathFactory) -> PlaneFile:
    """12 experts whose chains are those of `CHAINS` in turn."""
    return write_plane_file(tmp_path_factory.mktemp("planes") / "chains.bin", 12, CHAINS)


@pytest.fixture
def make(uniform_planes: PlaneFile) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def bench(slots: int, policy: LRU | None = None) -> Bench:
        made.append(Bench(uniform_planes, slots, policy))
        return made[-1]

    yield bench
    for one in made:
        one.disk.open.set()
        one.engine.close()


@pytest.fixture
def buffer() -> HostBuffer:
    return HostBuffer(64 * PAGE)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def gated(gate: Gate) -> Iterator[TransferEngine]:
    engine = TransferEngine(threads=1, request_bytes=2 * PAGE, read_at=gate.read_at)
    yield engine
    gate.open.set()
    engine.close()
