"""Any work, any budget, slow and failing disks, any choice of victims: what must hold all the same."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from memory.conftest import CHAINS
from memory.plane_file import PAGE, PlaneFile
from moestro.errors import PlaneReadError
from moestro.keys import PlaneKey
from moestro.memory.arena import Arena, least_bytes_for
from moestro.memory.direct import preadv
from moestro.memory.pages import HostBuffer
from moestro.memory.plane_cache import PlaneCache
from moestro.memory.planes import Chain, MissingChain
from moestro.memory.transfer import TransferEngine
from moestro.policy import LRU, Evictable, Need

EXPERTS = 12
CLASSES = [PAGE, 2 * PAGE, 3 * PAGE]


class Books(LRU):
    """Checks what the cache tells a policy; picks any evictable plane at random, or the oldest."""

    def __init__(self, chance: random.Random, at_random: bool, arena_bytes: int) -> None:
        super().__init__()
        self.chance, self.at_random, self.arena_bytes = chance, at_random, arena_bytes
        self.held: dict[PlaneKey, int] = {}
        self.loads: Counter[PlaneKey] = Counter()
        self.in_use: set[PlaneKey] = set()

    def on_load(self, key: PlaneKey, nbytes: int) -> None:
        assert key not in self.held, "fetched while resident or in flight"
        self.held[key] = nbytes
        self.loads[key] += 1
        assert sum(self.held.values()) <= self.arena_bytes
        super().on_load(key, nbytes)

    def on_evict(self, key: PlaneKey) -> None:
        assert key not in self.in_use, "a plane in use lost its slot"
        del self.held[key]
        super().on_evict(key)

    def victim(self, need: Need, evictable: Evictable) -> PlaneKey | None:
        assert not any(key in evictable for key in self.in_use)
        if not self.at_random:
            return super().victim(need, evictable)
        return self.chance.choice(sorted(evictable) or [None])


class Disk:
    """Slow at random; the planes of `broken` fail; checks that no plane is being read twice at once."""

    def __init__(self, planes: PlaneFile, chance: random.Random, slow: bool, broken: set[PlaneKey]) -> None:
        self.key_at = {extent.offset: key for key, extent in planes.extents.items()}
        self.chance, self.slow, self.broken = chance, slow, broken
        self.reading: set[PlaneKey] = set()
        self.reads: Counter[PlaneKey] = Counter()
        self.lock = threading.Lock()

    def read_at(self, descriptor: int, destinations: Sequence[memoryview], offset: int) -> int:
        keys = [self.key_at[start] for start in accumulate(map(len, destinations[:-1]), initial=offset)]
        fails = not self.broken.isdisjoint(keys)
        with self.lock:
            assert self.reading.isdisjoint(keys), "read twice at once"
            self.reading.update(keys)
            # What fails together is read again, one by one.
            self.reads.update(() if fails and len(keys) > 1 else keys)
            delay = self.chance.choice([0, 0, 0.0005, 0.002]) if self.slow else 0
        time.sleep(delay)
        try:
            if fails:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(descriptor, destinations, offset)
        finally:
            with self.lock:
                self.reading.difference_update(keys)


@dataclass(frozen=True)
class Step:
    """Stream (or only prefetch) these chains; stop after `stop`; prefetch others while chains are in use."""

    chains: list[Chain]
    stop: int
    meanwhile: list[Chain]
    only_prefetch: bool


def _whole(expert: int) -> Chain:
    return tuple((0, expert, plane) for plane in range(len(CHAINS[expert % len(CHAINS)])))


def _planes(chains: list[Chain]) -> list[PlaneKey]:
    return [key for chain in chains for key in chain]


KEYS = [key for expert in range(EXPERTS) for key in _whole(expert)]
# Whole chains and their beginnings, which share planes with them.
SOME = st.lists(
    st.builds(lambda expert, depth: _whole(expert)[:depth], st.integers(0, EXPERTS - 1), st.sampled_from([9, 9, 1, 2])),
    max_size=10,
)
STEPS = st.builds(Step, SOME, st.sampled_from([99, 99, 99, 1, 3]), SOME, st.booleans())


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(STEPS, min_size=1, max_size=12),
    spare_pages=st.integers(0, 24),
    extent_pages=st.sampled_from([3, 6, 7]),
    threads=st.integers(1, 3),
    broken=st.sets(st.sampled_from(KEYS), max_size=2),
    slow=st.booleans(),
    at_random=st.booleans(),
    arranged=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_whatever_happens(
    chain_planes: PlaneFile,
    steps: list[Step],
    spare_pages: int,
    extent_pages: int,
    threads: int,
    broken: set[PlaneKey],
    slow: bool,
    at_random: bool,
    arranged: bool,
    seed: int,
) -> None:
    chance = random.Random(seed)
    # Room for any one chain is enough.
    least = max(least_bytes_for([pages * PAGE for pages in chain], extent_pages * PAGE) for chain in CHAINS)
    arena = Arena(least + spare_pages * PAGE, extent_pages * PAGE, CLASSES)
    buffer = HostBuffer(arena.nbytes)
    policy = Books(chance, at_random, arena.nbytes)
    disk = Disk(chain_planes, chance, slow, broken)
    engine = TransferEngine(threads, read_at=disk.read_at)
    cache = PlaneCache(arena=arena, buffer=buffer, engine=engine, policy=policy, locate=chain_planes.locate)
    asked = 0

    def arrange(missing: list[MissingChain]) -> list[int]:
        return chance.sample(range(len(missing)), len(missing))

    def check_bytes(chain: Chain, offsets: tuple[int, ...]) -> None:
        for key, offset in zip(chain, offsets, strict=True):
            content = chain_planes.contents[key]
            assert bytes(buffer.view(offset, len(content))) == content, f"{key} holds other bytes"

    def run(step: Step, whole_before: set[Chain]) -> None:
        seen: list[Chain] = []
        try:
            with cache.stream(step.chains, arrange=arrange if arranged else None) as batches:
                assert not (step.chains and engine._queue.stats().others), "what was not chosen still waits"
                for number, batch in enumerate(batches):
                    assert batch
                    arrived = [(step.chains[index], offsets) for index, offsets in batch]
                    assert number or whole_before <= {chain for chain, _ in arrived}
                    policy.in_use = set(_planes([chain for chain, _ in arrived]))
                    for one in arrived:
                        check_bytes(*one)
                    cache.prefetch(_planes(step.meanwhile))
                    if slow:
                        time.sleep(0.0003)
                    for one in arrived:
                        check_bytes(*one)
                    assert policy.in_use <= cache.resident()
                    policy.in_use = set()
                    seen += [chain for chain, _ in arrived]
                    if len(seen) >= step.stop:
                        break
        except PlaneReadError as error:
            if error.key not in set(_planes(step.chains)) & broken:
                raise
        else:
            assert len(seen) == len(set(step.chains)) or len(seen) >= step.stop
        assert len(seen) == len(set(seen))
        assert set(seen) <= set(step.chains)
        assert not set(_planes(seen)) & broken

    for step in steps:
        if step.only_prefetch:
            cache.prefetch(_planes(step.chains))
            continue
        resident = cache.resident()
        whole_before = {chain for chain in step.chains if resident.issuperset(chain)}
        hits = cache.stats.hits
        run(step, whole_before)
        asked += len(set(step.chains))
        assert cache.stats.hits + cache.stats.misses == asked
        assert cache.stats.hits - hits >= len(whole_before)

    intact = [chain for chain in map(_whole, range(EXPERTS)) if not set(chain) & broken]
    run(Step(intact, 99, [], False), set())  # after all of that every slot can still be had
    engine.close()
    assert not any(plane.leases or plane.ticket for plane in cache._planes.by_key.values())
    assert set(policy.held) == cache.resident()
    assert arena.used_bytes == sum(policy.held.values())
    assert all(disk.reads[key] <= policy.loads[key] for key in KEYS)
    intact_bytes = sum(disk.reads[key] * len(chain_planes.contents[key]) for key in disk.reads if key not in broken)
    assert cache.stats.bytes_read == engine.stats.bytes_read == intact_bytes
    cache.clear()
    assert arena.used_bytes == 0
    assert not policy.held
