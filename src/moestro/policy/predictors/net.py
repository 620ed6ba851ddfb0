"""Small nets, one per layer, from a request's history to probabilities of use within several horizons.

After ProMoE's predictor of two linear layers (arXiv 2410.22134), with inputs from routing alone: no hidden states. An
expert's own history also goes to its outputs directly: logits = relu(inputs @ inner + inner_bias) @ outer + sum over F
of own x the expert's own features (the first F x E inputs) + bias. `folded` computes them.

Shapes: L MoE layers, E experts, F own features, D inputs, W width, H horizons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from moestro.errors import TraceError
from moestro.policy.observation import Shape
from moestro.policy.predictors.history import OWN, input_size

HORIZONS = (1, 2, 4, 8, 16, 32)
"""Visits within which a use is foreseen after the layer has routed."""


@dataclass(frozen=True, slots=True, eq=False)
class Nets:
    """Weights of all layers' nets, float32."""

    inner_LDW: np.ndarray
    inner_bias_LW: np.ndarray
    outer_LWHE: np.ndarray
    own_LHFE: np.ndarray
    bias_LHE: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, to be kept in a file."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray], shape: Shape, *, horizons: int) -> Nets:
        """From arrays that were kept in a file; raises TraceError for any that is not what this model needs."""
        layers, experts, inputs = shape.layers, shape.experts, input_size(shape.experts)
        width = arrays["inner_bias_LW"].shape[-1] if "inner_bias_LW" in arrays else 0
        wanted = {
            "inner_LDW": (layers, inputs, width),
            "inner_bias_LW": (layers, width),
            "outer_LWHE": (layers, width, horizons, experts),
            "own_LHFE": (layers, horizons, OWN, experts),
            "bias_LHE": (layers, horizons, experts),
        }
        for name, sizes in wanted.items():
            found = arrays.get(name)
            if found is None or found.shape != sizes or found.dtype != np.float32 or not np.isfinite(found).all():
                what = "missing" if found is None else f"{found.dtype} of shape {found.shape}"
                raise TraceError(
                    f"The learned predictor's {name} is {what}, expected finite float32 of shape {sizes} for a model "
                    f"of {layers} MoE layers with {experts} experts. Train it again on traces of this model."
                )
        return Nets(**{name: np.ascontiguousarray(arrays[name]) for name in wanted})
