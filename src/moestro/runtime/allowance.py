"""Decoded rows that may lose something: the decoder applies experts at the levels in memory, as long as that is cheap.

Where a plane is worth its reading the decoder comes back, and the ledger decides (`policy/levels/ledger.py`).

Shapes: L MoE layers, T rows of the batch, K experts per row, E experts per layer, P planes.
"""

from __future__ import annotations

import numpy as np

from moestro import _native
from moestro.policy.levels import Ledger
from moestro.runtime.batch import PackedBatch
from moestro.runtime.experts import RoutedExperts
from moestro.runtime.levels import LayerLevels


class PassAllowance:
    """What passes of a model's decoder give up by themselves."""

    def __init__(self, experts: RoutedExperts, decoder: _native.Decoder, *, picks: int) -> None:
        self._experts, self._decoder = experts, decoder
        self._levels_LK = np.zeros((len(experts.chains), picks), dtype=np.int64)
        self._native: _native.Allowance | None = None
        self._held: list[np.ndarray] = []  # kept, as the decoder knows addresses only

    def begins(self, batch: PackedBatch) -> bool:
        """A forward pass begins; whether it may give something up on its way."""
        experts, levels = self._experts, self._experts.levels
        if self._native is not None:
            self._native.begin(0.0, 0.0, 0)
        if levels is None or levels.ledger is None or not levels.lossy or batch.rows > 1 or experts.deltas is not None:
            return False
        if self._native is None:
            self._native = self._open(levels, levels.ledger)
        if self._native is None:
            return False
        self._levels_LK[:] = len(levels.bits)
        self.goes_on()
        if experts.foresight is not None:
            experts.foresight.hurry()
        return True

    def goes_on(self) -> None:
        """The decoder goes on with the pass, whatever the ledger has decided meanwhile."""
        allowance, _, ledger = self._opened()
        allowance.begin(*ledger.terms(), self._levels_LK.ctypes.data)

    def count(self, first: int, index_LTK: np.ndarray, weights_LTK: np.ndarray) -> None:
        """The pass has gone through layers from `first` on, of this routing, and come back."""
        allowance, levels, ledger = self._opened()
        ledger.spent(allowance.left)
        chosen_LTK = self._levels_LK[first : first + len(index_LTK), None]
        levels.applied_D += np.bincount(chosen_LTK.ravel(), minlength=len(levels.applied_D))
        if len(index_LTK):
            self._experts.count_known(first, index_LTK, weights_LTK, chosen_LTK == 0)

    def _opened(self) -> tuple[_native.Allowance, LayerLevels, Ledger]:
        levels = self._experts.levels
        assert self._native is not None
        assert levels is not None
        assert levels.ledger is not None
        return self._native, levels, levels.ledger

    def _open(self, levels: LayerLevels, ledger: Ledger) -> _native.Allowance | None:
        """None where experts of some layer are not computed by level."""
        layers = [self._experts.held_by_level(layer) for layer in range(len(self._experts.chains))]
        found = [layer for layer in layers if layer is not None]
        if len(found) < len(layers):
            return None
        self._held = [held_EP for held_EP, _ in found]
        costs, per_byte = ledger.cost_LES, ledger.per_byte_LES
        allowance = _native.Allowance(costs.ctypes.data, per_byte.ctypes.data, *costs.shape)
        for number, (held_EP, levelled) in enumerate(found):
            allowance.hold(number, levelled, held_EP.ctypes.data, len(held_EP), levels.depths(number))
        self._decoder.spend(allowance)
        return allowance
