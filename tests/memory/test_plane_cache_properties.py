"""Any work, any budget, slow and failing disks, any choice of victims: what must hold all the same."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from memory.plane_file import PAGE, PlaneFile
from moestro.errors import PlaneReadError
from moestro.keys import PlaneKey
from moestro.memory.arena import Arena
from moestro.memory.direct import preadv
from moestro.memory.pages import HostBuffer
from moestro.memory.plane_cache import PlaneCache
from moestro.memory.transfer import TransferEngine
from moestro.policy import LRU, Evictable, Need

CLASSES = [PAGE, 2 * PAGE, 3 * PAGE]


class Books(LRU):
    """Checks what the cache tells a policy; picks any evictable plane at random, or the oldest."""

    def __init__(self, chance: random.Random, at_random: bool, arena_bytes: int) -> None:
        super().__init__()
        self.chance, self.at_random, self.arena_bytes = chance, at_random, arena_bytes
        self.held: dict[PlaneKey, int] = {}
        self.loads: Counter[PlaneKey] = Counter()
        self.in_use: PlaneKey | None = None

    def on_load(self, key: PlaneKey, nbytes: int) -> None:
        assert key not in self.held, "fetched while resident or in flight"
        self.held[key] = nbytes
        self.loads[key] += 1
        assert sum(self.held.values()) <= self.arena_bytes
        super().on_load(key, nbytes)

    def on_evict(self, key: PlaneKey) -> None:
        assert key != self.in_use, "the plane in use lost its slot"
        del self.held[key]
        super().on_evict(key)

    def victim(self, need: Need, evictable: Evictable) -> PlaneKey | None:
        assert self.in_use not in evictable
        if not self.at_random:
            return super().victim(need, evictable)
        return self.chance.choice(sorted(evictable) or [None])


class Disk:
    """Slow at random; the planes of `broken` fail; checks that no plane is being read twice at once."""

    def __init__(self, planes: PlaneFile, chance: random.Random, slow: bool, broken: set[int]) -> None:
        self.key_at = {extent.offset: key for key, extent in planes.extents.items()}
        self.chance, self.slow, self.broken = chance, slow, broken
        self.reading: set[PlaneKey] = set()
        self.reads: Counter[PlaneKey] = Counter()
        self.lock = threading.Lock()

    def read_at(self, descriptor: int, destination: memoryview, offset: int) -> int:
        key = self.key_at[offset]
        with self.lock:
            assert key not in self.reading, "read twice at once"
            self.reading.add(key)
            self.reads[key] += 1
            delay = self.chance.choice([0, 0, 0.0005, 0.002]) if self.slow else 0
        time.sleep(delay)
        try:
            if key[1] in self.broken:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(descriptor, destination, offset)
        finally:
            with self.lock:
                self.reading.remove(key)


@dataclass(frozen=True)
class Step:
    """Stream (or only prefetch) these experts; stop after `stop` planes; prefetch others while planes are in use."""

    experts: list[int]
    stop: int
    meanwhile: list[int]
    only_prefetch: bool


EXPERTS = st.lists(st.integers(0, 17), max_size=12)
STEPS = st.builds(Step, EXPERTS, st.sampled_from([99, 99, 99, 1, 3]), EXPERTS, st.booleans())


@settings(max_examples=120, deadline=None)
@given(
    steps=st.lists(STEPS, min_size=1, max_size=12),
    pages=st.integers(3, 40),
    extent_pages=st.sampled_from([3, 6, 7]),
    threads=st.integers(1, 3),
    broken=st.sets(st.integers(0, 17), max_size=2),
    slow=st.booleans(),
    at_random=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_whatever_happens(
    mixed_planes: PlaneFile,
    steps: list[Step],
    pages: int,
    extent_pages: int,
    threads: int,
    broken: set[int],
    slow: bool,
    at_random: bool,
    seed: int,
) -> None:
    chance = random.Random(seed)
    arena = Arena(pages * PAGE, extent_pages * PAGE, CLASSES)
    buffer = HostBuffer(pages * PAGE)
    policy = Books(chance, at_random, arena.nbytes)
    disk = Disk(mixed_planes, chance, slow, broken)
    engine = TransferEngine(threads, read_at=disk.read_at)
    cache = PlaneCache(arena=arena, buffer=buffer, engine=engine, policy=policy, locate=mixed_planes.locate)
    asked = 0

    def check_bytes(key: PlaneKey, offset: int) -> None:
        content = mixed_planes.contents[key]
        assert bytes(buffer.view(offset, len(content))) == content, f"{key} holds other bytes"

    def run(step: Step) -> None:
        wanted = {(0, expert, 0) for expert in step.experts}
        seen: list[PlaneKey] = []
        try:
            with cache.stream([(0, expert, 0) for expert in step.experts]) as arrivals:
                for key, offset in arrivals:
                    policy.in_use = key
                    check_bytes(key, offset)
                    seen.append(key)
                    cache.prefetch([(0, expert, 0) for expert in step.meanwhile])
                    if slow:
                        time.sleep(0.0003)
                    check_bytes(key, offset)
                    assert key in cache.resident()
                    policy.in_use = None
                    if len(seen) == step.stop:
                        break
        except PlaneReadError:
            assert wanted & {(0, expert, 0) for expert in broken}
        else:
            assert len(seen) == min(step.stop, len(wanted))
        assert len(seen) == len(set(seen))
        assert set(seen) <= wanted
        assert not {key[1] for key in seen} & broken

    for step in steps:
        if step.only_prefetch:
            cache.prefetch([(0, expert, 0) for expert in step.experts])
            continue
        before = cache.resident() & {(0, expert, 0) for expert in step.experts}
        hits = cache.stats.hits
        run(step)
        asked += len(set(step.experts))
        assert cache.stats.hits + cache.stats.misses == asked
        assert cache.stats.hits - hits >= len(before)

    intact = [expert for expert in range(18) if expert not in broken]
    run(Step(intact, 99, [], False))  # after all of that every slot can still be had
    engine.close()
    assert not any(plane.leases or plane.ticket for plane in cache._planes.by_key.values())
    assert set(policy.held) == cache.resident()
    assert arena.used_bytes == sum(policy.held.values())
    assert all(disk.reads[key] <= policy.loads[key] for key in mixed_planes.extents)
    intact_bytes = sum(disk.reads[key] * len(mixed_planes.contents[key]) for key in disk.reads if key[1] not in broken)
    assert cache.stats.bytes_read == engine.stats.bytes_read == intact_bytes
    cache.clear()
    assert arena.used_bytes == 0
    assert not policy.held
