"""`manifest.json`: what a store holds, where, and how to check it. Specified in docs/format.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.config import DENSE_BITS, ENCODING_NAMES, RAW
from moestro.errors import StoreError
from moestro.store.calibration_facts import CalibrationFacts, facts_body, facts_problem, parse_facts
from moestro.store.checksum import to_hex
from moestro.store.dense_file import FLAT_BITS, dense_bytes
from moestro.store.dtypes import STORED_FLOATS, TORCH_DTYPES
from moestro.store.fields import Fields
from moestro.store.layout import ALIGNMENT, PAGE, Layout, PlaneLayout, TensorLayout, layout_problem
from moestro.store.sealed_json import parse_json, seal, unseal

FORMAT = "moestro-store"
VERSION = 2
MANIFEST_NAME = "manifest.json"
_MAX_BYTES = 1 << 30


def has_manifest(folder: Path) -> bool:
    """Whether `folder` is a store: the manifest is written last, so one that has it is whole."""
    return (folder / MANIFEST_NAME).is_file()


@dataclass(frozen=True)
class Source:
    """Which checkpoint a store was made from, how it was quantised, and which of its keys the model does not use."""

    fingerprint: str
    quantisation: str | None
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class LayerEntry:
    """The routed experts of one layer: `layout` is an index into the manifest's layouts."""

    module: str
    experts: int
    layout: int


@dataclass(frozen=True)
class FileEntry:
    """A whole file of the store; plane files have no checksum of their own, their planes have."""

    name: str
    nbytes: int
    checksum: int | None


@dataclass(frozen=True)
class PlaneEntry:
    """Where a plane lies: `file` is an index into the manifest's plane files."""

    file: int
    offset: int
    checksum: int


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of dense.safetensors: `nbytes` bytes from `offset` of the file; `shape` is that of its values."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    checksum: int


@dataclass(frozen=True)
class Manifest:
    """The whole manifest. `planes` is in the order (layer, expert, plane).

    `encoding` is "raw", "nested" or "signs"; `dtype` is the type of matrices that are not quantised; `levels` are those
    that the store promises. `dense_file.checksum` is that of the first bytes of the file, up to the first tensor.
    `calibration` is None where all weights are as they were.
    """

    encoding: str
    dtype: str
    dense_bits: int
    exact_level: int
    levels: tuple[int, ...]
    source: Source
    model: dict[str, Any]
    layouts: tuple[Layout, ...]
    layers: tuple[LayerEntry, ...]
    plane_files: tuple[FileEntry, ...]
    planes: tuple[PlaneEntry, ...]
    dense_file: FileEntry
    dense: dict[str, DenseTensor]
    assets: tuple[FileEntry, ...]
    calibration: CalibrationFacts | None

    def layout_of(self, layer: LayerEntry) -> Layout:
        """The planes of one expert of `layer`."""
        return self.layouts[layer.layout]

    def plane_layouts(self) -> Iterator[PlaneLayout]:
        """The layout of every plane, in the order of `planes`."""
        for layer in self.layers:
            for _ in range(layer.experts):
                yield from self.layout_of(layer).planes


def encode(manifest: Manifest) -> bytes:
    """The only text of a manifest: sorted keys, no spaces, ASCII, its own checksum inside, a newline at the end.

    Raises:
        StoreError: the model's config holds something that JSON cannot hold.
    """
    return seal(_body(manifest))


def decode(raw: bytes, path: Path) -> Manifest:
    """Read the text of a manifest; `path` is for messages.

    Raises:
        StoreError: not a manifest, of another version, damaged, or inconsistent.
    """
    try:
        body = parse_json(raw)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        if isinstance(body, dict) and "checksum" in body and "planes" in body:
            raise _damaged(path, f"its format is {body.get('format')!r:.40}, expected {FORMAT!r}")
        raise StoreError(f"{path} is not the manifest of a moestro store. Give the folder that `moestro pack` wrote.")
    if body.get("version") != VERSION:
        raise StoreError(
            f"{path} is of format version {body.get('version')!r:.40}; this moestro reads version {VERSION}. "
            "Pack the model again, or use the moestro that wrote the store."
        )
    manifest = unseal(body, raw, parse=_parse, encode=encode, damaged=lambda detail: _damaged(path, detail))
    problem = _inconsistency(manifest)
    if problem:
        raise _damaged(path, problem)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store folder. Raises StoreError as `decode`, and when it cannot be read."""
    path = folder / MANIFEST_NAME
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise _damaged(path, f"it has {path.stat().st_size} bytes, more than any manifest")
        return decode(path.read_bytes(), path)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read ({error.strerror}). Check the disk, or pack the model again."
        ) from error


def _damaged(path: Path, detail: str) -> StoreError:
    return StoreError(f"{path} is damaged: {detail}. Pack the model again.")


def _body(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "encoding": manifest.encoding,
        "dtype": manifest.dtype,
        "dense_bits": manifest.dense_bits,
        "exact_level": manifest.exact_level,
        "levels": list(manifest.levels),
        "source": {
            "fingerprint": manifest.source.fingerprint,
            "quantisation": manifest.source.quantisation,
            "ignored": list(manifest.source.ignored),
        },
        "model": manifest.model,
        "layouts": [{"planes": [_plane_layout(plane) for plane in layout.planes]} for layout in manifest.layouts],
        "layers": [{"module": e.module, "experts": e.experts, "layout": e.layout} for e in manifest.layers],
        "plane_files": [{"name": entry.name, "nbytes": entry.nbytes} for entry in manifest.plane_files],
        "planes": [[entry.file, entry.offset, to_hex(entry.checksum)] for entry in manifest.planes],
        "dense_file": checked_file_body(manifest.dense_file),
        "dense": dense_tensor_bodies(manifest.dense),
        "assets": [checked_file_body(entry) for entry in manifest.assets],
        "calibration": None if manifest.calibration is None else facts_body(manifest.calibration),
    }


def _plane_layout(plane: PlaneLayout) -> dict[str, Any]:
    tensors = [
        {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "offset": tensor.offset,
            "nbytes": tensor.nbytes,
            "group_size": tensor.group_size,
        }
        for tensor in plane.tensors
    ]
    return {"kind": plane.kind, "level": plane.level, "nbytes": plane.nbytes, "tensors": tensors}


def checked_file_body(entry: FileEntry) -> dict[str, Any]:
    """How a file that has a checksum is written in a manifest."""
    assert entry.checksum is not None
    return {"name": entry.name, "nbytes": entry.nbytes, "checksum": to_hex(entry.checksum)}


def dense_tensor_bodies(tensors: Mapping[str, DenseTensor]) -> dict[str, list[Any]]:
    """How tensors of a dense file are written in a manifest."""
    return {
        name: [tensor.dtype, list(tensor.shape), tensor.offset, tensor.nbytes, to_hex(tensor.checksum)]
        for name, tensor in tensors.items()
    }


def parse_dense_tensors(body: Fields, key: str) -> dict[str, DenseTensor]:
    """Tensors from what `dense_tensor_bodies` gave."""
    return {
        name: DenseTensor(row.text(0), row.sizes(1), row.size(2), row.size(3), row.checksum(4))
        for name, row in body.named_rows(key, columns=5)
    }


def _parse(body: Fields) -> Manifest:
    source = body.object("source")
    facts = body.object_or_none("calibration")
    return Manifest(
        encoding=body.text("encoding"),
        dtype=body.text("dtype"),
        dense_bits=body.size("dense_bits"),
        exact_level=body.size("exact_level"),
        levels=body.sizes("levels"),
        source=Source(source.text("fingerprint"), source.text_or_none("quantisation"), source.texts("ignored")),
        model=body.raw_object("model"),
        layouts=tuple(_parse_layout(entry) for entry in body.objects("layouts")),
        layers=tuple(
            LayerEntry(entry.text("module"), entry.size("experts"), entry.size("layout"))
            for entry in body.objects("layers")
        ),
        plane_files=tuple(FileEntry(e.file_name("name"), e.size("nbytes"), None) for e in body.objects("plane_files")),
        planes=tuple(PlaneEntry(row.size(0), row.size(1), row.checksum(2)) for row in body.rows("planes", columns=3)),
        dense_file=parse_checked_file(body.object("dense_file")),
        dense=parse_dense_tensors(body, "dense"),
        assets=tuple(parse_checked_file(entry) for entry in body.objects("assets")),
        calibration=None if facts is None else parse_facts(facts),
    )


def _parse_layout(entry: Fields) -> Layout:
    planes = []
    for plane in entry.objects("planes"):
        tensors = tuple(
            TensorLayout(
                t.text("name"),
                t.text("dtype"),
                t.sizes("shape"),
                t.size("offset"),
                t.size("nbytes"),
                t.size_or_none("group_size"),
            )
            for t in plane.objects("tensors")
        )
        planes.append(PlaneLayout(plane.text("kind"), plane.size("level"), plane.size("nbytes"), tensors))
    return Layout(tuple(planes))


def parse_checked_file(entry: Fields) -> FileEntry:
    """A file from what `checked_file_body` gave."""
    return FileEntry(entry.file_name("name"), entry.size("nbytes"), entry.checksum("checksum"))


def _inconsistency(manifest: Manifest) -> str | None:
    """What contradicts itself in a manifest whose text is intact, or None."""
    if manifest.dtype not in STORED_FLOATS:
        return f"its dtype is {manifest.dtype!r}, expected one of {', '.join(STORED_FLOATS)}"
    if manifest.dense_bits not in DENSE_BITS:
        return f"its dense weights have {manifest.dense_bits} bits"
    for layout in manifest.layouts:
        problem = layout_problem(layout)
        if problem:
            return f"it describes {problem}"
    if any(layer.layout >= len(manifest.layouts) or layer.experts < 1 for layer in manifest.layers):
        return "it describes a layer without experts or without a layout"
    return (
        _level_problem(manifest)
        or _encoding_problem(manifest)
        or _misplaced_plane(manifest)
        or _misplaced_tensor(manifest)
    )


def _level_problem(manifest: Manifest) -> str | None:
    levels = {plane.level for layout in manifest.layouts for plane in layout.planes}
    promised = manifest.levels
    if tuple(sorted(set(promised))) != promised or not levels.issuperset(promised) or max(levels) not in promised:
        return "its levels are not those of its planes"
    if manifest.exact_level not in promised:
        return f"its exact level {manifest.exact_level} is not one of its levels"
    return None


def _encoding_problem(manifest: Manifest) -> str | None:
    layouts, facts = manifest.layouts, manifest.calibration
    types = {tensor.dtype for layout in layouts for plane in layout.planes for tensor in plane.tensors}
    if manifest.encoding == RAW:
        if any(plane.kind != RAW for layout in layouts for plane in layout.planes):
            return "its planes are not raw, its encoding is"
        return None if facts is None else "it was calibrated, which raw weights are not"
    if manifest.encoding not in ENCODING_NAMES:
        return f"its encoding is {manifest.encoding!r}, expected {RAW} or one of {', '.join(ENCODING_NAMES)}"
    if manifest.encoding not in types or not types <= {manifest.encoding, "F32"}:
        return f"its planes are not of its encoding {manifest.encoding}"
    if facts is None:
        return "it does not say how its codes were found"
    return facts_problem(facts, [layer.experts for layer in manifest.layers], manifest.levels)


def _misplaced_plane(manifest: Manifest) -> str | None:
    sizes = [plane.nbytes for plane in manifest.plane_layouts()]
    if len(sizes) != len(manifest.planes):
        return f"it lists {len(manifest.planes)} planes, its layers have {len(sizes)}"
    ends = [0] * len(manifest.plane_files)
    for entry, nbytes in zip(manifest.planes, sizes, strict=True):
        if entry.file >= len(ends) or entry.offset != ends[entry.file] or entry.offset % PAGE:
            return f"a plane lies at byte {entry.offset} of plane file {entry.file}, where it cannot be"
        ends[entry.file] += nbytes
    if ends != [entry.nbytes for entry in manifest.plane_files]:
        return "its plane files are not as long as their planes"
    return None


def _misplaced_tensor(manifest: Manifest) -> str | None:
    end = 0
    for name, tensor in sorted(manifest.dense.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        known = tensor.dtype in TORCH_DTYPES or (tensor.dtype in FLAT_BITS and len(tensor.shape) == 2)
        if not known or tensor.nbytes != dense_bytes(tensor.dtype, tensor.shape):
            return f"dense tensor {name} has {tensor.nbytes} bytes, which does not match its shape"
        if tensor.offset % ALIGNMENT or tensor.offset < end:
            return f"dense tensor {name} lies at byte {tensor.offset}, where it cannot be"
        end = tensor.offset + tensor.nbytes
    if end > manifest.dense_file.nbytes:
        return f"the dense tensors need {end} bytes, the file has {manifest.dense_file.nbytes}"
    return None
