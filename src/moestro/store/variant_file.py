"""The variants of a store: which there are, opening one with cheap checks, removing one.

A variant is a folder in `STORE/variants`. It gets its name when it is whole and loses it before anything of it is
deleted, so a folder with a name is always a whole variant, and files that are open go on to be readable.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moestro.errors import VariantError
from moestro.keys import PlaneExtent
from moestro.store.checksum import checksum_range, to_hex
from moestro.store.disk import sync_file
from moestro.store.manifest import DenseTensor, FileEntry
from moestro.store.reader import Store
from moestro.store.variant_manifest import (
    LOW_RANK,
    VARIANT_NAME,
    DenseDelta,
    ExpertDelta,
    VariantManifest,
    read_variant,
)

VARIANTS_FOLDER = "variants"
PARTIAL_SUFFIX, REMOVED_SUFFIX = ".partial", ".removed"
RESERVED_NAMES = ("auto", "base")
"""What a client may write after the store's name that is no variant."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NOTHING = ExpertDelta(None, None, 0, 0, 0)


@dataclass(frozen=True)
class StoredVariant:
    """A whole variant on disk. Open it with `open_variant`."""

    name: str
    folder: Path
    manifest: VariantManifest
    _extents: Mapping[tuple[int, int], PlaneExtent] = field(repr=False)

    def plane(self, layer: int, expert: int) -> PlaneExtent | None:
        """Where the expert's delta plane lies; None: this expert did not change."""
        return self._extents.get((layer, expert))

    def expert_spec(self, layer: int) -> ExpertDelta:
        """What is in each delta plane of a layer, and where."""
        return self.manifest.layers[layer] or _NOTHING

    @property
    def planes_file(self) -> Path:
        """The file of the delta planes."""
        return self.folder / self.manifest.planes_file.name

    @property
    def dense_deltas(self) -> Mapping[str, DenseDelta]:
        """Deltas of dense matrices, by the matrix's name; places are in `dense_file`."""
        return self.manifest.deltas

    @property
    def replacements(self) -> Mapping[str, DenseTensor]:
        """Dense tensors that take the place of the base's, by name; places are in `dense_file`."""
        return self.manifest.replacements

    @property
    def dense_file(self) -> Path:
        """A safetensors file."""
        return self.folder / self.manifest.dense_file.name

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the whole dense file: what one read brings in."""
        return self.manifest.dense_file.nbytes

    @property
    def planes_nbytes(self) -> int:
        """Bytes of all delta planes, padding included."""
        return self.manifest.planes_file.nbytes

    def verify(self) -> list[str]:
        """Read everything and compare checksums. One line per part that cannot be read or is not as it was written."""
        return [problem for part in self._parts() if (problem := _problem(*part)) is not None]

    def _parts(self) -> Iterator[tuple[str, Path, int, int, int]]:
        for (layer, expert), extent in self._extents.items():
            label = f"the plane of expert {expert} in MoE layer {layer}"
            yield label, extent.file, extent.offset, extent.nbytes, extent.checksum
        file, head = self.dense_file, self.manifest.dense_file.nbytes
        for tensors in (self.dense_deltas, self.replacements):
            for name, tensor in tensors.items():
                head = min(head, tensor.offset)
                yield f"tensor {name}", file, tensor.offset, tensor.nbytes, tensor.checksum
        yield "the header", file, 0, head, self.manifest.dense_file.checksum or 0


def list_variants(store_folder: Path) -> tuple[str, ...]:
    """The names of a store's variants, sorted. Whether each can be opened is another matter."""
    folder = store_folder / VARIANTS_FOLDER
    try:
        names = [entry.name for entry in os.scandir(folder) if is_name(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return tuple(sorted(name for name in names if (folder / name / VARIANT_NAME).is_file()))


def any_low_rank(store: Store) -> bool:
    """Whether a variant of the store has deltas that only the general path computes; damaged ones have not."""
    for name in list_variants(store.path):
        try:
            if read_variant(variant_folder(store.path, name)).method == LOW_RANK:
                return True
        except VariantError:
            continue
    return False


def open_variant(store: Store, name: str) -> StoredVariant:
    """A variant of the store: its manifest is checked, that it belongs to this store, and its files' lengths.

    Raises:
        VariantError: there is no such variant, or it is damaged or of another base.
    """
    folder = variant_folder(store.path, name)
    if not (folder / VARIANT_NAME).is_file():
        raise _no_variant(store.path, name)
    manifest = read_variant(folder)
    if manifest.base != store.manifest.source.fingerprint:
        raise VariantError(
            f"The variant {name} is one of the checkpoint {manifest.base}, and the store {store.path} is of "
            f"{store.manifest.source.fingerprint}. Add the fine-tune again to a store of its own base."
        )
    problem = _misfit(store, manifest)
    if problem:
        raise VariantError(
            f"The variant {name} does not fit the store {store.path}: {problem}. Remove it and add it again."
        )
    for entry in (manifest.planes_file, manifest.dense_file):
        _check_file(folder / entry.name, entry)
    file = folder / manifest.planes_file.name
    extents = {}
    for plane in manifest.planes:
        layer = manifest.layers[plane.layer]
        assert layer is not None  # the manifest was checked
        extents[plane.layer, plane.expert] = PlaneExtent(file, plane.offset, layer.nbytes, plane.checksum)
    return StoredVariant(name, folder, manifest, extents)


def remove_variant(store_folder: Path, name: str) -> None:
    """Take a variant out of a store, a damaged one, too. Whoever has its files open can go on reading them.

    Raises:
        VariantError: there is no such variant.
        OSError: it cannot be deleted.
    """
    folder = variant_folder(store_folder, name)
    if not folder.is_dir():
        raise _no_variant(store_folder, name)
    grave = folder.with_name(name + REMOVED_SUFFIX)
    shutil.rmtree(grave, ignore_errors=True)
    os.rename(folder, grave)
    sync_file(folder.parent)
    shutil.rmtree(grave)


def is_name(name: str) -> bool:
    """Whether a variant can have this name."""
    return (
        _NAME.fullmatch(name) is not None
        and name not in RESERVED_NAMES
        and not name.endswith((PARTIAL_SUFFIX, REMOVED_SUFFIX))
    )


def variant_folder(store_folder: Path, name: str) -> Path:
    """Where a variant lies. Raises VariantError for a name that none can have."""
    if not is_name(name):
        raise VariantError(
            f"A variant cannot be named {name!r:.80}. Expected 1 to 64 letters, digits, dots, dashes and underscores, "
            f"the first a letter or digit; not {' or '.join(RESERVED_NAMES)}, and not ending in {PARTIAL_SUFFIX} or "
            f"{REMOVED_SUFFIX}."
        )
    return store_folder / VARIANTS_FOLDER / name


def _no_variant(store_folder: Path, name: str) -> VariantError:
    names = list_variants(store_folder)
    there = f"It has: {', '.join(names)}" if names else "It has none"
    return VariantError(
        f"The store {store_folder} has no variant named {name}. {there}; `moestro variants add` makes one of a "
        "fine-tune."
    )


def _misfit(store: Store, manifest: VariantManifest) -> str | None:
    """What of a variant does not have the shapes of the store, or None."""
    if len(manifest.layers) != len(store.layers):
        return f"it has {len(manifest.layers)} layers of experts, the store {len(store.layers)}"
    for layer, delta in zip(store.layers, manifest.layers, strict=True):
        shapes = {one.name: one.shape for one in layer.layout.planes[0].tensors}
        up = shapes.get("gate_up_proj") or shapes.get("up_proj")
        for shape, region in zip((up, shapes.get("down_proj")), (delta.up, delta.down) if delta else (), strict=False):
            if region is not None and (region.rows, region.columns) != shape:
                return f"its experts in MoE layer {layer.layer} have matrices of {region.rows} x {region.columns}"
    for plane in manifest.planes:
        if plane.expert >= store.layers[plane.layer].num_experts:
            return f"it has an expert {plane.expert} in MoE layer {plane.layer}"
    shaped: dict[str, tuple[int, ...]] = {
        name: (delta.region.rows, delta.region.columns) for name, delta in manifest.deltas.items()
    }
    shaped |= {name: tensor.shape for name, tensor in manifest.replacements.items()}
    for name, wanted in shaped.items():
        if name not in store.dense or store.dense[name].shape != wanted:
            return f"its tensor {name} has shape {list(wanted)}, which the store's has not"
    return None


def _check_file(path: Path, entry: FileEntry) -> None:
    try:
        nbytes = path.stat().st_size
    except FileNotFoundError:
        raise VariantError(f"{path} is missing. Remove the variant and add it again.") from None
    except OSError as error:
        raise VariantError(f"{path} cannot be read ({error.strerror}). Check the disk and the permissions.") from error
    if nbytes != entry.nbytes:
        word = "truncated" if nbytes < entry.nbytes else "too long"
        raise VariantError(
            f"{path} is {word}: it has {nbytes} bytes, expected {entry.nbytes}. Remove the variant and add it again."
        )


def _problem(label: str, file: Path, offset: int, nbytes: int, wanted: int) -> str | None:
    place = f"{label} ({nbytes} bytes at offset {offset} of {file})"
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            actual = checksum_range(descriptor, offset, nbytes)
        finally:
            os.close(descriptor)
    except (OSError, EOFError) as error:
        return f"{place} cannot be read: {error}"
    return None if actual == wanted else f"{place} is damaged: its checksum is {to_hex(actual)}, not {to_hex(wanted)}"
