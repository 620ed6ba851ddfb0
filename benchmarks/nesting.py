"""What nested planes are worth: beside a copy of each expert for each level, and beside experts that leave whole.

    python benchmarks/nesting.py STORE TEXT... [--qualities high,balanced,fast] [--shares 0.25,0.5] [--tokens 2048]

Tokens go through one at a time, as `levels.py` does it and with the policy `ledger`. Three ways: `planes`, as it is;
`experts`, where the policy does not weigh planes and an expert that has to give one gives all; and `copies`, where each
level of an expert is read, kept and dropped for itself, as a store would have to do whose levels share no bytes (they
are read from the same store). Nothing here is a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from levels import WINDOW, judge, measure

from moestro.engine.tokenizer import load_tokenizer
from moestro.engine.windows import Text, cut_windows
from moestro.keys import PlaneExtent, PlaneKey
from moestro.memory.arena import Arena
from moestro.memory.plane_cache import PlaneCache
from moestro.memory.planes import Chain
from moestro.policy.keeping.eviction import WorthEviction
from moestro.policy.observation import Routing
from moestro.runtime import open as runtime_open
from moestro.runtime.experts import Arrived, LayerExperts, RoutedExperts
from moestro.runtime.grouping import Grouping
from moestro.runtime.levels import LayerLevels
from moestro.store.reader import Store

WAYS = ("planes", "experts", "copies")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--qualities", default="high,balanced,fast")
    parser.add_argument("--shares", default="0.25,0.5")
    parser.add_argument("--tokens", type=int, default=2048)
    given = parser.parse_args()
    store = Store.open(given.store)
    texts = [Text(path.name, path.read_text(encoding="utf-8")) for path in given.texts]
    windows = cut_windows(load_tokenizer(store), texts, window=WINDOW, max_tokens=given.tokens)
    exact_NV, _ = measure(store, windows, share=1.0, policy="fixed", quality="exact")
    print("| experts in memory | quality | way | KB read per token | divergence, nats |\n|---|---|---|---|---|")
    for share in map(float, given.shares.split(",")):
        for quality in given.qualities.split(","):
            for way in WAYS:
                with _changed(way, store):
                    found_NV, facts = measure(store, windows, share=share, policy="ledger", quality=quality)
                lost = judge(found_NV, exact_NV, windows)["divergence"]
                print(
                    f"| {share:.0%} | {quality} | {way} | {facts['bytes_per_token'] / 1e3:.0f} | {lost:.5f} |",
                    flush=True,
                )


@contextmanager
def _changed(way: str, store: Store) -> Iterator[None]:
    with ExitStack() as patches:
        if way == "experts":
            patches.enter_context(patch.object(WorthEviction, "_planes_in_order", _whole_in_order))
        if way == "copies":
            for target, name, value in _copies(store):
                patches.enter_context(patch.object(target, name, value))
        yield


def _whole_in_order(self: WorthEviction, _gains_LEP: np.ndarray, wanted: int) -> list[tuple[int, int]]:
    self.gains_LEP = None
    return self._in_order(wanted)


class Copies:
    """The experts of a layer, computed from copies: a copy of a level is its planes one after another."""

    known = None

    def __init__(self, layer: LayerExperts, sizes: Sequence[int], depths: dict[int, int]) -> None:
        self._layer, self._places, self._depths = layer, [0, *accumulate(sizes)], depths

    def compute(self, arrived: Arrived, rows: Grouping, hidden_TH: torch.Tensor, out_PH: torch.Tensor) -> None:
        planes = [
            (group, tuple(offset + place for place in self._places[: self._depths[rows.bits_of(group)]]))
            for group, (offset,) in arrived
        ]
        self._layer.compute(planes, rows, hidden_TH, out_PH)

    def forget(self, expert: int | None = None) -> None:
        pass


def _copies(store: Store) -> list[tuple[Any, str, Any]]:
    """What has to be other code, where, for copies."""
    layout = store.layers[0].layout
    sizes, plane_of = [plane.nbytes for plane in layout.planes], Store.plane
    depths = {plane.level: depth for depth, plane in enumerate(layout.planes, start=1)}
    assert all(layer.layout == layout for layer in store.layers), "layers of one shape are needed"
    choose, weigh, make_experts = LayerLevels.choose, LayerLevels._weigh, runtime_open.open_experts

    def arena(nbytes: int, extent_bytes: int, _sizes: Sequence[int]) -> Arena:
        return Arena(nbytes, extent_bytes, list(accumulate(sizes)))

    def plane(self: Store, key: PlaneKey) -> PlaneExtent:
        layer, expert, number = key
        whole: Any = replace(plane_of(self, (layer, expert, 0)), nbytes=sum(sizes[: number + 1]), checksum=None)
        return whole

    def held(self: PlaneCache, chains: Sequence[Chain]) -> list[int]:
        by_key = self._planes.by_key
        return [max((place for place, key in enumerate(keys, start=1) if key in by_key), default=0) for keys in chains]

    def chain(self: LayerLevels, layer: int, expert: int, level: int) -> Chain:
        return (self._chains[layer][expert][self._depths_LD[layer, level] - 1],)

    def weighed(self: LayerLevels) -> None:
        weigh(self)
        if self._gains_LEP is not None and self._eviction is not None:
            sizes_P = np.array(sizes[: self._gains_LEP.shape[2]])
            self._eviction.gains_LEP = (self._gains_LEP * sizes_P).cumsum(axis=2) / sizes_P.cumsum()

    def experts(**arguments: Any) -> RoutedExperts:
        routed = make_experts(**{**arguments, "know": False})
        routed._layers = tuple(Copies(layer, sizes, depths) for layer in routed._layers)
        return routed

    def chosen(self: LayerLevels, routing: Routing, hidden_TH: torch.Tensor) -> np.ndarray:
        levels_TK = choose(self, routing, hidden_TH)
        return np.full(routing.experts_TK.shape, len(self.bits)) if levels_TK is None else levels_TK

    return [
        (runtime_open, "Arena", arena),
        (Store, "plane", plane),
        (PlaneCache, "held", held),
        (LayerLevels, "chain", chain),
        (LayerLevels, "choose", chosen),
        (LayerLevels, "_weigh", weighed),
        (runtime_open, "open_experts", experts),
    ]


if __name__ == "__main__":
    main()
