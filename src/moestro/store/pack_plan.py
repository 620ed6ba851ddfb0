"""What a pack will write and where, decided before a byte of the weights is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.hf.skeleton import Skeleton
from moestro.store.casting import common_dtype, dense_dtype, fp32_names, parse_dtype
from moestro.store.checkpoint import Checkpoint
from moestro.store.checksum import checksum, to_hex
from moestro.store.dense_file import DenseLayout, DenseSpec, dense_layout
from moestro.store.fingerprint import fingerprint
from moestro.store.key_plan import DenseSource, ExpertSource, KeyPlan, plan_keys
from moestro.store.layout import Layout, raw_layout
from moestro.store.manifest import FORMAT, VERSION, FileEntry, LayerEntry, Source

DENSE_NAME = "dense.safetensors"
PLANE_FILE_BYTES = 64 << 30
"""Largest plane file; more planes go into further files."""


@dataclass(frozen=True)
class PlaneJob:
    """One plane to write at `offset` of plane file `file`: expert `expert`, from `sources` (one per parameter)."""

    sources: tuple[ExpertSource, ...]
    layout: Layout
    expert: int
    file: int
    offset: int


@dataclass(frozen=True)
class PackPlan:
    """All that a manifest will say except the checksums. A store's units are its dense tensors, then its planes."""

    skeleton: Skeleton
    source: Source
    model: dict[str, Any]
    dtype: str
    layouts: tuple[Layout, ...]
    layers: tuple[LayerEntry, ...]
    plane_files: tuple[FileEntry, ...]
    planes: tuple[PlaneJob, ...]
    dense: DenseLayout
    dense_sources: tuple[DenseSource, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all units."""
        return sum(self.unit_bytes(unit) for unit in range(self.units))

    @property
    def file_bytes(self) -> int:
        """Bytes of the large files."""
        return self.dense.nbytes + sum(entry.nbytes for entry in self.plane_files)

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.dense_sources) + len(self.planes)

    def unit_bytes(self, unit: int) -> int:
        """Bytes of one unit."""
        dense = len(self.dense_sources)
        return self.dense.places[unit].nbytes if unit < dense else self.planes[unit - dense].layout.nbytes

    def identity(self) -> dict[str, Any]:
        """What must be the same for an unfinished pack to be continued."""
        shape = repr((self.dense.head, self.layouts, self.layers, self.plane_files)).encode()
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.source.fingerprint,
            "dtype": self.dtype,
            "layout": to_hex(checksum(shape)),
        }


def plan_pack(
    checkpoint: Checkpoint, skeleton: Skeleton, dtype: str | None, *, plane_file_bytes: int = PLANE_FILE_BYTES
) -> PackPlan:
    """Plan a pack. `dtype` as in `--dtype` (None: the checkpoint's own type; bf16 where it is quantised).

    Raises:
        CheckpointError, UnsupportedModelError: the checkpoint does not hold this model, or not in a form we can pack.
    """
    keys = plan_keys(skeleton, checkpoint.tensors)
    target = parse_dtype(dtype) if dtype is not None else _experts_dtype(checkpoint, keys)
    layouts = [raw_layout(layer.params, target) for layer in skeleton.expert_layers]
    distinct = tuple(dict.fromkeys(layouts))
    planes, plane_files = _place_planes(keys.experts, layouts, plane_file_bytes)
    kept = fp32_names(skeleton, target)
    specs = [_dense_spec(source, target, forced=dtype is not None, kept=source.name in kept) for source in keys.dense]
    return PackPlan(
        skeleton=skeleton,
        source=Source(fingerprint(checkpoint), checkpoint.quantisation, tuple(_collapsed(keys.ignored))),
        model=checkpoint.config,
        dtype=target,
        layouts=distinct,
        layers=tuple(
            LayerEntry(layer.module, layer.num_experts, distinct.index(layout))
            for layer, layout in zip(skeleton.expert_layers, layouts, strict=True)
        ),
        plane_files=plane_files,
        planes=planes,
        dense=dense_layout(specs),
        dense_sources=keys.dense,
    )


def planned_dense_bytes(skeleton: Skeleton, dtype: str) -> int:
    """Size of `dense.safetensors` for a model whose checkpoint is of the stored type `dtype` throughout."""
    kept = fp32_names(skeleton, dtype)
    specs = []
    for name, (shape, wanted) in skeleton.dense.items():
        source = dtype if wanted.is_floating_point else "I64"
        stored = dense_dtype(shape, source, dtype, forced=True, keep_fp32=name in kept)
        specs.append(DenseSpec(name, stored, shape))
    return dense_layout(specs).nbytes


def _experts_dtype(checkpoint: Checkpoint, keys: KeyPlan) -> str:
    return common_dtype(
        checkpoint.tensors[key].dtype
        for layer in keys.experts
        for source in layer
        for group in ((source.groups[0],) if source.stacked else source.groups)
        for _, key in group.members
    )


def _dense_spec(source: DenseSource, target: str, *, forced: bool, kept: bool) -> DenseSpec:
    stored = dense_dtype(source.shape, source.dtype, target, forced=forced, keep_fp32=kept)
    return DenseSpec(source.name, stored, source.shape)


def _place_planes(
    experts: Sequence[tuple[ExpertSource, ...]], layouts: Sequence[Layout], file_bytes: int
) -> tuple[tuple[PlaneJob, ...], tuple[FileEntry, ...]]:
    jobs = []
    sizes = [0]
    for sources, layout in zip(experts, layouts, strict=True):
        for expert in range(sources[0].layer.num_experts):
            if sizes[-1] and sizes[-1] + layout.nbytes > file_bytes:
                sizes.append(0)
            jobs.append(PlaneJob(sources, layout, expert, len(sizes) - 1, sizes[-1]))
            sizes[-1] += layout.nbytes
    names = ["experts.planes"] if len(sizes) == 1 else [f"experts-{i:05d}.planes" for i in range(len(sizes))]
    return tuple(jobs), tuple(FileEntry(name, size, None) for name, size in zip(names, sizes, strict=True))


def _collapsed(keys: Sequence[str]) -> Iterator[str]:
    """Each ignored key once, with `*` for the number of an expert."""
    return iter(dict.fromkeys(re.sub(r"(?<=experts\.)\d+(?=\.)", "*", key) for key in keys))
