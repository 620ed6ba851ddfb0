"""What kernels are told of quantised weights: their shapes, where they lie, and which rows go where.

Shapes: J jobs (experts with rows), R rows of all jobs, D deltas that are on some of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moestro.quant import LEVELS
from moestro.quant.delta import DeltaRegion
from moestro.quant.groups import GROUP_SIZES
from moestro.quant.low_rank import Region

Encoding = Literal["nested", "signs", "flat8", "flat4", "flat2", "flat1"]
Gate = Literal["none", "halves", "interleaved"]
ActivationName = Literal["silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2", "sigmoid", "clamped_swiglu"]

# A name's place in these tuples is the code that the native kernels know it by.
ENCODINGS: tuple[Encoding, ...] = ("nested", "signs", "flat8", "flat4", "flat2", "flat1")
GATES: tuple[Gate, ...] = ("none", "halves", "interleaved")
ACTIVATIONS: tuple[ActivationName, ...] = (
    "silu",
    "gelu",
    "gelu_tanh",
    "gelu_quick",
    "relu",
    "relu2",
    "sigmoid",
    "clamped_swiglu",
)
FLAT_BITS = {"flat8": 8, "flat4": 4, "flat2": 2, "flat1": 1}
_DELTA_ENCODINGS: dict[int, Encoding] = {4: "flat4", 2: "flat2", 1: "flat1"}


@dataclass(frozen=True)
class MatrixSpec:
    """A quantised matrix [rows, columns]: `group` inputs share a scale.

    `offsets[p]` is where its region begins in plane p of its chain, in bytes (of a flat matrix: one, from the address
    that the kernel is given).
    """

    encoding: Encoding
    rows: int
    columns: int
    group: int
    offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.encoding in ENCODINGS, self.encoding
        assert self.rows > 0, self.rows
        assert self.columns > 0, self.columns
        assert self.group in GROUP_SIZES, self.group
        assert len(self.offsets) == 1 if self.flat else 1 <= len(self.offsets) <= len(LEVELS), self.offsets

    @property
    def flat(self) -> bool:
        return self.encoding in FLAT_BITS


@dataclass(frozen=True)
class ActivationSpec:
    """An activation by name.

    `gelu` is the exact one (erf), `gelu_quick` x * sigmoid(1.702 x), `relu2` the square of relu, and `clamped_swiglu`
    (gpt-oss) clamps gate and up to `limit` and gives gate * sigmoid(alpha * gate) * (up + 1). The numbers mean nothing
    to the others.
    """

    name: ActivationName
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        assert self.name in ACTIVATIONS, self.name


@dataclass(frozen=True)
class ExpertSpec:
    """The MLP that all experts of a layer share: down(activation(up(x))).

    `up` gives the gate's values too where there is a gate: in its first half of rows ("halves") or in every other row
    ("interleaved", gate first). Biases are fp32 at a byte offset in plane 0.
    """

    up: MatrixSpec
    down: MatrixSpec
    up_bias: int | None
    down_bias: int | None
    gate: Gate
    activation: ActivationSpec

    def __post_init__(self) -> None:
        assert self.gate in GATES, self.gate
        assert self.up.rows == self.down.columns * (1 if self.gate == "none" else 2), (self.up, self.down, self.gate)
        assert self.up.columns == self.down.rows, (self.up, self.down)
        assert self.gate != "none" or self.activation.name != "clamped_swiglu", "clamped_swiglu needs a gate"


@dataclass(frozen=True, eq=False)
class ExpertJobs:
    """Job j: the expert whose planes lie at `planes[j]`, at `levels[j]`, on `starts[j] : starts[j + 1]` of the lists.

    Attributes:
        planes: int64 [J, 4], addresses; 0 where a plane is absent.
        levels: int32 [J].
        starts: int32 [J + 1], ascending from 0 to R.
        rows: int32 [R], a row of the hidden states.
        places: int32 [R], a row of the output; no two alike.
    """

    planes: NDArray[np.int64]
    levels: NDArray[np.int32]
    starts: NDArray[np.int32]
    rows: NDArray[np.int32]
    places: NDArray[np.int32]


def delta_codes(region: DeltaRegion) -> MatrixSpec:
    """The codes of a delta, which lie at its address, as a flat matrix."""
    return MatrixSpec(_DELTA_ENCODINGS[region.bits], region.rows, region.columns, region.group, (0,))


@dataclass(frozen=True)
class ExpertDeltaSpec:
    """What a fine-tune adds to the matrices of an expert: None where one has not changed.

    `up_at` and `down_at` are where the deltas lie in the plane that holds both, in bytes (64-byte aligned).
    """

    up: Region | None
    down: Region | None
    up_at: int
    down_at: int

    def __post_init__(self) -> None:
        assert self.up_at % 64 == self.down_at % 64 == 0, self


@dataclass(frozen=True, eq=False)
class ExpertDeltas:
    """Delta d, whose plane lies at `planes[d]`, adds to rows `firsts[d] : ends[d]` of the lists of `ExpertJobs`.

    Those are rows of job `jobs[d]`, and of no other delta; rows of a job without a delta are the base's.

    Attributes:
        specs: those that deltas have, mostly one for each fine-tune.
        jobs: int32 [D].
        firsts: int32 [D].
        ends: int32 [D].
        spec: int32 [D], a place in `specs`.
        planes: int64 [D], addresses (64-byte aligned).
    """

    specs: tuple[ExpertDeltaSpec, ...]
    jobs: NDArray[np.int32]
    firsts: NDArray[np.int32]
    ends: NDArray[np.int32]
    spec: NDArray[np.int32]
    planes: NDArray[np.int64]
