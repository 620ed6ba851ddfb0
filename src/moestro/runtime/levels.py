"""The level that each expert of each row is applied at, where requests have said that they may lose something.

Levels are numbers, as policies know them: 0 leaves an expert out, the highest is the exact one.

Shapes: T rows of a step, H hidden width, K experts per row, L MoE layers, E experts per layer, D levels, 0 among them,
P planes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from moestro.memory.plane_cache import PlaneCache
from moestro.memory.planes import Chain
from moestro.policy.keeping.eviction import WorthEviction
from moestro.policy.levels import Ledger, LevelAsk, LevelPolicy, LevelTable
from moestro.policy.observation import Routing
from moestro.runtime.batch import PackedBatch
from moestro.runtime.bit_router import LevelScores
from moestro.store.layout import Layout
from moestro.store.reader import Store


class LayerLevels:
    """Asks the policy, layer by layer, for steps in which some rows are not exact.

    Attributes:
        bits: of each level but 0.
        applied_D: so many (row, expert) pairs of rows that need not be exact were computed at each level.
        everywhere: whether levels are chosen for experts in memory, too: those of a bit router.
        apart: whether each level has a chain of its own, in every layer.
        ledger: the policy, where it is one.
    """

    def __init__(
        self,
        policy: LevelPolicy,
        *,
        bits: Sequence[int],
        layouts: Sequence[Layout],
        chains: Sequence[Sequence[Chain]],
        planes: PlaneCache,
        eviction: WorthEviction | None,
        scores: LevelScores | None = None,
    ) -> None:
        self.bits = tuple(bits)
        self.applied_D = np.zeros(len(self.bits) + 1, dtype=np.int64)
        self.everywhere = scores is not None
        self._scores = scores
        self._policy, self._chains, self._planes, self._eviction = policy, chains, planes, eviction
        self._depths_LD = np.array([depths(layout, bits) for layout in layouts])
        self.apart = all(len(set(depths_D)) == len(depths_D) for depths_D in self._depths_LD.tolist())
        self.ledger = policy if isinstance(policy, Ledger) else None
        self._budget_T = np.zeros(0)
        self._experts = max(len(one) for one in chains)
        self._gains_LEP: np.ndarray | None = None

    def step(self, batch: PackedBatch) -> None:
        """A forward pass begins."""
        lengths = [len(segment.token_ids) for segment in batch.segments]
        self._budget_T = np.repeat([segment.budget for segment in batch.segments], lengths)
        if self.lossy:
            self._policy.step(self._budget_T)
        self._weigh()

    def held(self) -> np.ndarray:
        """Bits of each expert that are in memory or on their way there, 0 for none: int8 [L, E]. Any thread may ask."""
        bits_D = np.array([0, *self.bits], dtype=np.int8)
        held_LE = np.zeros((len(self._chains), self._experts), dtype=np.int8)
        for layer, chains in enumerate(self._chains):
            planes_E = self._planes.held(chains)
            held_LE[layer, : len(chains)] = bits_D[np.searchsorted(self._depths_LD[layer], planes_E, side="right") - 1]
        return held_LE

    @property
    def lossy(self) -> bool:
        """Whether some row of the forward pass under way need not be exact."""
        return bool(self._budget_T.any())

    def choose(self, routing: Routing, hidden_TH: torch.Tensor) -> np.ndarray | None:
        """[T, K] numbers of levels for experts that take `hidden_TH`, or None where all are exact."""
        if not self.lossy:
            return None
        held_E = np.zeros(self._experts, dtype=np.int64)
        used = np.flatnonzero(routing.counts_E[: len(self._chains[routing.layer])])
        held = self._planes.held([self._chains[routing.layer][expert] for expert in used.tolist()])
        scores_TKS = None
        if self._scores is not None:
            scores_TKS = self._scores.of(routing.layer, hidden_TH, routing.experts_TK)
        held_E[used] = np.searchsorted(self._depths_LD[routing.layer], held, side="right") - 1
        levels_TK = self._policy.choose(LevelAsk(routing, self._budget_T, held_E, scores_TKS))
        self.applied_D += np.bincount(levels_TK[self._budget_T > 0].ravel(), minlength=len(self.applied_D))
        return None if (levels_TK == len(self.bits)).all() else levels_TK

    def depths(self, layer: int) -> list[int]:
        """How many planes each level takes, 0 first."""
        return list(self._depths_LD[layer].tolist())

    def chain(self, layer: int, expert: int, level: int) -> Chain:
        """The planes that an expert needs at a level."""
        return self._chains[layer][expert][: self._depths_LD[layer, level]]

    def worth_reading(self, layer: int, expert: int) -> Chain:
        """The planes of an expert that would be read if it were asked for now."""
        chain = self._chains[layer][expert]
        if self._gains_LEP is None:
            return chain
        return chain[: max(1, int(np.count_nonzero(self._gains_LEP[layer, expert] >= 1)))]

    def _weigh(self) -> None:
        """Tell the cache what the planes of an expert are worth beside each other."""
        gains_LES = self._policy.gains() if self._budget_T.any() else None
        if gains_LES is None:
            self._gains_LEP = None
        elif gains_LES is not self._seen:
            planes = [np.diff(depths_D) for depths_D in self._depths_LD]
            self._gains_LEP = np.stack(
                [np.repeat(gains_ES, each, axis=1) for gains_ES, each in zip(gains_LES, planes, strict=True)]
            )
        self._seen = gains_LES
        if self._eviction is not None:
            self._eviction.gains_LEP = self._gains_LEP

    _seen: np.ndarray | None = None


def depths(layout: Layout, bits: Sequence[int]) -> list[int]:
    """How many planes each level takes, 0 first."""
    return [0, *(sum(plane.level <= one for plane in layout.planes) for one in bits)]


def layout_bytes(layout: Layout, planes: int) -> int:
    """Of the lowest planes of an expert."""
    return sum(plane.nbytes for plane in layout.planes[:planes])


def level_table(
    store: Store,
    layouts: Sequence[Layout],
    *,
    bits: Sequence[int],
    picks: int,
    prices: Mapping[float, float] | None = None,
) -> LevelTable:
    """What the levels of `bits` cost, from the store's manifest; `layouts` end at the last of them."""
    experts = max(layer.num_experts for layer in store.layers)
    bytes_LD = [
        [sum(plane.nbytes for plane in layout.planes[:count]) for count in depths(layout, bits)] for layout in layouts
    ]
    errors_LED = np.zeros((len(layouts), experts, len(bits) + 1), dtype=np.float32)
    errors_LED[:, :, 0] = 1
    facts = store.manifest.calibration
    if facts is not None:
        places = [store.manifest.levels.index(one) for one in bits]
        for layer, rows in enumerate(facts.errors):
            errors_LED[layer, : len(rows), 1:] = np.array(rows, dtype=np.float32)[:, places]
    measured = facts is not None and facts.sensitivity is not None
    sensitivity_L = np.array(facts.sensitivity, dtype=np.float32) if measured and facts is not None else None
    return LevelTable(np.array(bytes_LD), np.minimum(errors_LED, 1), sensitivity_L, picks, prices)


def levels_up_to(store: Store, level: int) -> tuple[int, ...]:
    """The bits that the store promises, ascending, `level` the last."""
    return tuple(sorted(one for one in store.manifest.levels if one <= level))
