"""What the compiled kernels are told of quantised weights, made once for each description."""

from __future__ import annotations

from functools import cache

from moestro import _native
from moestro.kernels.specs import ACTIVATIONS, ENCODINGS, GATES, ExpertDeltaSpec, ExpertSpec, MatrixSpec, delta_codes
from moestro.quant.delta import DeltaRegion
from moestro.quant.low_rank import flat_region


@cache
def native_matrix(matrix: MatrixSpec) -> _native.Matrix:
    return _native.make_matrix(
        ENCODINGS.index(matrix.encoding), matrix.rows, matrix.columns, matrix.group, list(matrix.offsets)
    )


@cache
def native_experts(spec: ExpertSpec) -> _native.Experts:
    return _native.make_experts(
        native_matrix(spec.up),
        native_matrix(spec.down),
        -1 if spec.up_bias is None else spec.up_bias,
        -1 if spec.down_bias is None else spec.down_bias,
        GATES.index(spec.gate),
        ACTIVATIONS.index(spec.activation.name),
        spec.activation.alpha,
        spec.activation.limit,
    )


@cache
def native_delta(delta: DeltaRegion) -> _native.DeltaShape:
    """With an address it makes a `_native.Delta`."""
    return _native.make_delta(
        ENCODINGS.index(delta_codes(delta).encoding),
        delta.rows,
        delta.columns,
        delta.group,
        delta.salient,
        delta.ids_at,
        delta.values_at,
        delta.bias_at if delta.bias else -1,
    )


@cache
def native_expert_delta(spec: ExpertDeltaSpec) -> _native.ExpertDelta:
    up, down = (None if delta is None else native_delta(flat_region(delta)) for delta in (spec.up, spec.down))
    return _native.make_expert_delta(up, down, spec.up_at, spec.down_at)
