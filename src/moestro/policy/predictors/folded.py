"""Nets' inner layers kept up to date instead of multiplied out: a row of few experts changes few sums.

Nearly all that goes into a net is linear in what was routed: decayed averages of use, and router weights of the latest
visits. What these add to the inner layer is therefore kept as sums, and a visit adds its K experts' weights to them
(a few KiB) where the product reads all (half a MiB a layer at 128 experts, more than a processor has near at hand for
48 layers). Errors of rounding fade as the averages do. The arithmetic is compiled (csrc/nets.cpp): called from here a
dozen products this small take three times as long.

Shapes: S places of requests, L MoE layers, E experts, A averages, V views of a layer's latest weights, W width,
H horizons, F own features, T rows, K experts of a row, X state of a layer; E and W filled up to whole tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro._native import ForesightNets
from moestro.policy.observation import Shape
from moestro.policy.predictors.history import (
    AVERAGES,
    DECAYS,
    FADE,
    GAINS,
    NEIGHBOURS,
    OWN,
    RECENCY,
    WEIGHT,
    input_size,
)
from moestro.policy.predictors.net import Nets

_VIEWS = (0, *NEIGHBOURS)
"""Where, seen from its own layer, lies the one whose latest weights a net looks at."""
_PARTS = AVERAGES + len(_VIEWS)
_TILE, _LANES = 32, 8

Span = tuple[int, int, int]
"""(place of a request, its first row, the row behind its last)"""


def state_bytes(shape: Shape, nets_bytes: int) -> int:
    """At most what is kept of a request that nets of so many bytes, in all layers and roles, foresee."""
    # An inner layer's input weighs its width, and each of its parts keeps a sum of that width.
    sums_bytes = nets_bytes * _PARTS // input_size(shape.experts)
    return sums_bytes + 4 * shape.layers * (OWN * (shape.experts + _TILE) + 2 * _PARTS * _LANES)


class FoldedNets:
    """The weights of several roles' nets, laid out as they are read. Copies are the same: nothing changes in it."""

    def __init__(self, *roles: Nets) -> None:
        self._layers, _, self.experts = roles[0].bias_LHE.shape
        self._horizons = [one.bias_LHE.shape[1] for one in roles]
        self._filled = -(-self.experts // _TILE) * _TILE
        self._nets = ForesightNets(self._layers, self._filled, list(DECAYS), GAINS.tolist(), list(_VIEWS), FADE)
        for one in roles:
            self._add(one)

    def __deepcopy__(self, _memo: object) -> FoldedNets:
        return self

    def state(self, places: int) -> np.ndarray:
        """[S, L, X] of requests that have not begun."""
        return np.zeros((places, self._layers, self._nets.stride), np.float32)

    def follow(
        self,
        state_SLX: np.ndarray,
        kept: int,
        layer: int,
        spans: Sequence[Span],
        ids_TK: np.ndarray,
        weights_TK: np.ndarray,
    ) -> None:
        """Rows went through the layer; the sums of the first `kept` roles are kept up to date."""
        self._nets.follow(state_SLX, kept, layer, spans, ids_TK, weights_TK)

    def catch_up(self, state_SLX: np.ndarray, role: int) -> None:
        """The sums of a role that were not kept so far, of all requests."""
        for place in range(len(state_SLX)):
            self._nets.rebuild(state_SLX, place, role)

    def chances(self, state_SLX: np.ndarray, role: int, layer: int, places: Sequence[int]) -> np.ndarray:
        """[H, E] probabilities that at least one of these requests uses an expert, each on its own."""
        out_HE = np.empty((self._horizons[role], self._filled), np.float32)
        self._nets.answer(state_SLX, role, layer, places, out_HE)
        return out_HE[:, : self.experts]

    def _add(self, nets: Nets) -> None:
        width = nets.inner_bias_LW.shape[1]
        wide, high = -width % _LANES, self._filled - self.experts
        inner_LPEW = nets.inner_LDW.reshape(len(nets.inner_LDW), -1, self.experts, width)
        inner_LPEW = np.pad(inner_LPEW, ((0, 0), (0, 0), (0, high), (0, wide)))
        outer_LWHE = np.pad(nets.outer_LWHE, ((0, 0), (0, wide), (0, 0), (0, high)))
        own_LFHE = np.pad(nets.own_LHFE, ((0, 0), (0, 0), (0, 0), (0, high))).transpose(0, 2, 1, 3)
        bias_L1HE = np.pad(nets.bias_LHE, ((0, 0), (0, 0), (0, high)))[:, None]
        self._nets.add_role(
            _halves(_rows(inner_LPEW)),
            _halves(inner_LPEW[:, RECENCY]),
            np.ascontiguousarray(np.pad(nets.inner_bias_LW, ((0, 0), (0, wide)))),
            _halves(_tiles(np.concatenate((bias_L1HE, own_LFHE, outer_LWHE), axis=1))),
        )


def _rows(inner_LPEW: np.ndarray) -> np.ndarray:
    """[L, E, A + V, W] an expert's weights in the sums of its layer: for its own net, and for those that look at it."""
    layers, _, experts, width = inner_LPEW.shape
    rows_LECW = np.empty((layers, experts, _PARTS, width), np.float32)
    rows_LECW[:, :, :AVERAGES] = inner_LPEW[:, :AVERAGES].transpose(0, 2, 1, 3)
    for place, offset in enumerate(_VIEWS):
        part = WEIGHT if offset == 0 else OWN + place - 1
        rows_LECW[(np.arange(layers) + offset) % layers, :, AVERAGES + place] = inner_LPEW[:, part]
    return rows_LECW


def _tiles(lines_LXHE: np.ndarray) -> np.ndarray:
    """[L, H, E / 32, X, 32]: what makes 32 outputs lies together, in the order in which it is read."""
    layers, lines, horizons, experts = lines_LXHE.shape
    tiled = lines_LXHE.reshape(layers, lines, horizons, experts // _TILE, _TILE).transpose(0, 2, 3, 1, 4)
    return np.ascontiguousarray(tiled)


def _halves(weights: np.ndarray) -> np.ndarray:
    """Bits of float16: half the bytes to read, which is most of what a decision costs. A weight is off by at most 1 in
    2048, which changed no hit rate in its first four digits."""
    most = np.finfo(np.float16).max
    return np.ascontiguousarray(np.clip(weights, -most, most), np.float16).view(np.uint16)
