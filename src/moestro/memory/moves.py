"""Planes on the move within the arena, as it becomes smaller.

Part of the plane cache (`PlaneCache.resize`) and under its lock, in a file of its own for its length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moestro.memory.planes import EvictableView, HeldPlane
from moestro.policy.base import Need

if TYPE_CHECKING:
    from moestro.memory.plane_cache import PlaneCache


def resize(cache: PlaneCache, nbytes: int) -> None:
    """See `PlaneCache.resize`."""
    arena = cache._arena
    arena.resize(nbytes)
    for plane in tuple(cache._loading.values()):
        if not arena.is_open(plane.slot) and cache._cancel(plane):
            cache._stats.cancelled_prefetches += 1
    while not all(arena.is_open(plane.slot) for plane in cache._loading.values()):
        cache._changed.wait()
    for plane in tuple(cache._planes.by_key.values()):
        if not arena.is_open(plane.slot) and plane.key in cache._planes.by_key:
            _bring_in(cache, plane)


def _bring_in(cache: PlaneCache, plane: HeldPlane) -> None:
    """Move a plane into an extent that is open, or evict it if all others are worth more."""
    arena, planes, view = cache._arena, cache._planes, cache._buffer.view
    slot = arena.alloc(plane.nbytes)
    while slot is None:
        need = Need(plane.key, plane.nbytes, urgent=True)
        key = cache._policy.victim(need, EvictableView(planes, plane.nbytes, ()))
        if key is None or key == plane.key:
            cache._evict(plane)
            return
        victim = planes.by_key[key]
        stays = arena.is_open(victim.slot)
        for one in planes.to_evict_for(plane.nbytes, victim) if stays else [victim]:
            cache._evict(one)
        slot = arena.alloc(plane.nbytes)
    view(slot.offset, plane.nbytes)[:] = view(plane.slot.offset, plane.nbytes)
    planes.remove(plane)
    arena.free(plane.slot)
    plane.slot = slot
    planes.add(plane)
    cache.on_gone(plane.key)
