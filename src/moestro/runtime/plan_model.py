"""Plans for a model named by the user: a store, or a checkpoint of which only config and index have to be there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from moestro.config import RuntimeOptions
from moestro.hf.skeleton import Skeleton, build_skeleton, config_from_dict, load_config
from moestro.memory.budget import parse_memory, resident_bytes
from moestro.runtime.open import shape_of_store
from moestro.runtime.plan import ModelShape, Plan, make_plan, probe_for, resolve_context
from moestro.store.casting import dense_dtype, fp32_names, parse_dtype
from moestro.store.dense_file import DenseSpec, dense_layout
from moestro.store.dtypes import dtype_name
from moestro.store.layout import raw_layout
from moestro.store.locate import is_store, locate_source
from moestro.store.reader import Store


def plan_model(model: str, options: RuntimeOptions, *, dtype: str | None = None) -> Plan:
    """What would be placed where if `model` were opened with `options` (and packed as `dtype`, if it is no store).

    Raises:
        MoestroError: the model cannot be found or run, or the memory cannot be parsed. A plan that does not fit is
            returned, with `fits` false.
    """
    request = parse_memory(options.memory)
    path = Path(model)
    if is_store(path):
        store = Store.open(path)
        skeleton = build_skeleton(config_from_dict(store.config_dict))
        shape = shape_of_store(store)
    else:
        folder = locate_source(model, weights=False)
        config = load_config(folder)
        target = parse_dtype(dtype) if dtype else stored_dtype(config)
        skeleton = build_skeleton(config)
        shape = replace(shape_of_skeleton(skeleton, target), name=str(model))
    probed = probe_for(skeleton, options)
    floor = resident_bytes()
    return make_plan(
        shape,
        probed,
        options,
        context=resolve_context(skeleton.config, options.context),
        memory_bytes=request.resolve(floor),
        floor_bytes=floor,
    )


def stored_dtype(config: PreTrainedConfig) -> str:
    """The type in which packing stores a checkpoint's matrices when nothing else is asked for."""
    if getattr(config, "quantization_config", None) is not None:
        return "BF16"
    named = config.dtype
    dtype = getattr(torch, named) if isinstance(named, str) else named
    return dtype_name(dtype) if dtype in (torch.bfloat16, torch.float16) else "F32"


def shape_of_skeleton(skeleton: Skeleton, dtype: str) -> ModelShape:
    """The sizes that a store of this model would have, matrices stored as `dtype`."""
    exact = fp32_names(skeleton, dtype)
    specs = [
        DenseSpec(name, dense_dtype(shape, _source(built, dtype), dtype, forced=False, keep_fp32=name in exact), shape)
        for name, (shape, built) in skeleton.dense.items()
    ]
    layouts = [raw_layout(layer.params, dtype) for layer in skeleton.expert_layers]
    return ModelShape(
        name=skeleton.config.model_type,
        dense_bytes=dense_layout(specs).nbytes,
        slot_bytes=tuple(layout.nbytes for layout in layouts),
        experts=tuple(layer.num_experts for layer in skeleton.expert_layers),
    )


def _source(built: torch.dtype, dtype: str) -> str:
    return dtype if built.is_floating_point else dtype_name(built)
