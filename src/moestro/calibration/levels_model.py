"""A store's model with gradients, its experts at all levels at once: what a bit router is trained with.

All weights are fp32 in memory, those of experts once for each level, and no weight is trained. The dense part is
transformers' own; only the experts are computed here.

Shapes: B sequences, T rows of all of them, H hidden, K experts per row, E experts, D levels, leaving out and exact
among them, S = D - 1 levels of bits, R rows of an expert, G = 2I where gate and up are one matrix, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moestro.errors import PackError, StoreError
from moestro.hf.skeleton import build_skeleton, config_from_dict, is_experts_module
from moestro.kernels.base import Kernels
from moestro.memory.budget import format_bytes, machine_bytes
from moestro.memory.direct import FileReader
from moestro.memory.pages import HostBuffer
from moestro.runtime.dense import PackedMatrix, PackedWeight, put_tensors
from moestro.runtime.dense_file import read_dense
from moestro.runtime.expert_mlp import activate
from moestro.runtime.expert_spec import expert_matrices
from moestro.runtime.level import cut
from moestro.runtime.levels import depths, levels_up_to
from moestro.store.checksum import checksum
from moestro.store.layout import Layout
from moestro.store.reader import Store

Choose = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, hidden [T, H], experts [T, K], router weights [T, K]) to how much of each level is applied, [T, K, D]."""

_MOST_OF_MACHINE = 0.6


@dataclass(frozen=True)
class _Expert:
    """One expert's values at each level; biases are the same at all levels."""

    up_SGH: torch.Tensor
    down_SHI: torch.Tensor
    up_bias_G: torch.Tensor | None
    down_bias_H: torch.Tensor | None


class LevelsModel:
    """The model of a quantised store.

    Attributes:
        levels: bits of the levels above leaving out, the last exact.
    """

    def __init__(self, store: Store, kernels: Kernels) -> None:
        """Raises PackError when the machine has too little memory, StoreError for a damaged store."""
        check_memory(store)
        self.levels = levels_up_to(store, store.manifest.exact_level)
        skeleton = build_skeleton(config_from_dict(store.config_dict))
        self._model: Any = skeleton.model
        self._model.set_attn_implementation("eager")
        self.hidden_size = int(skeleton.config.hidden_size)
        self.vocabulary = int(skeleton.config.vocab_size)
        _place(store, self._model, kernels)
        modules = [module for module in self._model.modules() if is_experts_module(module)]
        self._layers = [_read_layer(store, layer, self.levels, kernels) for layer in range(len(store.layers))]
        for layer, module in enumerate(modules):
            module.forward = partial(self._experts, layer, module)
        self._choose: Choose | None = None

    @property
    def layers(self) -> int:
        """MoE layers."""
        return len(self._layers)

    @property
    def experts(self) -> int:
        """Of the layer that has most."""
        return max(map(len, self._layers))

    def log_probs(self, ids_BN: torch.Tensor, choose: Choose | None) -> torch.Tensor:
        """Of every next token [T, V], with all experts at the exact level where `choose` is None."""
        self._choose = choose
        try:
            logits_BNV: torch.Tensor = self._model(input_ids=ids_BN, use_cache=False).logits
        finally:
            self._choose = None
        return logits_BNV.flatten(0, 1).float().log_softmax(-1)

    def _experts(
        self, layer: int, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        hidden_TH, weights_TK = hidden.reshape(-1, hidden.shape[-1]), weights.float()
        gates_TKS = None if self._choose is None else self._choose(layer, hidden_TH, index, weights_TK)[..., 1:]
        output_TH = torch.zeros_like(hidden_TH)
        for expert in sorted(set(index.flatten().tolist())):
            rows_R, places_R = (index == expert).nonzero(as_tuple=True)
            if gates_TKS is None:
                outputs_RSH = _outputs(self._layers[layer][expert], module, hidden_TH[rows_R], exact=True)
                part_RH = outputs_RSH[:, 0] * weights_TK[rows_R, places_R, None]
            else:
                outputs_RSH = _outputs(self._layers[layer][expert], module, hidden_TH[rows_R], exact=False)
                applied_RS = gates_TKS[rows_R, places_R] * weights_TK[rows_R, places_R, None]
                part_RH = torch.einsum("rs,rsh->rh", applied_RS, outputs_RSH)
            output_TH = output_TH.index_add(0, rows_R, part_RH)
        return output_TH.view_as(hidden)


def check_memory(store: Store) -> None:
    """Raises PackError where the fp32 weights of all levels are more than the machine can hold."""
    levels = len(levels_up_to(store, store.manifest.exact_level))
    experts = sum(layer.num_experts * _values(layer.layout) for layer in store.layers)
    needed = 4 * (levels * experts + 2 * store.dense_bytes)
    most = int(_MOST_OF_MACHINE * machine_bytes())
    if needed > most:
        raise PackError(
            f"Training a bit router for {store.path} takes about {format_bytes(needed)} of memory (fp32 values of "
            f"{levels} levels of all experts), and {format_bytes(most)} is what this machine can spare. Leave out "
            "--bit-router: the level policy 'ledger' needs none; or train on a larger machine."
        )


def _values(layout: Layout) -> int:
    matrices = expert_matrices(layout)
    return matrices.up.rows * matrices.up.columns + matrices.down.rows * matrices.down.columns


def _place(store: Store, model: nn.Module, kernels: Kernels) -> None:
    reader = FileReader()
    buffer, tensors = read_dense(store, reader)
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, PackedMatrix):
            plain[name] = PackedWeight.of(tensor, kernels).unpacked()
        else:
            plain[name] = tensor.float() if tensor.is_floating_point() else tensor.clone()
        if plain[name] is tensor:
            plain[name] = tensor.clone()
    put_tensors(model, plain)
    reader.close()
    del tensors
    buffer.close()


def _read_layer(store: Store, layer: int, levels: Sequence[int], kernels: Kernels) -> list[_Expert]:
    layout = cut(store.layers[layer].layout, levels[-1])
    counts = depths(layout, levels)[1:]
    return [_read_expert(store, layer, expert, layout, counts, levels, kernels) for expert in _experts_of(store, layer)]


def _experts_of(store: Store, layer: int) -> range:
    return range(store.layers[layer].num_experts)


def _read_expert(
    store: Store,
    layer: int,
    expert: int,
    layout: Layout,
    counts: Sequence[int],
    levels: Sequence[int],
    kernels: Kernels,
) -> _Expert:
    planes = [_read_plane(store, (layer, expert, plane)) for plane in range(len(layout.planes))]
    addresses = [plane.address for plane in planes]
    matrices = expert_matrices(layout)
    pairs = list(zip(counts, levels, strict=True))
    up, down = (
        torch.stack([kernels.unpack(one, tuple(addresses[:count]), bits) for count, bits in pairs])
        for one in (matrices.up, matrices.down)
    )
    biases = [
        None if offset is None else planes[0].tensor[offset : offset + 4 * rows].view(torch.float32).clone()
        for offset, rows in ((matrices.up_bias, matrices.up.rows), (matrices.down_bias, matrices.down.rows))
    ]
    for plane in planes:
        plane.close()
    return _Expert(up, down, biases[0], biases[1])


def _read_plane(store: Store, key: tuple[int, int, int]) -> HostBuffer:
    extent = store.plane(key)
    buffer = HostBuffer(extent.nbytes)
    view = buffer.view(0, extent.nbytes)
    with extent.file.open("rb", buffering=0) as file:
        file.seek(extent.offset)
        whole = file.readinto(view) == extent.nbytes
    if not whole or checksum(view) != extent.checksum:
        raise StoreError(
            f"Plane {key[2]} of expert {key[1]} in layer {key[0]} ({extent.nbytes} bytes at offset {extent.offset} of "
            f"{extent.file}) is damaged. Pack the model again."
        )
    return buffer


def _outputs(expert: _Expert, module: nn.Module, hidden_RH: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """[R, S, H], or [R, 1, H] of the exact level alone."""
    up_SGH, down_SHI = (expert.up_SGH, expert.down_SHI) if not exact else (expert.up_SGH[-1:], expert.down_SHI[-1:])
    levels, width, _ = up_SGH.shape
    up_RSG = F.linear(hidden_RH, up_SGH.flatten(0, 1)).view(-1, levels, width)
    if expert.up_bias_G is not None:
        up_RSG = up_RSG + expert.up_bias_G
    activated_RSI = activate(module, up_RSG.flatten(0, 1)).view(len(hidden_RH), levels, -1)
    outputs_SRH = torch.bmm(activated_RSI.transpose(0, 1), down_SHI.transpose(1, 2))
    outputs_RSH = outputs_SRH.transpose(0, 1)
    return outputs_RSH if expert.down_bias_H is None else outputs_RSH + expert.down_bias_H
