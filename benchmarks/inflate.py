"""Make the experts of a real, trained model large, without changing what it says: honest pressure on a small machine.

    python benchmarks/inflate.py STORE INFLATED --times 64

Each expert becomes `times` copies of itself side by side: the packed codes of gate and up are repeated along the
expert's width, those of down likewise with its scales divided by `times` (a power of two, so nothing is rounded). The
sum over the copies is what the expert gave before: the same logits but for the order of additions, the same routing on
the same text, and `times` as many bytes of experts to hold, read and multiply by. Nothing is padded (zeros could be
skipped) and nothing is quantised again. Copies of a group of inputs lie side by side, so that groups may grow (up to
128) without changing a scale. Dense weights stay as they are; their share is printed.

`benchmarks/peers/gguf_inflate.py` does the same to a GGUF file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moestro.foresight import NETS_FILE
from moestro.hf.skeleton import Skeleton, build_skeleton, config_from_dict, is_experts_module
from moestro.memory.budget import format_bytes
from moestro.quant.groups import group_size, groups, padded_columns, padded_rows
from moestro.quant.nested import FORMS
from moestro.quant.tiles import HEADER, pack_codes, pack_scaled, unpack_codes, unpack_scaled
from moestro.store.checksum import checksum, checksum_file
from moestro.store.dtypes import TORCH_DTYPES
from moestro.store.layout import Layout, TensorLayout, quantised_layout, raw_layout
from moestro.store.manifest import MANIFEST_NAME, FileEntry, LayerEntry, PlaneEntry, encode
from moestro.store.reader import Store

PLANES = "experts.planes"


@dataclass(frozen=True)
class Widening:
    """Where the units of a wider expert come from: `unit_I` are numbers of the narrow one's, `up_N` rows of its up."""

    times: int
    unit_I: torch.Tensor
    up_N: torch.Tensor

    @classmethod
    def of(cls, skeleton: Skeleton, layer: int, width: int, times: int) -> Widening:
        """For experts of this width."""
        module: Any = [one for one in skeleton.model.modules() if is_experts_module(one)][layer]
        group = group_size(width)
        if width % group:
            raise SystemExit(f"error: experts of width {width} do not consist of whole groups of {group}")
        units = torch.arange(width).view(-1, 1, group).expand(-1, times, -1).flatten()
        if not module.has_gate:
            rows = units
        elif module.is_concatenated:
            rows = torch.cat((units, units + width))
        else:
            rows = torch.stack((2 * units, 2 * units + 1), dim=-1).flatten()
        return cls(times, units, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("inflated", type=Path)
    parser.add_argument("--times", type=int, required=True, help="a power of two")
    arguments = parser.parse_args()
    made = inflate(arguments.store, arguments.inflated, arguments.times)
    whole = made.expert_bytes + made.dense_bytes
    print(
        f"{made.path}: experts {format_bytes(made.expert_bytes)}, dense weights {format_bytes(made.dense_bytes)}, "
        f"{made.dense_bytes / whole:.2%} of the whole"
    )


def inflate(source: Path, destination: Path, times: int) -> Store:
    """Write the store, which must not exist, and open it."""
    if times < 1 or times & (times - 1):
        raise SystemExit(f"error: {times} is not a power of two, so scales could not be divided by it exactly")
    store = Store.open(source)
    manifest = store.manifest
    if manifest.encoding not in ("nested", "raw"):
        raise SystemExit(f"error: stores of encoding {manifest.encoding} are not inflated, nested and raw ones are")
    destination.mkdir(parents=True)
    model = _wider_config(manifest.model, times)
    skeleton, narrow = (build_skeleton(config_from_dict(config)) for config in (model, manifest.model))
    layouts = [
        raw_layout(layer.params, manifest.dtype)
        if manifest.encoding == "raw"
        else quantised_layout(layer.params, manifest.encoding, manifest.levels)
        for layer in skeleton.expert_layers
    ]
    distinct = tuple(dict.fromkeys(layouts))
    planes: list[PlaneEntry] = []
    with (destination / PLANES).open("wb") as file:
        for number, layout in enumerate(layouts):
            (width,) = {tensor.shape[1] for tensor in layout.planes[0].tensors if tensor.name == "down_proj"}
            how = Widening.of(narrow, number, width // times, times)
            for expert in range(store.layers[number].num_experts):
                for plane, data in zip(layout.planes, _wider(store, number, expert, layout, how), strict=True):
                    assert len(data) == plane.nbytes
                    planes.append(PlaneEntry(0, file.tell(), checksum(data)))
                    file.write(data)
        file.flush()
        os.fsync(file.fileno())
    shutil.copyfile(store.dense_file, destination / store.dense_file.name)
    if (source / NETS_FILE).exists():
        shutil.copyfile(source / NETS_FILE, destination / NETS_FILE)
    made = replace(
        manifest,
        model=model,
        source=replace(manifest.source, fingerprint=f"{manifest.source.fingerprint}-x{times}"),
        layouts=distinct,
        layers=tuple(
            LayerEntry(old.module, old.experts, distinct.index(layout))
            for old, layout in zip(manifest.layers, layouts, strict=True)
        ),
        plane_files=(FileEntry(PLANES, (destination / PLANES).stat().st_size, None),),
        planes=tuple(planes),
        assets=tuple(_asset(source / entry.name, destination / entry.name, model) for entry in manifest.assets),
    )
    (destination / MANIFEST_NAME).write_bytes(encode(made))
    return Store.open(destination)


def _wider_config(config: Mapping[str, Any], times: int) -> dict[str, Any]:
    name = "moe_intermediate_size" if config.get("moe_intermediate_size") else "intermediate_size"
    return {**config, name: config[name] * times}


def _asset(source: Path, copy: Path, model: Mapping[str, Any]) -> FileEntry:
    if copy.name == "config.json":
        copy.write_text(json.dumps(model, indent=2) + "\n")
    else:
        shutil.copyfile(source, copy)
    return FileEntry(copy.name, copy.stat().st_size, checksum_file(copy))


def _wider(store: Store, layer: int, expert: int, layout: Layout, how: Widening) -> list[bytes]:
    """The planes of the wider expert."""
    made = []
    for number, (plane, wider) in enumerate(zip(store.layers[layer].layout.planes, layout.planes, strict=True)):
        extent = store.plane((layer, expert, number))
        with extent.file.open("rb") as file:
            file.seek(extent.offset)
            old = torch.frombuffer(bytearray(file.read(extent.nbytes)), dtype=torch.uint8)
        new = torch.zeros(wider.nbytes, dtype=torch.uint8)
        for tensor, place in zip(plane.tensors, wider.tensors, strict=True):
            region = old[tensor.offset : tensor.offset + tensor.nbytes]
            value = _wider_tensor(tensor, place, region, plane.level, how)
            new[place.offset : place.offset + place.nbytes] = value
        made.append(new.numpy().tobytes())
    return made


def _wider_tensor(
    tensor: TensorLayout, place: TensorLayout, region: torch.Tensor, level: int, how: Widening
) -> torch.Tensor:
    if tensor.group_size is not None:
        if tensor.name == "down_proj":
            return _wider_down(tensor, place, region, level, how)
        return _wider_up(tensor, region, level, how)
    values = region.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
    if tensor.name == "down_proj":
        values = values[:, how.unit_I] / how.times
    elif tensor.name != "down_proj_bias":
        values = values[how.up_N]
    assert values.shape == place.shape, (values.shape, place)
    return values.contiguous().view(-1).view(torch.uint8)


def _wider_up(tensor: TensorLayout, region: torch.Tensor, level: int, how: Widening) -> torch.Tensor:
    """More rows: those of the units, over and over."""
    header, scales, codes_NK, group = _parts(tensor, region, level)
    return _joined(header, [one_NG[how.up_N] for one_NG in scales], codes_NK[how.up_N], group, level)


def _wider_down(
    tensor: TensorLayout, place: TensorLayout, region: torch.Tensor, level: int, how: Widening
) -> torch.Tensor:
    """More columns, and the unit of all weights (the first number of the header) divided by the copies."""
    header, scales, codes_NK, group = _parts(tensor, region, level)
    if len(header):
        constants = header.clone().view(torch.float32)
        constants[0] /= how.times
        header = constants.view(torch.uint8)
    wide = group_size(place.shape[1])
    first_G = how.unit_I[::wide] // group
    return _joined(header, [one_NG[:, first_G] for one_NG in scales], codes_NK[:, how.unit_I], wide, level)


def _parts(
    tensor: TensorLayout, region: torch.Tensor, level: int
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor, int]:
    """Header, scales and codes of a region (rows filled up), and its group; planes after the base have codes only."""
    rows, columns = tensor.shape
    group, tall, wide = group_size(columns), padded_rows(rows), padded_columns(columns)
    if level == 2:
        scales, codes_NK = unpack_scaled(region[HEADER:], 2, tall, wide, group, FORMS[2])
        return region[:HEADER], scales, codes_NK, group
    codes_NK = unpack_codes(region.view(tall // 16, groups(columns), -1), group, FORMS[level])
    return region[:0], (), codes_NK, group


def _joined(
    header: torch.Tensor, scales: list[torch.Tensor], codes_NK: torch.Tensor, group: int, level: int
) -> torch.Tensor:
    if level == 2:
        first, second = (one_NG.contiguous() for one_NG in scales)
        return torch.cat((header, pack_scaled((first, second), codes_NK.contiguous(), group, FORMS[2])))
    return pack_codes(codes_NK.contiguous(), group, FORMS[level]).flatten()


if __name__ == "__main__":
    main()
