"""Opening a store: what is inside and where, with cheap checks. `verify` reads every byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from moestro.errors import StoreError
from moestro.keys import PlaneExtent, PlaneKey
from moestro.store.layout import Layout
from moestro.store.manifest import MANIFEST_NAME, DenseTensor, FileEntry, Manifest, has_manifest, read_manifest
from moestro.store.verify import VerifyProgress, find_problems

__all__ = ["DenseTensor", "Store", "StoreLayer"]

PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True)
class StoreLayer:
    """The routed experts of one layer. `layer` counts MoE layers only; `module` is the experts module's full name."""

    layer: int
    module: str
    num_experts: int
    layout: Layout


@dataclass(frozen=True)
class Store:
    """A whole store on disk. Open it with `Store.open`."""

    path: Path
    manifest: Manifest
    layers: tuple[StoreLayer, ...]
    _first_plane: tuple[int, ...] = field(repr=False)
    _plane_files: tuple[Path, ...] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open the store in folder `path`: check its manifest and that all files are there and of the right length.

        Raises:
            StoreError: missing, incomplete, damaged, or of another format version.
        """
        if not has_manifest(path) or path.name.endswith(PARTIAL_SUFFIX):
            raise StoreError(_why_no_store(path))
        manifest = read_manifest(path)
        for entry in (*manifest.plane_files, manifest.dense_file, *manifest.assets):
            _check_file(path / entry.name, entry)
        layers = tuple(
            StoreLayer(index, entry.module, entry.experts, manifest.layout_of(entry))
            for index, entry in enumerate(manifest.layers)
        )
        counts = (layer.num_experts * len(layer.layout.planes) for layer in layers)
        files = tuple(path / entry.name for entry in manifest.plane_files)
        return cls(path, manifest, layers, tuple(accumulate(counts, initial=0)), files)

    @property
    def config_dict(self) -> dict[str, Any]:
        """The model's config.json."""
        return self.manifest.model

    @property
    def dense(self) -> dict[str, DenseTensor]:
        """The tensors that are not experts, by their names in the model; places are in `dense_file`."""
        return self.manifest.dense

    @property
    def dense_file(self) -> Path:
        """A safetensors file."""
        return self.path / self.manifest.dense_file.name

    @property
    def dense_bytes(self) -> int:
        """Bytes of all dense tensors, without padding."""
        return sum(tensor.nbytes for tensor in self.dense.values())

    @property
    def expert_bytes(self) -> int:
        """Bytes of all planes, with padding."""
        return sum(entry.nbytes for entry in self.manifest.plane_files)

    def plane(self, key: PlaneKey) -> PlaneExtent:
        """Where the plane lies on disk."""
        layer, expert, plane = key
        planes = self.layers[layer].layout.planes
        assert 0 <= expert < self.layers[layer].num_experts, key
        assert 0 <= plane < len(planes), key
        entry = self.manifest.planes[self._first_plane[layer] + expert * len(planes) + plane]
        return PlaneExtent(self._plane_files[entry.file], entry.offset, planes[plane].nbytes, entry.checksum)

    def verify(self, progress: Callable[[VerifyProgress], None] | None = None) -> list[str]:
        """Read everything and compare checksums. Returns one line per problem: what is bad, which file, which byte."""
        planes = {
            (layer.layer, expert, plane): self.plane((layer.layer, expert, plane))
            for layer in self.layers
            for expert in range(layer.num_experts)
            for plane in range(len(layer.layout.planes))
        }
        return find_problems(self.path, self.manifest, planes, progress)


def _why_no_store(path: Path) -> str:
    if path.name.endswith(PARTIAL_SUFFIX):
        return (
            f"{path} is an unfinished store. Run the same `moestro pack` command again: it continues where it stopped."
        )
    unfinished = path.with_name(path.name + PARTIAL_SUFFIX)
    if unfinished.is_dir():
        return (
            f"The store {path} is not finished: {unfinished.name} lies beside it. "
            "Run the same `moestro pack` command again: it continues where it stopped."
        )
    if not path.exists():
        return f"There is no store at {path}. Make one with `moestro pack MODEL {path}`."
    return f"{path} is not a store: it has no {MANIFEST_NAME}. Give the folder that `moestro pack` wrote."


def _check_file(path: Path, entry: FileEntry) -> None:
    try:
        nbytes = path.stat().st_size
    except FileNotFoundError:
        raise StoreError(f"{path} is missing from the store. Copy it again, or pack the model again.") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}). Check the disk and the permissions.") from error
    if nbytes != entry.nbytes:
        word = "truncated" if nbytes < entry.nbytes else "too long"
        raise StoreError(
            f"{path} is {word}: it has {nbytes} bytes, expected {entry.nbytes}. Copy it again, or pack the model again."
        )
