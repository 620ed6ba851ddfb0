"""A store of a tiny model with two variants, for what chooses between them."""

from __future__ import annotations

from pathlib import Path

from engine.tiny import tiny_checkpoint
from fine_tunes import fine_tune
from moestro.config import RouteOptions, VariantOptions
from moestro.engine.domains import fit_router
from moestro.store.reader import Store
from moestro.variants.add import add_variant
from packing import pack_raw

VARIANTS = ("code", "sums")


def routed_store(folder: Path, examples: dict[str, list[str]]) -> Path:
    """The store, its router fitted by text to these examples of the variants and the base."""
    base = tiny_checkpoint(folder / "base")
    store = Store.open(pack_raw(base, folder / "store").path)
    for seed, name in enumerate(VARIANTS):
        tuned = fine_tune(base, folder / name, size=0.5, seed=seed)
        add_variant(store, name, str(tuned), base=str(base), options=VariantOptions(bits=4, calibration=False))
    fit_router(store, examples, RouteOptions())
    return store.path
