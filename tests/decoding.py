"""transformers models with the very weights that a quantised store stands for."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moestro.hf.skeleton import build_skeleton, config_from_dict
from moestro.quant.flat import flat_decode
from moestro.store.dense_file import FLAT_BITS
from moestro.store.dtypes import TORCH_DTYPES
from moestro.store.reader import Store
from store.reading import read_level


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
                decoded = read_level(store, layer.layer, expert, level)
                for param in layer.params:
                    values = decoded[param.name].t() if param.transposed else decoded[param.name]
                    state[f"{layer.module}.{param.name}"][expert].copy_(values)
    return model
