"""Reading a store's tensors back in tests, by the format's rules alone."""

from __future__ import annotations

import torch

from moestro.quant import make_encoding
from moestro.store.dtypes import TORCH_DTYPES
from moestro.store.reader import Store


def read_expert(store: Store, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """The tensors of one expert of a raw store, in canonical layout."""
    extent = store.plane((layer, expert, 0))
    with extent.file.open("rb") as file:
        file.seek(extent.offset)
        plane = bytearray(file.read(extent.nbytes))
    tensors = store.layers[layer].layout.planes[0].tensors
    return {t.name: _tensor(plane, t.dtype, t.shape, t.offset, t.nbytes) for t in tensors}


def read_level(store: Store, layer: int, expert: int, level: int) -> dict[str, torch.Tensor]:
    """An expert's parameters at a level, by the format's rules alone."""
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
            data[t.offset : t.offset + t.nbytes]
            for layout, data in planes
            for t in layout.tensors
            if t.name == tensor.name
        ]
        if tensor.dtype in TORCH_DTYPES:
            values[tensor.name] = regions[0].view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
        else:
            values[tensor.name] = make_encoding(tensor.dtype).decode(regions, *tensor.shape, level)
    return values


def read_dense(store: Store) -> dict[str, torch.Tensor]:
    """All dense tensors by name."""
    data = bytearray(store.dense_file.read_bytes())
    return {name: _tensor(data, t.dtype, t.shape, t.offset, t.nbytes) for name, t in store.dense.items()}


def _tensor(data: bytearray, dtype: str, shape: tuple[int, ...], offset: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.uint8, count=nbytes, offset=offset).view(TORCH_DTYPES[dtype]).view(shape)


def assert_holds(store: Store, state: dict[str, torch.Tensor], tied: frozenset[str] = frozenset()) -> None:
    """The store holds exactly the tensors of a model's state dict (cast to the stored types), none lost, none extra."""
    left = set(state) - tied
    for name, stored in read_dense(store).items():
        assert stored.shape == state[name].shape, name
        torch.testing.assert_close(stored, state[name].to(stored.dtype), rtol=0, atol=0, msg=name)
        left.remove(name)
    for layer in store.layers:
        for expert in range(layer.num_experts):
            for param, stored in read_expert(store, layer.layer, expert).items():
                name = f"{layer.module}.{param}"
                own = state[name][expert]
                wanted = own if own.shape == stored.shape and not _is_transposed(store, param) else own.t()
                torch.testing.assert_close(stored, wanted.to(stored.dtype), rtol=0, atol=0, msg=f"{name}[{expert}]")
                left.discard(name)
    assert not left


def _is_transposed(store: Store, param: str) -> bool:
    """gpt-oss keeps its matrices as [in, out]."""
    return store.config_dict["model_type"] == "gpt_oss" and not param.endswith("_bias")
