"""Random quantised matrices, deltas and experts in memory, for tests of kernels.

Shapes: N rows, K columns (Np, Kp padded), G groups, H hidden, I expert width, C salient channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from moestro.kernels.specs import (
    ActivationName,
    ActivationSpec,
    Encoding,
    ExpertDeltas,
    ExpertDeltaSpec,
    ExpertJobs,
    ExpertSpec,
    Gate,
    MatrixSpec,
)
from moestro.quant import LEVELS
from moestro.quant.delta import DeltaRegion, pack_kept
from moestro.quant.flat import flat_encode
from moestro.quant.groups import TILE, group_size, groups, padded_columns, padded_rows
from moestro.quant.tiles import BITS1, BITS2, BITS4, BITS8, CodeFormat, pack_codes, pack_scaled, pack_scales

HEADER_PLACES = 16
PLANE_FORMS = (BITS2, BITS1, BITS1, BITS4)
FLAT_FORMS = {"flat8": BITS8, "flat4": BITS4, "flat2": BITS2, "flat1": BITS1}


class Source:
    """Random numbers that depend on a seed alone."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def codes(self, rows: int, columns: int, form: CodeFormat) -> torch.Tensor:
        return torch.randint(0, 2**form.bits, (rows, columns), generator=self.generator, dtype=torch.uint8)

    def scales(self, rows: int, count: int) -> torch.Tensor:
        """fp16 numbers over the whole range of magnitudes that packing gives, some of them denormal or zero."""
        exponent = torch.randint(-26, 13, (rows, count), generator=self.generator)
        return (self.normal(rows, count) * 2.0**exponent).half()


@dataclass(frozen=True)
class PackedMatrix:
    """`planes` holds the bytes; the matrix lies at `spec.offsets` in them."""

    spec: MatrixSpec
    planes: tuple[torch.Tensor, ...]

    @property
    def addresses(self) -> tuple[int, ...]:
        return tuple(plane.data_ptr() for plane in self.planes)


def random_matrix(
    source: Source, encoding: Encoding, rows: int, columns: int, *, cells: tuple[int, int] = (16, 1)
) -> PackedMatrix:
    """A matrix of random codes and scales, somewhere in the middle of its planes. `cells` are hi and lo of 8 bits."""
    spec_offsets, planes = [], []
    for place, region in enumerate(_regions(source, encoding, rows, columns, cells)):
        offset = 64 * (place + 1)
        filler = torch.randint(0, 256, (offset,), generator=source.generator, dtype=torch.uint8)
        spec_offsets.append(offset)
        planes.append(torch.cat((filler, region)))
    spec = MatrixSpec(encoding, rows, columns, group_size(columns), tuple(spec_offsets))
    return PackedMatrix(spec, tuple(planes))


def _regions(source: Source, encoding: Encoding, rows: int, columns: int, cells: tuple[int, int]) -> list[torch.Tensor]:
    tall, wide, count, group = padded_rows(rows), padded_columns(columns), groups(columns), group_size(columns)
    header = torch.zeros(HEADER_PLACES)
    header[0] = 2.0**-9
    header[1:5] = source.normal(4).abs() + 0.1
    if encoding == "nested":
        header[5:7] = torch.tensor(cells, dtype=torch.float32)
    scales = (source.scales(tall, count), source.scales(tall, count))
    form = FLAT_FORMS.get(encoding, BITS2)
    base = pack_scaled(scales, source.codes(tall, wide, form), group, form)
    regions = [torch.cat((header.view(torch.uint8), base))]
    if encoding in FLAT_FORMS:
        return regions
    for form in PLANE_FORMS[1:]:
        codes = pack_codes(source.codes(tall, wide, form), group, form).view(tall // TILE, -1)
        if encoding == "signs":
            own = pack_scales(source.scales(tall, count)).view(tall // TILE, -1)
            codes = torch.cat((own, own.new_zeros((len(own), -own.shape[1] % 64)), codes), dim=1)
        regions.append(codes.flatten())
    return regions


@dataclass(frozen=True)
class PackedDelta:
    """The bytes of a delta."""

    region: DeltaRegion
    bytes: torch.Tensor

    @property
    def address(self) -> int:
        return self.bytes.data_ptr()


def random_delta(
    source: Source, rows: int, columns: int, *, bits: int, salient: int, biased: bool = False
) -> PackedDelta:
    """A delta of random codes and scales; its salient channels are anywhere."""
    (codes,) = _regions(source, f"flat{bits}", rows, columns, (16, 1))  # type: ignore[arg-type]
    values_CN = source.scales(salient, padded_rows(rows))
    return _delta(source, DeltaRegion(rows, columns, bits, salient, biased), codes, values_CN)


def filled_delta(
    source: Source, rows: int, columns: int, *, bits: int, salient: int, size: float, biased: bool = False
) -> PackedDelta:
    """A delta of normal values of about this size."""
    codes = flat_encode(source.normal(rows, columns) * size, bits)
    values_CN = (source.normal(salient, padded_rows(rows)) * size).half()
    return _delta(source, DeltaRegion(rows, columns, bits, salient, biased), codes, values_CN)


def _delta(source: Source, region: DeltaRegion, codes: torch.Tensor, values_CN: torch.Tensor) -> PackedDelta:
    ids_C = torch.randperm(region.columns, generator=source.generator)[: region.salient].sort().values.to(torch.int32)
    data = torch.zeros(region.nbytes, dtype=torch.uint8)
    parts = [(0, codes), (region.ids_at, ids_C), (region.values_at, pack_kept(values_CN))]
    if region.bias:
        parts.append((region.bias_at, source.normal(region.rows)))
    for start, part in parts:
        if part.numel():
            as_bytes = part.contiguous().view(torch.uint8).flatten()
            data[start : start + len(as_bytes)] = as_bytes
    return PackedDelta(region, data)


@dataclass(frozen=True)
class Experts:
    """Experts with the planes of each; biases lie behind the matrices in plane 0."""

    spec: ExpertSpec
    planes: tuple[tuple[torch.Tensor, ...], ...]

    def addresses(self, levels: list[int]) -> np.ndarray:
        """[J, 4] for experts 0 to J - 1; planes above their levels are absent."""
        out = np.zeros((len(levels), 4), dtype=np.int64)
        for job, level in enumerate(levels):
            for plane in range(LEVELS.index(level) + 1):
                out[job, plane] = self.planes[job][plane].data_ptr()
        return out

    def jobs(self, levels: list[int], rows: list[list[int]], order: list[int]) -> ExpertJobs:
        """Job j on `rows[j]`; `order` says where in the output the results go."""
        listed = [row for job in rows for row in job]
        starts = np.cumsum([0, *map(len, rows)])
        return ExpertJobs(
            self.addresses(levels),
            np.array(levels, dtype=np.int32),
            starts.astype(np.int32),
            np.array(listed, dtype=np.int32),
            np.array(order, dtype=np.int32),
        )


def random_experts(
    source: Source,
    count: int,
    *,
    encoding: Encoding,
    hidden: int,
    width: int,
    gate: Gate,
    activation: ActivationName,
    biased: bool = False,
) -> Experts:
    up_rows = width if gate == "none" else 2 * width
    up = random_matrix(source, encoding, up_rows, hidden).spec
    down_starts: list[tuple[int, ...]] = []
    all_planes = []
    for _ in range(count):
        up_matrix = random_matrix(source, encoding, up_rows, hidden)
        down_matrix = random_matrix(source, encoding, hidden, width)
        biases = source.normal(up_rows + hidden).view(torch.uint8)
        pairs = zip(up_matrix.planes, down_matrix.planes, strict=True)
        planes = [torch.cat((first, first.new_zeros(-len(first) % 64), second)) for first, second in pairs]
        down_starts.append(tuple(len(plane) + -len(plane) % 64 for plane in up_matrix.planes))
        planes[0] = torch.cat((planes[0], planes[0].new_zeros(-len(planes[0]) % 4), biases))
        all_planes.append(tuple(planes))
    down = random_matrix(source, encoding, hidden, width).spec
    offsets = tuple(start + offset for start, offset in zip(down_starts[0], down.offsets, strict=True))
    bias = len(all_planes[0][0]) - 4 * (up_rows + hidden)
    spec = ExpertSpec(
        up,
        MatrixSpec(encoding, hidden, width, down.group, offsets),
        bias if biased else None,
        bias + 4 * up_rows if biased else None,
        gate,
        ActivationSpec(activation, alpha=1.702, limit=0.8),
    )
    return Experts(spec, tuple(all_planes))


@dataclass(frozen=True)
class FineTune:
    """What a fine-tune adds to experts: the plane of each."""

    spec: ExpertDeltaSpec
    planes: tuple[torch.Tensor, ...]


def random_fine_tune(
    source: Source,
    experts: Experts,
    *,
    bits: int,
    share: float,
    up: bool = True,
    down: bool = True,
    biased: bool = False,
    size: float | None = None,
) -> FineTune:
    """Deltas of every expert, of the matrices that are to have one, with a share of their channels salient.

    Values are of about `size`; without one they are anything.
    """
    make = random_delta if size is None else partial(filled_delta, size=size)
    matrices = (experts.spec.up if up else None, experts.spec.down if down else None)
    spec, planes = ExpertDeltaSpec(None, None, 0, 0), []
    for _ in experts.planes:
        parts = [
            matrix
            and make(
                source,
                matrix.rows,
                matrix.columns,
                bits=bits,
                salient=round(share * matrix.columns),
                biased=biased,
            )
            for matrix in matrices
        ]
        up_delta, down_delta = parts
        down_at = 0 if up_delta is None else up_delta.region.nbytes
        spec = ExpertDeltaSpec(up_delta and up_delta.region, down_delta and down_delta.region, 0, down_at)
        planes.append(torch.cat([torch.empty(0, dtype=torch.uint8), *(part.bytes for part in parts if part)]))
    return FineTune(spec, tuple(planes))


def expert_deltas(tunes: list[FineTune], placed: list[tuple[int, int, int, int]]) -> ExpertDeltas:
    """Of (job, first row, end row, fine-tune), where job j is of expert j."""

    def ints(place: int) -> np.ndarray:
        return np.array([delta[place] for delta in placed], dtype=np.int32)

    addresses = [tunes[tune].planes[job].data_ptr() for job, _, _, tune in placed]
    specs = tuple(tune.spec for tune in tunes)
    return ExpertDeltas(specs, ints(0), ints(1), ints(2), ints(3), np.array(addresses, dtype=np.int64))
