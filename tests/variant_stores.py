"""Tiny stores with variants, and transformers models with the very weights that a variant stands for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from decoding import decoded_model
from fine_tunes import fine_tune
from moestro.config import PackOptions, VariantOptions
from moestro.hf.skeleton import build_skeleton, config_from_dict
from moestro.quant.delta_codes import delta_decode, unpack_delta
from moestro.quant.low_rank import LowRankRegion, Region, low_rank_decode
from moestro.store.dtypes import TORCH_DTYPES
from moestro.store.pack import pack
from moestro.store.reader import Store
from moestro.store.variant_file import StoredVariant, open_variant
from moestro.variants.add import add_variant
from packing import pack_raw

NESTED = PackOptions(calibration=False)


@dataclass(frozen=True)
class Family:
    """A store, and the checkpoints that it is made of; variants can be added."""

    store: Path
    checkpoint: Path

    def add(self, name: str, *, seed: int, bits: int = 2, size: float = 0.4, method: str = "me-switch") -> None:
        """A variant of a fine-tune of its own."""
        tuned = self.store.parent / f"{name}-{seed}"
        fine_tune(self.checkpoint, tuned, size=size, seed=seed)
        options = VariantOptions(method=method, bits=bits, salient=0.05, calibration=False)
        add_variant(Store.open(self.store), name, str(tuned), base=str(self.checkpoint), options=options)


def pack_family(checkpoint: Path, store: Path, *, raw: bool) -> Family:
    """That of a checkpoint."""
    if raw:
        pack_raw(checkpoint, store)
    else:
        pack(checkpoint, store, options=NESTED)
    return Family(store, checkpoint)


def variant_model(store: Store, name: str, level: int) -> PreTrainedModel:
    """The store's model in fp32 with what a variant adds, everything decoded by the format's rules."""
    model = decoded_model(store, level)
    variant, state = open_variant(store, name), model.state_dict()
    dense = variant.dense_file.read_bytes()
    with torch.no_grad():
        for one, delta in variant.dense_deltas.items():
            raw = dense[delta.offset : delta.offset + delta.nbytes]
            delta_NK, bias_N = _decoded(raw, delta.region)
            state[one] += delta_NK
            if bias_N is not None:
                state[f"{one.removesuffix('weight')}bias"] += bias_N
        for one, tensor in variant.replacements.items():
            values = torch.frombuffer(
                bytearray(dense[tensor.offset : tensor.offset + tensor.nbytes]), dtype=TORCH_DTYPES[tensor.dtype]
            )
            state[one].copy_(values.view(tensor.shape))
        _add_experts(store, variant, state)
    return model


def _add_experts(store: Store, variant: StoredVariant, state: dict[str, torch.Tensor]) -> None:
    for layer in build_skeleton(config_from_dict(store.config_dict)).expert_layers:
        spec, params = variant.expert_spec(layer.layer), {param.name: param for param in layer.params}
        up = "gate_up_proj" if "gate_up_proj" in params else "up_proj"
        for expert in range(layer.num_experts):
            extent = variant.plane(layer.layer, expert)
            if extent is None:
                continue
            plane = extent.file.read_bytes()[extent.offset : extent.offset + extent.nbytes]
            for matrix, region, start in ((up, spec.up, spec.up_at), ("down_proj", spec.down, spec.down_at)):
                if region is None:
                    continue
                delta_NK, bias_N = _decoded(plane[start : start + region.nbytes], region)
                state[f"{layer.module}.{matrix}"][expert] += delta_NK.t() if params[matrix].transposed else delta_NK
                if bias_N is not None:
                    state[f"{layer.module}.{matrix}_bias"][expert] += bias_N


def _decoded(raw: bytes, region: Region) -> tuple[torch.Tensor, torch.Tensor | None]:
    packed = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    if isinstance(region, LowRankRegion):
        bias = packed[region.bias_at : region.bias_at + 4 * region.rows].view(torch.float32) if region.bias else None
        return low_rank_decode(packed, region), bias
    return delta_decode(packed, region), unpack_delta(packed, region).bias_N
