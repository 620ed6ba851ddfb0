"""transformers models with the very weights that a quantised store stands for."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moestro.hf.skeleton import build_skeleton, config_from_dict
from moestro.quant import make_encoding
from moestro.quant.flat import flat_decode
from moestro.store.dense_file import FLAT_BITS
from moestro.store.dtypes import TORCH_DTYPES
from moestro.store.reader import Store


def decoded_model(store: Store, level: int) -> PreTrainedModel:
    """The store's model in fp32, all weights decoded at `level` by the format's rules."""
    config = config_from_dict(store.config_dict)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    state = model.state_dict()
    dense = store.dense_file.read_bytes()
    with torch.no_grad():
        for name, tensor in store.dense.items():
            region = torch.frombuffer(
                bytearray(dense[tensor.offset : tensor.offset + tensor.nbytes]), dtype=torch.uint8
            )
            if tensor.dtype in FLAT_BITS:
                values = flat_decode(region, *tensor.shape, FLAT_BITS[tensor.dtype])
            else:
                values = region.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
            state[name].copy_(values)
        for layer in build_skeleton(config).expert_layers:
            for expert in range(layer.num_experts):
                decoded = decoded_expert(store, layer.layer, expert, level)
                for param in layer.params:
                    values = decoded[param.name].t() if param.transposed else decoded[param.name]
                    state[f"{layer.module}.{param.name}"][expert].copy_(values)
    return model


def decoded_expert(store: Store, layer: int, expert: int, level: int) -> dict[str, torch.Tensor]:
    """An expert's parameters in canonical layout at a level."""
    planes = []
    for plane, layout in enumerate(store.layers[layer].layout.planes):
        if layout.level <= level:
            extent = store.plane((layer, expert, plane))
            with extent.file.open("rb") as file:
                file.seek(extent.offset)
                planes.append((layout, torch.frombuffer(bytearray(file.read(extent.nbytes)), dtype=torch.uint8)))
    values = {}
    for tensor in planes[0][0].tensors:
        regions = [
            content[one.offset : one.offset + one.nbytes]
            for layout, content in planes
            for one in layout.tensors
            if one.name == tensor.name
        ]
        if tensor.dtype == "F32":
            values[tensor.name] = regions[0].view(torch.float32).view(tensor.shape)
        else:
            values[tensor.name] = make_encoding(tensor.dtype).decode(regions, *tensor.shape, level)
    return values
