"""What the compiled kernels are told of quantised weights, made once for each description."""

from __future__ import annotations

from functools import cache

from moestro import _native
from moestro.kernels.specs import ACTIVATIONS, ENCODINGS, GATES, ExpertSpec, MatrixSpec


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
