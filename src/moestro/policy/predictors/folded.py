"""Nets' inner layers kept up to date instead of multiplied out: a row of few experts changes few sums.

Nearly all that goes into a net is linear in what was routed: decayed averages of use, and router weights of the latest
visits. What these add to the inner layer is therefore kept as sums, and a visit adds its K experts' weights to them
(a few KiB) where the product reads all (half a MiB a layer at 128 experts, more than a processor has near at hand for
48 layers). Errors of rounding fade as the averages do.

Shapes: L MoE layers, E experts, A averages, V views of a layer's latest weights, C = A + V, W width, H horizons, K
experts of a row, F own features, X and Y: several of these in one axis.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.predictors.history import AVERAGES, DECAYS, GAINS, NEIGHBOURS, OWN, RECENCY, WEIGHT
from moestro.policy.predictors.net import Nets

_VIEWS = (0, *NEIGHBOURS)
"""Where, seen from its own layer, lies the one whose latest weights a net looks at."""
_PARTS = AVERAGES + len(_VIEWS)
_GAINS_A1 = GAINS[:, None]
_ONES_A = np.ones(AVERAGES + 1, np.float32)
_ONES_V = np.ones(len(_VIEWS), np.float32)
_HALF = np.array(0.5, np.float32)


class FoldedNets:
    """The weights of `nets`, laid out so that an expert's are read in one piece; those of the outputs halved, as
    1 / (1 + exp(-x)) is computed as 1/2 + 1/2 tanh(x / 2)."""

    def __init__(self, nets: Nets) -> None:
        layers, _, self.width = nets.inner_LDW.shape
        _, self.horizons, self.experts = nets.bias_LHE.shape
        inner_LPEW = nets.inner_LDW.reshape(layers, -1, self.experts, self.width)
        rows_LECW = np.empty((layers, self.experts, _PARTS, self.width), np.float32)
        rows_LECW[:, :, :AVERAGES] = inner_LPEW[:, :AVERAGES].transpose(0, 2, 1, 3) * _GAINS_A1
        for place, offset in enumerate(_VIEWS):
            part = WEIGHT if offset == 0 else OWN + place - 1
            rows_LECW[(np.arange(layers) + offset) % layers, :, AVERAGES + place] = inner_LPEW[:, part]
        self.rows_LEX = rows_LECW.reshape(layers, self.experts, -1)
        self.recency_LEW = inner_LPEW[:, RECENCY].copy()
        self.inner_bias_LW = nets.inner_bias_LW
        sources_LV = (np.arange(layers)[:, None] + _VIEWS) % layers
        self.sources_LV = sources_LV * len(_VIEWS) + np.arange(len(_VIEWS))
        self.own_LHFE = nets.own_LHFE * _HALF
        # The constant is one more row, for an inner value that is always 1.
        outer_LWX = nets.outer_LWHE.reshape(layers, self.width, -1)
        self.outer_LWX = np.concatenate((outer_LWX, nets.bias_LHE.reshape(layers, 1, -1)), axis=1) * _HALF

    def chances(self, layer: int, inner_W: np.ndarray, own_FE: np.ndarray) -> np.ndarray:
        """[H, E] probabilities of a request with this inner layer (see `InnerSums.inner`) and own history."""
        logits_HE: np.ndarray = np.dot(inner_W, self.outer_LWX[layer]).reshape(self.horizons, self.experts)
        logits_HE += np.einsum("fe,hfe->he", own_FE, self.own_LHFE[layer])
        np.tanh(logits_HE, out=logits_HE)
        logits_HE *= _HALF
        logits_HE += _HALF
        return logits_HE


class InnerSums:
    """One request's: what its averages and latest weights add to the inner layers."""

    def __init__(self, nets: FoldedNets) -> None:
        self._nets = nets
        layers = len(nets.sources_LV)
        # The bias is one more average, that nothing is added to and that does not decay.
        self._averages_LAW = np.zeros((layers, AVERAGES + 1, nets.width), np.float32)
        self._averages_LAW[:, AVERAGES] = nets.inner_bias_LW
        self._decays_AW = np.repeat(np.array([*DECAYS, 1], np.float32)[:, None], nets.width, axis=1)
        self._latest_LVW = np.zeros((layers, len(_VIEWS), nets.width), np.float32)
        self._latest_YW = self._latest_LVW.reshape(-1, nets.width)
        self._inner_W = np.ones(nets.width + 1, np.float32)

    def copy_from(self, other: InnerSums) -> None:
        """Go on from what another request did."""
        self._averages_LAW[:] = other._averages_LAW
        self._latest_LVW[:] = other._latest_LVW

    def step(self, layer: int, experts_K: np.ndarray, how_2K: np.ndarray) -> None:
        """A row went through the layer; `how_2K` are ones, and its normalised weights."""
        added_2CW = np.dot(how_2K, self._nets.rows_LEX[layer].take(experts_K, 0)).reshape(2, _PARTS, -1)
        averages_AW = self._averages_LAW[layer]
        averages_AW *= self._decays_AW
        averages_AW[:AVERAGES] += added_2CW[0, :AVERAGES]
        self._latest_LVW[layer] = added_2CW[1, AVERAGES:]

    def rebuild(self, layer: int, own_FE: np.ndarray) -> None:
        """From the own history, after many rows at once."""
        rows_CEW = self._nets.rows_LEX[layer].reshape(self._nets.experts, _PARTS, -1).transpose(1, 0, 2)
        uses_A1E = (own_FE[:AVERAGES] / _GAINS_A1)[:, None]
        self._averages_LAW[layer, :AVERAGES] = np.matmul(uses_A1E, rows_CEW[:AVERAGES])[:, 0]
        self._latest_LVW[layer] = np.matmul(own_FE[WEIGHT], rows_CEW[AVERAGES:])

    def inner(self, layer: int, own_FE: np.ndarray) -> np.ndarray:
        """[W + 1], the last one 1; overwritten by the next call."""
        nets, inner_W = self._nets, self._inner_W[:-1]
        np.dot(own_FE[RECENCY], nets.recency_LEW[layer], out=inner_W)
        inner_W += np.dot(_ONES_A, self._averages_LAW[layer])
        inner_W += np.dot(_ONES_V, self._latest_YW.take(nets.sources_LV[layer], 0))
        np.maximum(inner_W, 0, out=inner_W)
        return self._inner_W
