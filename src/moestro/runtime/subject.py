"""What `inspect` and `plan` look at: a store, or a checkpoint of which only the shapes are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moestro.config import RuntimeOptions
from moestro.foresight.train import nets_bytes
from moestro.hf.linears import lookup_names
from moestro.hf.skeleton import Skeleton, build_skeleton, config_from_dict, load_config
from moestro.kernels import make_kernels
from moestro.policy.observation import Shape
from moestro.runtime.expert_spec import is_raw
from moestro.runtime.level import cut, resolve_level
from moestro.runtime.model_shape import ModelShape, Sizes
from moestro.runtime.open import measure_floor
from moestro.runtime.plan import Plan, compute_threads, make_plan, probe_for
from moestro.runtime.probe import probe
from moestro.store.dtypes import config_dtype, tensor_bytes
from moestro.store.layout import Layout
from moestro.store.locate import AUTOMATIC, locate_shapes
from moestro.store.manifest import has_manifest
from moestro.store.pack_plan import expert_layouts, planned_dense_bytes
from moestro.store.reader import Store
from moestro.store.variant_file import any_low_rank


@dataclass(frozen=True)
class Subject:
    """A model's shapes. `store` is None for a checkpoint; sizes are then those that its store would have.

    `layouts` are those of whole chains, `levels` the ones that can be asked for, `exact_level` the default among them.
    """

    path: Path
    store: Store | None
    skeleton: Skeleton
    layouts: tuple[Layout, ...]
    levels: tuple[int, ...]
    exact_level: int
    sizes: Sizes
    dense_bits: int

    @classmethod
    def open(cls, model: str) -> Subject:
        """Look at a store, a checkpoint folder, a hub id or the built-in model. Raises MoestroError."""
        path = locate_shapes(model)
        return cls.of_store(Store.open(path)) if has_manifest(path) else cls._of_checkpoint(path)

    def shape(self, level: int = 0) -> ModelShape:
        """The sizes at a level (0: the exact one). Raises RequestError when the model does not have it."""
        chosen = resolve_level(level, exact=self.exact_level, promised=self.levels, name=str(self.path))
        return ModelShape.of(
            self.skeleton,
            name=self.path.name,
            sizes=self.sizes,
            layouts=[cut(layout, chosen) for layout in self.layouts],
            level=chosen,
        )

    def bits_per_weight(self, level: int) -> float:
        """Bits that a weight of an expert takes on disk at a level, scales, biases and padding included."""
        weights = sum(
            layer.num_experts * sum(math.prod(param.shape) for param in layer.params)
            for layer in self.skeleton.expert_layers
        )
        return 8 * self.shape(level).expert_bytes / weights

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The element types of the experts' tensors."""
        return tuple(sorted({t.dtype for layout in self.layouts for plane in layout.planes for t in plane.tensors}))

    @property
    def encoding(self) -> str:
        """How the experts' bits are stored."""
        return AUTOMATIC.encoding if self.store is None else self.store.manifest.encoding

    @property
    def experts_per_token(self) -> tuple[int, ...]:
        """How many experts each MoE layer runs for a token."""
        return _experts_per_token(self.skeleton)

    def files(self) -> Iterator[tuple[str, int]]:
        """The names and sizes of the files in the folder."""
        for path in sorted(self.path.iterdir()):
            if path.is_file():
                yield path.name, path.stat().st_size

    def plan(self, options: RuntimeOptions, *, logit_rows: int = 0) -> Plan:
        """What would be placed where; `logit_rows` as for `open_model`.

        Raises:
            BudgetError: the memory cannot be parsed. A plan that does not fit is returned, with `fits` false.
            RequestError: the model does not have the level asked for.
        """
        shape = self.shape(options.level)
        packed = not any(is_raw(layout) for layout in self.layouts)
        native = self.store is None or not any_low_rank(self.store)
        probed = probe_for(self.skeleton, options, packed=packed, native=native, logit_rows=logit_rows)
        floor = measure_floor(make_kernels("auto", threads=compute_threads(options)))
        return make_plan(shape, probed, options, config=self.skeleton.config, floor_bytes=floor)

    @classmethod
    def of_store(cls, store: Store) -> Subject:
        """An open store."""
        skeleton = build_skeleton(config_from_dict(store.config_dict))
        layouts = tuple(layer.layout for layer in store.layers)
        return cls(
            path=store.path,
            store=store,
            skeleton=skeleton,
            layouts=layouts,
            levels=store.manifest.levels,
            exact_level=store.manifest.exact_level,
            sizes=Sizes.of_store(store, skeleton),
            dense_bits=store.manifest.dense_bits,
        )

    @classmethod
    def _of_checkpoint(cls, folder: Path) -> Subject:
        config = load_config(folder)
        dtype = config_dtype(config)
        skeleton = build_skeleton(config)
        layouts = expert_layouts(skeleton, dtype, AUTOMATIC)
        levels = AUTOMATIC.promised_levels or tuple(sorted({layout.planes[-1].level for layout in layouts}))
        return cls(
            path=folder,
            store=None,
            skeleton=skeleton,
            layouts=layouts,
            levels=levels,
            exact_level=levels[-1] if AUTOMATIC.is_raw else AUTOMATIC.exact_level,
            sizes=Sizes(
                dense_bytes=planned_dense_bytes(skeleton, dtype, AUTOMATIC),
                lookup_bytes=sum(tensor_bytes(dtype, skeleton.dense[name][0]) for name in lookup_names(skeleton)),
                nets_bytes=_planned_nets_bytes(skeleton) if AUTOMATIC.calibration else 0,
            ),
            dense_bits=16 if AUTOMATIC.is_raw else AUTOMATIC.dense_bits,
        )


def _experts_per_token(skeleton: Skeleton) -> tuple[int, ...]:
    return probe(skeleton, rows=2, history=2, logit_rows=1).experts_per_token


def _planned_nets_bytes(skeleton: Skeleton) -> int:
    """Of the predictor that packing trains, if it turns out to be worth its bytes."""
    layers = skeleton.expert_layers
    return nets_bytes(Shape(len(layers), max(one.num_experts for one in layers), max(_experts_per_token(skeleton))))
