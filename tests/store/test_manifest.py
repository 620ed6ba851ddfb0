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
from moestro.quant import LEVELS
from moestro.quant.flat import flat_bytes
from moestro.store.calibration_facts import CalibrationFacts, CalibrationText, rounded
from moestro.store.checksum import checksum, to_hex
from moestro.store.dense_file import dense_bytes
from moestro.store.layout import quantised_layout, raw_layout
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
        encoding="raw",
        dtype="BF16",
        dense_bits=16,
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
        calibration=None,
    )


def quantised_manifest() -> Manifest:
    """One layer of two experts with a chain of three planes, of which two levels are promised."""
    layout = quantised_layout((ExpertParam("w", (2, 3), False), ExpertParam("b", (2,), False)), "nested", (2, 4))
    return replace(
        small_manifest(),
        encoding="nested",
        dense_bits=8,
        exact_level=4,
        levels=(2, 4),
        layouts=(layout,),
        plane_files=(FileEntry("experts.planes", 6 * 4096, None),),
        planes=tuple(PlaneEntry(0, 4096 * index, index) for index in range(6)),
        dense_file=FileEntry("dense.safetensors", 64 + flat_bytes(2, 1, 8), 3),
        dense={"lm_head.weight": DenseTensor("flat8", (2, 1), 64, flat_bytes(2, 1, 8), 4)},
        calibration=CalibrationFacts(
            text=CalibrationText("sample.txt", 10),
            tokens=16000,
            errors=(((0.0625, 0.001), (0.5, 1e-06)),),
            sensitivity=(1.5,),
            unrouted=((0, 1),),
            warnings=("odd",),
        ),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    dtypes = draw(st.lists(st.sampled_from(["BF16", "F16", "F32"]), min_size=1, max_size=2, unique=True))
    encoding = draw(st.sampled_from(["raw", "nested", "signs"]))
    promised = [] if encoding == "raw" else draw(st.lists(st.sampled_from(LEVELS), min_size=1, unique=True).map(sorted))
    layouts = []
    for dtype in dtypes:
        params = (ExpertParam("w", (draw(st.integers(1, 60)), 60), True), ExpertParam("b", (7,), False))
        layouts.append(quantised_layout(params, encoding, promised) if promised else raw_layout(params, dtype))
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
        if draw(st.booleans()):
            dtype, shape = (
                draw(st.sampled_from(["flat8", "flat4"])),
                (draw(st.integers(1, 40)), draw(st.integers(1, 70))),
            )
        dense[name] = DenseTensor(dtype, shape, place, dense_bytes(dtype, shape), draw(_CHECKSUMS))
        place += -(-dense_bytes(dtype, shape) // 64) * 64
    levels = tuple(promised) or tuple(sorted({plane.level for layout in layouts for plane in layout.planes}))
    return Manifest(
        encoding=encoding,
        dtype=dtypes[0],
        dense_bits=draw(st.sampled_from([4, 8, 16])),
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
        calibration=draw(_facts([experts for experts, _ in layers], len(levels))) if promised else None,
    )


@st.composite
def _facts(draw: st.DrawFn, experts: list[int], levels: int) -> CalibrationFacts:
    numbers = st.floats(0, 1e30, allow_nan=False).map(rounded)
    return CalibrationFacts(
        text=draw(st.none() | st.builds(CalibrationText, st.text(max_size=4), _CHECKSUMS)),
        tokens=draw(st.integers(0, 2**40)),
        errors=tuple(tuple(tuple(draw(numbers) for _ in range(levels)) for _ in range(count)) for count in experts),
        sensitivity=draw(st.none() | st.tuples(*[numbers] * len(experts))),
        unrouted=tuple(draw(st.lists(st.tuples(st.just(0), st.integers(0, experts[0] - 1)), max_size=2))),
        warnings=tuple(draw(st.lists(st.text(max_size=5), max_size=2))),
    )


@given(manifests())
def test_round_trip(manifest: Manifest) -> None:
    text = encode(manifest)
    assert decode(text, PATH) == manifest
    assert encode(decode(text, PATH)) == text
    assert text.isascii()


@pytest.mark.parametrize("manifest", [small_manifest(), quantised_manifest()], ids=["raw", "quantised"])
def test_every_flipped_bit_is_found(manifest: Manifest) -> None:
    text = encode(manifest)
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
    for version in (1, 3):
        text = encode(small_manifest()).replace(b'"version":2', f'"version":{version}'.encode())
        with pytest.raises(
            StoreError, match=rf"version {version}; this moestro reads version 2\. Pack the model again"
        ):
            decode(text, PATH)


def test_other_json_is_not_a_manifest() -> None:
    with pytest.raises(StoreError, match="not the manifest of a moestro store"):
        decode(b'{"model_type":"mixtral"}', PATH)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"manifest\.json cannot be read \(No such file"):
        read_manifest(tmp_path)


def _resigned(change: dict[str, Any], manifest: Manifest) -> bytes:
    """A manifest with other values and a checksum that matches them."""
    body = json.loads(encode(manifest))
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
        ("exact_level", 8, "its exact level 8 is not one of its levels"),
        ("levels", [8], "its levels are not those of its planes"),
        ("levels", [16, 16], "its levels are not those of its planes"),
        ("dense_bits", 5, "its dense weights have 5 bits"),
        ("encoding", "nested", "its planes are not of its encoding nested"),
        ("encoding", "odd", "its encoding is 'odd', expected raw or one of nested, signs"),
        ("calibration", {}, "has no 'source'"),
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
        decode(_resigned({field: value}, small_manifest()), PATH)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("encoding", "raw", "its planes are not raw, its encoding is"),
        ("encoding", "signs", "its planes are not of its encoding signs"),
        ("levels", [3, 4], None),
        ("levels", [2, 3], "its levels are not those of its planes"),
        ("levels", [4, 2], "its levels are not those of its planes"),
        ("levels", [2, 3, 4], "does not have a number for each layer, expert and level"),
        ("exact_level", 3, "its exact level 3 is not one of its levels"),
        ("calibration", None, "does not say how its codes were found"),
        ("calibration/errors/0/0", [0.5], "does not have a number for each layer, expert and level"),
        ("calibration/errors/0/0/0", 1, "expected a number"),
        ("calibration/errors/0/0/0", -0.5, "expected a number"),
        ("calibration/sensitivity", [], "0 sensitivities for 1 layers"),
        ("calibration/unrouted", [[0, 2]], "lists an expert without tokens that is not there"),
        ("calibration/checksum", "1", "expected 16 hex digits"),
        ("layouts/0/planes/0/tensors/0/nbytes", 64, "does not match its shape"),
        ("layouts/0/planes/0/tensors/0/dtype", "U4", "does not match its shape"),
        ("layouts/0/planes/0/tensors/0/group_size", 64, "does not match its shape"),
        ("layouts/0/planes/1/level", 1, "levels do not ascend"),
        ("dense/lm_head.weight/1", [2], "does not match its shape"),
        ("dense/lm_head.weight/0", "flat4", "does not match its shape"),
    ],
)
def test_a_well_signed_contradiction_of_a_quantised_store_is_named(
    field: str, value: object, message: str | None
) -> None:
    text = _resigned({field: value}, quantised_manifest())
    if message is None:
        assert decode(text, PATH).levels == (3, 4)
        return
    with pytest.raises(StoreError, match="damaged") as caught:
        decode(text, PATH)
    assert message in str(caught.value)


def test_a_config_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(StoreError, match="cannot be written as JSON"):
        encode(replace(small_manifest(), model={"limit": float("inf")}))
