"""What `inspect` and `plan` look at: a store, or a checkpoint of which only the shapes are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from moestro.config import RuntimeOptions
from moestro.hf.skeleton import Skeleton, build_skeleton, config_from_dict, load_config
from moestro.kernels import make_kernels
from moestro.runtime.open import measure_floor, shape_of_store
from moestro.runtime.plan import ModelShape, Plan, compute_threads, make_plan, probe_for
from moestro.runtime.probe import probe
from moestro.store.dtypes import STORED_FLOATS, dtype_name
from moestro.store.layout import Layout
from moestro.store.locate import AUTOMATIC, locate_shapes
from moestro.store.manifest import has_manifest
from moestro.store.pack_plan import expert_layouts, planned_dense_bytes
from moestro.store.reader import Store


@dataclass(frozen=True)
class Subject:
    """A model's shapes. `store` is None for a checkpoint; sizes are then those that its store would have."""

    path: Path
    store: Store | None
    skeleton: Skeleton
    layouts: tuple[Layout, ...]
    shape: ModelShape

    @classmethod
    def open(cls, model: str) -> Subject:
        """Look at a store, a checkpoint folder, a hub id or the built-in model. Raises MoestroError."""
        path = locate_shapes(model)
        return cls.of_store(Store.open(path)) if has_manifest(path) else cls._of_checkpoint(path)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The element types of the experts' tensors."""
        return tuple(sorted({t.dtype for layout in self.layouts for plane in layout.planes for t in plane.tensors}))

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that experts can be computed at."""
        return tuple(sorted({plane.level for layout in self.layouts for plane in layout.planes}))

    @property
    def experts_per_token(self) -> tuple[int, ...]:
        """How many experts each MoE layer runs for a token."""
        return probe(self.skeleton, rows=2, history=2, logit_rows=1).experts_per_token

    def files(self) -> Iterator[tuple[str, int]]:
        """The names and sizes of the files in the folder."""
        for path in sorted(self.path.iterdir()):
            if path.is_file():
                yield path.name, path.stat().st_size

    def plan(self, options: RuntimeOptions, *, logit_rows: int = 0) -> Plan:
        """What would be placed where; `logit_rows` as for `open_model`.

        Raises BudgetError for a memory that cannot be parsed, not for too little.
        """
        probed = probe_for(self.skeleton, options, logit_rows=logit_rows)
        floor = measure_floor(make_kernels("auto", threads=compute_threads(options)))
        return make_plan(self.shape, probed, options, config=self.skeleton.config, floor_bytes=floor)

    @classmethod
    def of_store(cls, store: Store) -> Subject:
        """An open store."""
        skeleton = build_skeleton(config_from_dict(store.config_dict))
        layouts = tuple(layer.layout for layer in store.layers)
        return cls(store.path, store, skeleton, layouts, shape_of_store(store))

    @classmethod
    def _of_checkpoint(cls, folder: Path) -> Subject:
        config = load_config(folder)
        dtype = _checkpoint_dtype(config)
        skeleton = build_skeleton(config)
        layouts = expert_layouts(skeleton, dtype, AUTOMATIC)
        shape = ModelShape(
            name=folder.name,
            dense_bytes=planned_dense_bytes(skeleton, dtype, AUTOMATIC),
            slot_bytes=tuple(layout.nbytes for layout in layouts),
            experts=tuple(layer.num_experts for layer in skeleton.expert_layers),
        )
        return cls(folder, None, skeleton, layouts, shape)


def _checkpoint_dtype(config: PreTrainedConfig) -> str:
    """The type that packing would store: the checkpoint's own, BF16 where it says nothing or is quantised."""
    dtype = getattr(config, "dtype", None)
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else "BF16"
    return name if name in STORED_FLOATS else "BF16"
