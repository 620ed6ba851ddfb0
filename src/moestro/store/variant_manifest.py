"""`variant.json`: what a variant adds to its base, where, and how to check it. Specified in docs/format.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moestro.errors import StoreError, VariantError
from moestro.quant.delta import DELTA_BITS, DeltaRegion
from moestro.quant.low_rank import LowRankRegion, Region
from moestro.store.calibration_facts import NO_TEXT, CalibrationText
from moestro.store.checksum import to_hex
from moestro.store.dtypes import TORCH_DTYPES, tensor_bytes
from moestro.store.fields import Fields
from moestro.store.layout import ALIGNMENT, PAGE, align
from moestro.store.manifest import (
    DenseTensor,
    FileEntry,
    checked_file_body,
    dense_tensor_bodies,
    parse_checked_file,
    parse_dense_tensors,
)
from moestro.store.sealed_json import parse_json, seal, unseal

FORMAT = "moestro-variant"
VERSION = 1
VARIANT_NAME = "variant.json"
PLANES_NAME = "experts.planes"
DENSE_NAME = "dense.safetensors"
LOW_RANK = "delta-come"
METHODS = ("me-switch", "bitdelta", LOW_RANK)
"""How the codes of a variant were found. Those of the last one are products of two matrices, of the others flat."""

_MAX_BYTES = 1 << 28


class ExpertDelta(NamedTuple):
    """The plane that each changed expert of a layer has: the regions of its matrices (None: unchanged in the whole
    layer), their offsets in the plane, and the plane's bytes, padding included."""

    up: Region | None
    down: Region | None
    up_at: int
    down_at: int
    nbytes: int


@dataclass(frozen=True)
class DeltaPlane:
    """Where the delta plane of one expert lies in the file of planes."""

    layer: int
    expert: int
    offset: int
    checksum: int


@dataclass(frozen=True)
class DenseDelta:
    """The delta of a dense matrix: `region.nbytes` bytes from `offset` of the dense file."""

    region: Region
    offset: int
    checksum: int

    @property
    def nbytes(self) -> int:
        """Bytes of the region."""
        return self.region.nbytes


@dataclass(frozen=True)
class VariantManifest:
    """All of `variant.json`.

    `base` is the fingerprint of the checkpoint that the store is of, `source` that of the fine-tune. `salient` is the
    share of input channels that are kept; `text` what the codes were calibrated on (None: nothing), `tokens` how many
    of its tokens; `distilled` the steps of distillation. `layers[l]` is None for a layer whose experts did not change.
    `planes` ascend by (layer, expert).
    """

    base: str
    source: str
    source_name: str
    method: str
    bits: int
    dense_bits: int
    salient: float
    text: CalibrationText | None
    tokens: int
    distilled: int
    warnings: tuple[str, ...]
    layers: tuple[ExpertDelta | None, ...]
    planes_file: FileEntry
    planes: tuple[DeltaPlane, ...]
    dense_file: FileEntry
    deltas: dict[str, DenseDelta]
    replacements: dict[str, DenseTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its planes and of its dense parts, padding included."""
        return self.planes_file.nbytes + self.dense_file.nbytes


def expert_delta(up: Region | None, down: Region | None) -> ExpertDelta:
    """A plane of these regions, the second one right after the first."""
    down_at = up.nbytes if up else 0
    return ExpertDelta(up, down, 0, down_at, align(down_at + (down.nbytes if down else 0), PAGE))


def encode(manifest: VariantManifest) -> bytes:
    """The only text of a manifest, with its own checksum inside."""
    return seal(_body(manifest))


def read_variant(folder: Path) -> VariantManifest:
    """The manifest of a variant's folder.

    Raises:
        VariantError: it cannot be read, is damaged, of another version, or contradicts itself.
    """
    path = folder / VARIANT_NAME
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise damaged(path, f"it has {path.stat().st_size} bytes, more than any variant's")
        return decode(path.read_bytes(), path)
    except OSError as error:
        raise VariantError(
            f"{path} cannot be read ({error.strerror}). Check the disk, or add the variant again."
        ) from error


def decode(raw: bytes, path: Path) -> VariantManifest:
    """Read the text of a manifest; `path` is for messages. Raises VariantError."""
    try:
        body = parse_json(raw)
    except ValueError as error:
        raise damaged(path, str(error)) from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise damaged(path, f"it does not say that it is a {FORMAT}")
    if body.get("version") != VERSION:
        raise VariantError(
            f"{path} is of format version {body.get('version')!r:.40}; this moestro reads version {VERSION}. "
            "Remove the variant and add it again, or use the moestro that added it."
        )
    manifest = unseal(body, raw, parse=_parse, encode=encode, damaged=lambda detail: damaged(path, detail))
    problem = _inconsistency(manifest)
    if problem:
        raise damaged(path, problem)
    return manifest


def damaged(path: Path, detail: str) -> VariantError:
    """The error for a file of a variant that is not as it was written."""
    return VariantError(f"{path} is damaged: {detail}. Remove the variant and add it again.")


def _body(manifest: VariantManifest) -> dict[str, Any]:
    text = manifest.text
    return {
        "format": FORMAT,
        "version": VERSION,
        "base": manifest.base,
        "source": {"fingerprint": manifest.source, "name": manifest.source_name},
        "method": {
            "name": manifest.method,
            "bits": manifest.bits,
            "dense_bits": manifest.dense_bits,
            "salient": manifest.salient,
            "text": text.name if text else NO_TEXT,
            "text_checksum": to_hex(text.checksum) if text else None,
            "tokens": manifest.tokens,
            "distilled": manifest.distilled,
        },
        "warnings": list(manifest.warnings),
        "layers": [None if layer is None else _layer(layer) for layer in manifest.layers],
        "planes_file": {"name": manifest.planes_file.name, "nbytes": manifest.planes_file.nbytes},
        "planes": [[plane.layer, plane.expert, plane.offset, to_hex(plane.checksum)] for plane in manifest.planes],
        "dense_file": checked_file_body(manifest.dense_file),
        "deltas": {
            name: [*_region(delta.region), delta.offset, to_hex(delta.checksum)]
            for name, delta in manifest.deltas.items()
        },
        "replacements": dense_tensor_bodies(manifest.replacements),
    }


def _layer(layer: ExpertDelta) -> dict[str, Any]:
    return {
        "up": None if layer.up is None else _region(layer.up),
        "down": None if layer.down is None else _region(layer.down),
        "down_at": layer.down_at,
        "nbytes": layer.nbytes,
    }


def _region(region: Region) -> list[int]:
    if isinstance(region, LowRankRegion):
        return [region.rows, region.columns, *region.ranks, int(region.bias)]
    return [region.rows, region.columns, region.bits, region.salient, int(region.bias)]


def _parse(body: Fields) -> VariantManifest:
    source, method = body.object("source"), body.object("method")
    planes = body.object("planes_file")
    digits = method.checksum_or_none("text_checksum")
    low_rank = method.text("name") == LOW_RANK
    numbers = 6 if low_rank else 5
    return VariantManifest(
        base=body.text("base"),
        source=source.text("fingerprint"),
        source_name=source.text("name"),
        method=method.text("name"),
        bits=method.size("bits"),
        dense_bits=method.size("dense_bits"),
        salient=method.number("salient"),
        text=None if digits is None else CalibrationText(method.text("text"), digits),
        tokens=method.size("tokens"),
        distilled=method.size("distilled"),
        warnings=body.texts("warnings"),
        layers=tuple(_parse_layer(layer, low_rank=low_rank) for layer in body.objects_or_nulls("layers")),
        planes_file=FileEntry(planes.file_name("name"), planes.size("nbytes"), None),
        planes=tuple(
            DeltaPlane(row.size(0), row.size(1), row.size(2), row.checksum(3)) for row in body.rows("planes", columns=4)
        ),
        dense_file=parse_checked_file(body.object("dense_file")),
        deltas={
            name: DenseDelta(
                _parse_region([row.size(place) for place in range(numbers)], low_rank=low_rank),
                row.size(numbers),
                row.checksum(numbers + 1),
            )
            for name, row in body.named_rows("deltas", columns=numbers + 2)
        },
        replacements=parse_dense_tensors(body, "replacements"),
    )


def _parse_layer(layer: Fields | None, *, low_rank: bool) -> ExpertDelta | None:
    if layer is None:
        return None
    up, down = layer.sizes_or_none("up"), layer.sizes_or_none("down")
    return ExpertDelta(
        None if up is None else _parse_region(up, low_rank=low_rank),
        None if down is None else _parse_region(down, low_rank=low_rank),
        0,
        layer.size("down_at"),
        layer.size("nbytes"),
    )


def _parse_region(numbers: Sequence[int], *, low_rank: bool) -> Region:
    return _parse_low_rank(numbers) if low_rank else _parse_flat(numbers)


def _parse_low_rank(numbers: Sequence[int]) -> LowRankRegion:
    if len(numbers) != 6:
        raise StoreError(f"a delta is described by {len(numbers)} numbers, expected 6")
    rows, columns, *ranks, bias = numbers
    if not 0 < rows < 2**31 or not 0 < columns < 2**31 or not 0 < sum(ranks) <= min(rows, columns) or bias > 1:
        raise StoreError(f"a delta is described by {list(numbers)}, which cannot be")
    return LowRankRegion(rows, columns, (ranks[0], ranks[1], ranks[2]), bool(bias))


def _parse_flat(numbers: Sequence[int]) -> DeltaRegion:
    if len(numbers) != 5:
        raise StoreError(f"a delta is described by {len(numbers)} numbers, expected 5")
    rows, columns, bits, salient, bias = numbers
    if not 0 < rows < 2**31 or not 0 < columns < 2**31 or bits not in DELTA_BITS or salient > columns or bias > 1:
        raise StoreError(f"a delta is described by {list(numbers)}, which cannot be")
    return DeltaRegion(rows, columns, bits, salient, bool(bias))


def _inconsistency(manifest: VariantManifest) -> str | None:
    """What contradicts itself in a manifest whose text is intact, or None."""
    if manifest.method not in METHODS:
        return f"its method is {manifest.method!r}, expected one of {', '.join(METHODS)}"
    if manifest.bits not in DELTA_BITS or manifest.dense_bits not in DELTA_BITS:
        return f"its codes have {manifest.bits} and {manifest.dense_bits} bits"
    if not 0.0 <= manifest.salient <= 1.0:
        return f"it keeps a share of {manifest.salient} of the channels"
    for layer in manifest.layers:
        if layer is not None and layer != expert_delta(layer.up, layer.down):
            return "the parts of a plane do not lie where they should"
    return _misplaced_plane(manifest) or _misplaced_tensor(manifest)


def _misplaced_plane(manifest: VariantManifest) -> str | None:
    end, last = 0, (-1, -1)
    for plane in manifest.planes:
        place = (plane.layer, plane.expert)
        layer = manifest.layers[plane.layer] if plane.layer < len(manifest.layers) else None
        if layer is None or layer.nbytes == 0 or place <= last or plane.offset != end:
            return f"the plane of expert {plane.expert} in MoE layer {plane.layer} is where it cannot be"
        end, last = end + layer.nbytes, place
    if end != manifest.planes_file.nbytes:
        return f"its planes have {end} bytes, their file {manifest.planes_file.nbytes}"
    return None


def _misplaced_tensor(manifest: VariantManifest) -> str | None:
    places = [(delta.offset, delta.nbytes, name) for name, delta in manifest.deltas.items()]
    for name, tensor in manifest.replacements.items():
        if tensor.dtype not in TORCH_DTYPES or tensor.nbytes != tensor_bytes(tensor.dtype, tensor.shape):
            return f"tensor {name} has {tensor.nbytes} bytes, which does not match its shape"
        if name in manifest.deltas:
            return f"tensor {name} is both a delta and a replacement"
        places.append((tensor.offset, tensor.nbytes, name))
    end = 0
    for offset, nbytes, name in sorted(places):
        if offset % ALIGNMENT or offset < end:
            return f"tensor {name} lies at byte {offset}, where it cannot be"
        end = offset + nbytes
    if end > manifest.dense_file.nbytes:
        return f"the dense tensors need {end} bytes, the file has {manifest.dense_file.nbytes}"
    return None
