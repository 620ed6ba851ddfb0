"""What a pack will write and where, decided before a byte of the weights is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.config import RAW, PackOptions
from moestro.hf.linears import head_names, linear_names
from moestro.hf.skeleton import Skeleton
from moestro.store.calibration_facts import CalibrationText
from moestro.store.casting import common_dtype, dense_dtype, fp32_names, parse_dtype
from moestro.store.checkpoint import Checkpoint
from moestro.store.checksum import checksum, to_hex
from moestro.store.dense_file import FLAT_BITS, DenseLayout, DenseSpec, dense_layout
from moestro.store.dtypes import is_float
from moestro.store.fingerprint import fingerprint
from moestro.store.key_plan import DenseSource, ExpertSource, KeyPlan, plan_keys
from moestro.store.layout import Layout, quantised_layout, raw_layout
from moestro.store.manifest import FORMAT, VERSION, FileEntry, LayerEntry, Source
from moestro.store.recipe import Recipe

DENSE_NAME = "dense.safetensors"
PLANE_FILE_BYTES = 64 << 30
"""Largest plane file; more planes go into further files."""


@dataclass(frozen=True)
class ExpertJob:
    """One expert to write at `offset` of plane file `file`: its chain of planes, made from one source per parameter."""

    sources: tuple[ExpertSource, ...]
    layout: Layout
    expert: int
    file: int
    offset: int

    @property
    def layer(self) -> int:
        """The MoE layer."""
        return self.sources[0].layer.layer


@dataclass(frozen=True)
class PackPlan:
    """All that a manifest will say except checksums and errors.

    A store's units are its dense tensors, then its experts. `text` is what the pack is calibrated on (None: nothing).
    """

    skeleton: Skeleton
    source: Source
    model: dict[str, Any]
    options: PackOptions
    text: CalibrationText | None
    dtype: str
    layouts: tuple[Layout, ...]
    layers: tuple[LayerEntry, ...]
    plane_files: tuple[FileEntry, ...]
    experts: tuple[ExpertJob, ...]
    dense: DenseLayout
    dense_sources: tuple[DenseSource, ...]
    raw_dense_dtypes: tuple[str, ...]

    def expert_of(self, unit: int) -> ExpertJob:
        """The expert that a unit after the dense ones is."""
        return self.experts[unit - len(self.dense_sources)]

    def expert_unit(self, layer: int, expert: int) -> int:
        """The number of an expert's unit."""
        before = sum(entry.experts for entry in self.layers[:layer])
        return len(self.dense_sources) + before + expert

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that the store promises."""
        found = {plane.level for layout in self.layouts for plane in layout.planes}
        return self.options.promised_levels or tuple(sorted(found))

    @property
    def recipe(self) -> Recipe:
        """What the store is, as its manifest will say it."""
        options = self.options
        return Recipe(
            fingerprint=self.source.fingerprint,
            dtype=self.dtype,
            encoding=RAW if options.is_raw else options.encoding,
            levels=self.levels,
            exact_level=self.levels[-1] if options.is_raw else options.exact_level,
            dense_bits=_dense_bits(options),
            text=self.text.checksum if self.text else None,
        )

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
        return len(self.dense_sources) + len(self.experts)

    def unit_bytes(self, unit: int) -> int:
        """Bytes of one unit."""
        dense = len(self.dense_sources)
        return self.dense.places[unit].nbytes if unit < dense else self.experts[unit - dense].layout.nbytes

    def identity(self) -> dict[str, Any]:
        """What must be the same for an unfinished pack to be continued."""
        shape = repr((self.dense.head, self.layouts, self.layers, self.plane_files)).encode()
        return {
            "format": FORMAT,
            "version": VERSION,
            **self.recipe.body(),
            "layout": to_hex(checksum(shape)),
        }


def plan_pack(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    options: PackOptions,
    *,
    text: CalibrationText | None = None,
    plane_file_bytes: int = PLANE_FILE_BYTES,
) -> PackPlan:
    """Plan a pack. Unless `options` name a dtype it is the checkpoint's own (bf16 where that is quantised).

    Raises:
        CheckpointError, UnsupportedModelError: the checkpoint does not hold this model, or not in a form we can pack.
    """
    keys = plan_keys(skeleton, checkpoint.tensors)
    forced = bool(options.dtype)
    target = parse_dtype(options.dtype) if forced else _experts_dtype(checkpoint, keys)
    layouts = expert_layouts(skeleton, target, options)
    distinct = tuple(dict.fromkeys(layouts))
    experts, plane_files = _place_experts(keys.experts, layouts, plane_file_bytes)
    choice = _DenseChoice(skeleton, target, forced=forced, bits=_dense_bits(options))
    unquantised = _DenseChoice(skeleton, target, forced=forced, bits=16)
    return PackPlan(
        skeleton=skeleton,
        source=Source(fingerprint(checkpoint), checkpoint.quantisation, tuple(_collapsed(keys.ignored))),
        model=checkpoint.config,
        options=options,
        text=text,
        dtype=target,
        layouts=distinct,
        layers=tuple(
            LayerEntry(layer.module, layer.num_experts, distinct.index(layout))
            for layer, layout in zip(skeleton.expert_layers, layouts, strict=True)
        ),
        plane_files=plane_files,
        experts=experts,
        dense=dense_layout([choice.spec(source.name, source.shape, source.dtype) for source in keys.dense]),
        dense_sources=keys.dense,
        raw_dense_dtypes=tuple(unquantised.spec(s.name, s.shape, s.dtype).dtype for s in keys.dense),
    )


def expert_layouts(skeleton: Skeleton, dtype: str, options: PackOptions) -> tuple[Layout, ...]:
    """The layout of each layer's experts; `dtype` is what raw ones are stored in."""
    if options.is_raw:
        return tuple(raw_layout(layer.params, dtype) for layer in skeleton.expert_layers)
    levels = options.promised_levels
    return tuple(quantised_layout(layer.params, options.encoding, levels) for layer in skeleton.expert_layers)


def planned_dense_bytes(skeleton: Skeleton, dtype: str, options: PackOptions) -> int:
    """Size of `dense.safetensors` for a model whose checkpoint is of the stored type `dtype` throughout."""
    choice = _DenseChoice(skeleton, dtype, forced=True, bits=_dense_bits(options))
    return dense_layout(
        [
            choice.spec(name, shape, dtype if wanted.is_floating_point else "I64")
            for name, (shape, wanted) in skeleton.dense.items()
        ]
    ).nbytes


class _DenseChoice:
    """In what type each dense tensor is stored."""

    def __init__(self, skeleton: Skeleton, target: str, *, forced: bool, bits: int) -> None:
        self._target, self._forced = target, forced
        self._kept = fp32_names(skeleton, target)
        self._flat = {count: name for name, count in FLAT_BITS.items()}.get(bits)
        self._linears = linear_names(skeleton) - self._kept if self._flat else frozenset()
        # At 4 bits the head alone would lose more than all other linear maps and 4-bit experts together: divergence
        # .0094, calibrated .0052, beside .0031, measured on the built-in model; a tied embedding about as much again.
        self._fine = head_names(skeleton) if bits == 4 else frozenset()

    def spec(self, name: str, shape: tuple[int, ...], source: str) -> DenseSpec:
        """`source` is the type in the checkpoint."""
        if self._flat and name in self._linears and is_float(source):
            return DenseSpec(name, "flat8" if name in self._fine else self._flat, shape)
        kept = name in self._kept
        stored = dense_dtype(shape, source, self._target, forced=self._forced, keep_fp32=kept)
        return DenseSpec(name, stored, shape)


def _dense_bits(options: PackOptions) -> int:
    return 16 if options.is_raw else options.dense_bits


def _experts_dtype(checkpoint: Checkpoint, keys: KeyPlan) -> str:
    return common_dtype(
        checkpoint.tensors[key].dtype
        for layer in keys.experts
        for source in layer
        for group in ((source.groups[0],) if source.stacked else source.groups)
        for _, key in group.members
    )


def _place_experts(
    experts: Sequence[tuple[ExpertSource, ...]], layouts: Sequence[Layout], file_bytes: int
) -> tuple[tuple[ExpertJob, ...], tuple[FileEntry, ...]]:
    jobs = []
    sizes = [0]
    for sources, layout in zip(experts, layouts, strict=True):
        for expert in range(sources[0].layer.num_experts):
            if sizes[-1] and sizes[-1] + layout.nbytes > file_bytes:
                sizes.append(0)
            jobs.append(ExpertJob(sources, layout, expert, len(sizes) - 1, sizes[-1]))
            sizes[-1] += layout.nbytes
    names = ["experts.planes"] if len(sizes) == 1 else [f"experts-{i:05d}.planes" for i in range(len(sizes))]
    return tuple(jobs), tuple(FileEntry(name, size, None) for name, size in zip(names, sizes, strict=True))


def _collapsed(keys: Sequence[str]) -> Iterator[str]:
    """Each ignored key once, with `*` for the number of an expert."""
    return iter(dict.fromkeys(re.sub(r"(?<=experts\.)\d+(?=\.)", "*", key) for key in keys))
