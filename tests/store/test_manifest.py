"""The manifest: one text per content, and no damage goes unnoticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.errors import StoreError
from moestro.hf.skeleton import ExpertParam
from moestro.store.checksum import checksum, to_hex
from moestro.store.dtypes import tensor_bytes
from moestro.store.layout import Layout, PlaneLayout, raw_layout
from moestro.store.manifest import (
    DenseTensor,
    FileEntry,
    LayerEntry,
    Manifest,
    PlaneEntry,
    Source,
    decode,
    encode,
    read_manifest,
)

PATH = Path("somewhere/manifest.json")
_CHECKSUMS = st.integers(0, 2**64 - 1)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_NAMES = st.text("abc.-_1", min_size=1, max_size=8).filter(lambda name: name not in (".", ".."))


def small_manifest() -> Manifest:
    layout = raw_layout((ExpertParam("w", (2, 3), False),), "BF16")
    return Manifest(
        dtype="BF16",
        exact_level=16,
        levels=(16,),
        source=Source("0123456789abcdef", None, ("mtp.weight",)),
        model={"model_type": "mixtral", "rope": {"theta": 1e4}},
        layouts=(layout,),
        layers=(LayerEntry("model.layers.0.mlp.experts", 2, 0),),
        plane_files=(FileEntry("experts.planes", 8192, None),),
        planes=(PlaneEntry(0, 0, 1), PlaneEntry(0, 4096, 2**64 - 1)),
        dense_file=FileEntry("dense.safetensors", 196, 3),
        dense={"lm_head.weight": DenseTensor("BF16", (2, 1), 192, 4, 4)},
        assets=(FileEntry("config.json", 2, 5),),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    dtypes = draw(st.lists(st.sampled_from(["BF16", "F16", "F32"]), min_size=1, max_size=2, unique=True))
    layouts = []
    for dtype in dtypes:
        base = raw_layout((ExpertParam("w", (draw(st.integers(1, 60)), 60), True),), dtype)
        more = tuple(
            PlaneLayout("bit", base.planes[0].level + i, 4096 * draw(st.integers(1, 3)), ())
            for i in range(1, draw(st.integers(1, 3)))
        )
        layouts.append(Layout(base.planes + more))
    layers = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(0, len(layouts) - 1)), min_size=1, max_size=3))
    planes, end = [], 0
    for experts, layout in layers:
        for _ in range(experts):
            for plane in layouts[layout].planes:
                planes.append(PlaneEntry(0, end, draw(_CHECKSUMS)))
                end += plane.nbytes
    dense, place = {}, 64
    for name in draw(st.lists(st.text(max_size=6), max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(["F32", "BF16", "I64", "U8"])), tuple(draw(st.lists(st.integers(0, 5))))
        dense[name] = DenseTensor(dtype, shape, place, tensor_bytes(dtype, shape), draw(_CHECKSUMS))
        place += -(-tensor_bytes(dtype, shape) // 64) * 64
    levels = tuple(sorted({plane.level for layout in layouts for plane in layout.planes}))
    return Manifest(
        dtype=dtypes[0],
        exact_level=draw(st.sampled_from(levels)),
        levels=levels,
        source=Source(draw(st.text(max_size=4)), draw(st.none() | st.just("fp8")), tuple(draw(st.lists(_NAMES)))),
        model=draw(st.dictionaries(st.text(max_size=8), _JSON, max_size=4)),
        layouts=tuple(layouts),
        layers=tuple(LayerEntry(f"m{i}", experts, layout) for i, (experts, layout) in enumerate(layers)),
        plane_files=(FileEntry("experts.planes", end, None),),
        planes=tuple(planes),
        dense_file=FileEntry("dense.safetensors", place, draw(_CHECKSUMS)),
        dense=dense,
        assets=tuple(FileEntry(name, draw(st.integers(0, 99)), draw(_CHECKSUMS)) for name in draw(st.lists(_NAMES))),
    )


@given(manifests())
def test_round_trip(manifest: Manifest) -> None:
    text = encode(manifest)
    assert decode(text, PATH) == manifest
    assert encode(decode(text, PATH)) == text
    assert text.isascii()


def test_every_flipped_bit_is_found() -> None:
    text = encode(small_manifest())
    for position in range(8 * len(text)):
        damaged = bytearray(text)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(StoreError, match=r"manifest\.json"):
            decode(bytes(damaged), PATH)


@given(st.binary(max_size=200))
def test_any_bytes_give_one_kind_of_error(raw: bytes) -> None:
    with pytest.raises(StoreError):
        decode(raw, PATH)


def test_a_cut_manifest_is_found() -> None:
    text = encode(small_manifest())
    for length in (0, 1, len(text) // 2, len(text) - 1):
        with pytest.raises(StoreError, match="damaged"):
            decode(text[:length], PATH)


def test_another_version_is_named() -> None:
    text = encode(small_manifest()).replace(b'"version":1', b'"version":2')
    with pytest.raises(StoreError, match=r"format version 2; this moestro reads version 1"):
        decode(text, PATH)


def test_other_json_is_not_a_manifest() -> None:
    with pytest.raises(StoreError, match="not the manifest of a moestro store"):
        decode(b'{"model_type":"mixtral"}', PATH)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"manifest\.json cannot be read \(No such file"):
        read_manifest(tmp_path)


def _resigned(change: dict[str, Any]) -> bytes:
    """The small manifest with other values and a checksum that matches them."""
    body = json.loads(encode(small_manifest()))
    del body["checksum"]
    for field, value in change.items():
        *path, last = field.split("/")
        place = body
        for step in path:
            place = place[int(step) if isinstance(place, list) else step]
        place[int(last) if isinstance(place, list) else last] = value
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["checksum"] = to_hex(checksum(canonical.encode()))
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "F8_E4M3", "its dtype is 'F8_E4M3'"),
        ("dtype", 16, "expected text"),
        ("assets/0/name", "../../etc/passwd", "expected a plain file name"),
        ("plane_files/0/name", "..", "expected a plain file name"),
        ("dense_file/name", "/dev/zero", "expected a plain file name"),
        ("layouts/0/planes/0/kind", "odd", "unknown kind"),
        ("layers/0/layout", 1, "without experts or without a layout"),
        ("layers/0/experts", 0, "without experts or without a layout"),
        ("layers/0/experts", 3, "lists 2 planes, its layers have 3"),
        ("layers/0/experts", -1, "expected a whole number"),
        ("layers/0/experts", True, "expected a whole number"),
        ("exact_level", 8, "its levels are not those of its planes"),
        ("planes/1/1", 0, "where it cannot be"),
        ("planes/1/0", 1, "where it cannot be"),
        ("planes/1/2", "xyz", "expected 16 hex digits"),
        ("planes/1", [0, 4096], "expected rows of 3"),
        ("plane_files/0/nbytes", 4096, "not as long as their planes"),
        ("dense/lm_head.weight/3", 8, "does not match its shape"),
        ("dense/lm_head.weight/2", 100, "where it cannot be"),
        ("dense_file/nbytes", 100, "the file has 100"),
        ("source", None, "expected an object"),
        ("layers", {}, "expected an array"),
    ],
)
def test_a_well_signed_contradiction_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(StoreError, match="damaged") as caught:
        decode(_resigned({field: value}), PATH)
    assert message in str(caught.value)


def test_a_config_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(StoreError, match="cannot be written as JSON"):
        encode(replace(small_manifest(), model={"limit": float("inf")}))
