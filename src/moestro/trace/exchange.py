"""Traces from elsewhere and for elsewhere.

Shapes: N rows, L MoE layers, K experts per row, R requests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moestro.errors import TraceError
from moestro.trace.checks import Checks
from moestro.trace.npz import read_npz
from moestro.trace.recorder import quantised_weights
from moestro.trace.trace import Trace, trace_of_arrays

SUFFIXES = (".npz", ".parquet")


def import_trace(path: Path, *, num_experts: int | None = None) -> Trace:
    """Read an npz of the keys of a trace whose numbers may be wider and less tidy than a trace's.

    Whole numbers may be of any type, weights too (normalised or not), and the experts of a row in any order; keys that
    a trace does not have are refused. `num_experts` as in `Trace.load`.

    Raises:
        TraceError: as `Trace.load`; and a number does not fit the type that a trace has for it.
    """
    try:
        arrays = read_npz(path)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror or error}. Check the name.") from error
    checks = Checks(str(path))
    for key, (kind, dimensions) in _WHOLE.items():
        if key in arrays:
            arrays[key] = _whole(key, arrays[key], kind, dimensions, checks)
    experts_NLK, weights_NLK = arrays.get("experts"), arrays.get("weights")
    if experts_NLK is not None and weights_NLK is not None:
        arrays["weights"], arrays["experts"] = _tidy(weights_NLK, experts_NLK, checks)
    ids = [key for key in ("experts", "lookahead") if key in arrays]
    kind = np.uint8 if all(arrays[key].max(initial=0) < 256 for key in ids) else np.uint16
    arrays.update({key: arrays[key].astype(kind) for key in ids})
    if "decode" in arrays and arrays["decode"].dtype.kind in "iu" and arrays["decode"].max(initial=0) <= 1:
        arrays["decode"] = arrays["decode"].astype(bool)
    return trace_of_arrays(arrays, source=str(path), num_experts=num_experts)


def export_parquet(trace: Trace, path: Path) -> None:
    """Write a table with a row for each token: request, token, decode, step, and lists of L * K experts and weights.

    What lists mean (layers, picks, num_experts) and what is said of requests is in the metadata of the schema.

    Raises:
        TraceError: pyarrow is not installed, or the file cannot be written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise TraceError(
            "Writing parquet needs pyarrow, which is not installed. Install it with `pip install moestro[parquet]`, or "
            "give a name that ends in .npz."
        ) from error
    lists = {"experts": trace.experts_NLK, "weights": trace.weights_NLK, "lookahead": trace.lookahead_NPLC}
    columns: dict[str, Any] = {
        "request": np.repeat(np.arange(trace.requests, dtype=np.int32), np.diff(trace.offsets_R1)),
        "token": trace.token_N,
        "decode": trace.decode_N,
    }
    if trace.step_N is not None:
        columns["step"] = trace.step_N
    for name, array in lists.items():
        if array is not None:
            flat = array.reshape(trace.rows, -1)
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
    facts = {"num_experts": trace.num_experts, "layers": trace.layers, "picks": trace.picks, "requests": trace.meta}
    table = pa.table(columns).replace_schema_metadata({"moestro": json.dumps(facts)})
    try:
        pq.write_table(table, path, compression="zstd")
    except OSError as error:
        raise TraceError(f"{path} cannot be written: {error.strerror or error}. Choose another place.") from error


_WHOLE: dict[str, tuple[type[np.integer[Any]], int]] = {
    "experts": (np.uint16, 3),
    "lookahead": (np.uint16, 4),
    "token": (np.int32, 1),
    "offsets": (np.int64, 1),
    "step": (np.int32, 1),
}


def _whole(key: str, array: np.ndarray, kind: type[np.integer[Any]], dimensions: int, checks: Checks) -> np.ndarray:
    """The numbers in the type that a trace has."""
    if array.dtype.kind not in "iu" or array.ndim != dimensions:
        raise checks.fail(
            key, f"is {array.dtype} of {array.ndim} dimensions, expected whole numbers of {dimensions} dimensions."
        )
    limits = np.iinfo(kind)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise checks.fail(
            key, f"has numbers from {array.min()} to {array.max()}, expected {limits.min} to {limits.max}."
        )
    return array.astype(kind)


def _tidy(weights_NLK: np.ndarray, experts_NLK: np.ndarray, checks: Checks) -> tuple[np.ndarray, np.ndarray]:
    """Weights as a trace has them, and experts in their order."""
    if weights_NLK.dtype.kind not in "iuf" or weights_NLK.shape != experts_NLK.shape:
        raise checks.fail(
            "weights",
            f"are {weights_NLK.dtype} {list(weights_NLK.shape)}, expected numbers {list(experts_NLK.shape)}.",
        )
    if not np.isfinite(weights_NLK).all() or weights_NLK.min(initial=0) < 0:
        raise checks.fail("weights", "have numbers that are negative or not finite, expected shares.")
    order_NLK = (-weights_NLK.astype(np.float64)).argsort(axis=-1, kind="stable")
    ordered_NLK = np.take_along_axis(weights_NLK, order_NLK, axis=-1)
    if weights_NLK.dtype != np.uint8:
        ordered_NLK = quantised_weights(ordered_NLK)
    return ordered_NLK, np.take_along_axis(experts_NLK, order_NLK, axis=-1)
