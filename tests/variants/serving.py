"""The model that a variant's files stand for, in transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moestro.quant.delta_codes import delta_decode, unpack_delta
from moestro.store.reader import Store
from moestro.store.variant_file import StoredVariant


@torch.inference_mode()
def logits(checkpoint: Path, state: dict[str, torch.Tensor] | None, ids_BT: torch.Tensor) -> torch.Tensor:
    """Of the model in `checkpoint`, with other values in it if there is a `state`."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if state is not None:
        model.load_state_dict(state)
        model.tie_weights()
    found: torch.Tensor = model(ids_BT).logits
    return found


def served(base: Path, variant: StoredVariant, store: Store) -> dict[str, torch.Tensor]:
    """The base's state with everything that the variant's files say added to it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = load_file(variant.dense_file)
    for name, delta in variant.dense_deltas.items():
        packed = dense[f"{name}.delta"]
        state[name] += delta_decode(packed, delta.region)
        bias = unpack_delta(packed, delta.region).bias_N
        if bias is not None:
            state[f"{name.removesuffix('weight')}bias"] += bias
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for name in variant.replacements:
        state[name] = dense[name].float()
    planes = variant.planes_file.read_bytes()
    transposed = bool(getattr(model.get_submodule(store.layers[0].module), "is_transposed", False))
    for layer in store.layers:
        up, down, up_at, down_at, _ = variant.expert_spec(layer.layer)
        for expert in range(layer.num_experts):
            extent = variant.plane(layer.layer, expert)
            if extent is None:
                continue
            data = planes[extent.offset : extent.offset + extent.nbytes]
            for name, region, at in (("gate_up_proj", up, up_at), ("down_proj", down, down_at)):
                if region is None:
                    continue
                packed = torch.frombuffer(bytearray(data[at : at + region.nbytes]), dtype=torch.uint8)
                delta = delta_decode(packed, region)
                state[f"{layer.module}.{name}"][expert] += delta.T if transposed else delta
                bias = unpack_delta(packed, region).bias_N
                if bias is not None:
                    state[f"{layer.module}.{name}_bias"][expert] += bias
    return state
