"""`variant.json`: its text, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from moestro.errors import VariantError
from moestro.quant.delta import DeltaRegion
from moestro.quant.low_rank import LowRankRegion
from moestro.store.calibration_facts import CalibrationText
from moestro.store.manifest import DenseTensor, FileEntry
from moestro.store.variant_manifest import (
    DeltaPlane,
    DenseDelta,
    ExpertDelta,
    VariantManifest,
    decode,
    encode,
    expert_delta,
)

_PATH = Path("variant.json")


def small_variant() -> VariantManifest:
    """Two layers, of which one changed, one dense matrix and one vector."""
    up, down = DeltaRegion(32, 64, 2, 2), DeltaRegion(64, 16, 2, 2, bias=True)
    return VariantManifest(
        base="0123456789abcdef",
        source="fedcba9876543210",
        source_name="tuned",
        method="me-switch",
        bits=2,
        dense_bits=4,
        salient=0.02,
        text=CalibrationText("text.txt", 10),
        tokens=1000,
        distilled=5,
        warnings=("odd",),
        layers=(None, expert_delta(up, down)),
        planes_file=FileEntry("experts.planes", 8192, None),
        planes=(DeltaPlane(1, 0, 0, 1), DeltaPlane(1, 3, 4096, 2)),
        dense_file=FileEntry("dense.safetensors", 1280, 3),
        deltas={"q.weight": DenseDelta(DeltaRegion(16, 32, 4, 0), 256, 4)},
        replacements={"norm.weight": DenseTensor("F32", (16,), 1216, 64, 5)},
    )


_TEXT = (
    '{"base":"0123456789abcdef","checksum":"%s",'
    '"deltas":{"q.weight":[16,32,4,0,0,256,"0000000000000004"]},'
    '"dense_file":{"checksum":"0000000000000003","name":"dense.safetensors","nbytes":1280},'
    '"format":"moestro-variant",'
    '"layers":[null,{"down":[64,16,2,2,1],"down_at":896,"nbytes":4096,"up":[32,64,2,2,0]}],'
    '"method":{"bits":2,"dense_bits":4,"distilled":5,"name":"me-switch","salient":0.02,"text":"text.txt",'
    '"text_checksum":"000000000000000a","tokens":1000},'
    '"planes":[[1,0,0,"0000000000000001"],[1,3,4096,"0000000000000002"]],'
    '"planes_file":{"name":"experts.planes","nbytes":8192},'
    '"replacements":{"norm.weight":["F32",[16],1216,64,"0000000000000005"]},'
    '"source":{"fingerprint":"fedcba9876543210","name":"tuned"},"version":1,"warnings":["odd"]}'
)


def test_the_text() -> None:
    unsigned = _TEXT.replace('"checksum":"%s",', "", 1)
    signed = _TEXT % xxhash.xxh3_64_hexdigest(unsigned.encode())
    assert encode(small_variant()) == signed.encode() + b"\n"


def test_products_of_thin_matrices_come_back() -> None:
    up, down = LowRankRegion(32, 64, (1, 2, 9)), LowRankRegion(64, 16, (1, 1, 5), bias=True)
    low_rank = replace(
        small_variant(),
        method="delta-come",
        layers=(None, expert_delta(up, down)),
        deltas={"q.weight": DenseDelta(LowRankRegion(16, 32, (1, 1, 3)), 256, 4)},
    )
    text = encode(low_rank)
    assert b'"deltas":{"q.weight":[16,32,1,1,3,0,256,"0000000000000004"]}' in text
    assert b'"down":[64,16,1,1,5,1]' in text
    assert decode(text, _PATH) == low_rank
    for wrong in (replace(low_rank, method="me-switch"), replace(small_variant(), method="delta-come")):
        with pytest.raises(VariantError, match="damaged"):
            decode(encode(wrong), _PATH)


def test_it_comes_back() -> None:
    assert decode(encode(small_variant()), _PATH) == small_variant()
    bare = replace(small_variant(), text=None, layers=(), planes=(), planes_file=FileEntry("experts.planes", 0, None))
    assert decode(encode(bare), _PATH) == bare


@given(bit=st.integers(0, 8 * len(encode(small_variant())) - 1))
def test_no_flipped_bit_passes(bit: int) -> None:
    raw = bytearray(encode(small_variant()))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(VariantError, match=r"variant\.json"):
        decode(bytes(raw), _PATH)


def _layer(manifest: VariantManifest, **changes: Any) -> VariantManifest:
    layer = manifest.layers[1]
    assert layer is not None
    return replace(manifest, layers=(None, layer._replace(**changes)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: replace(one, method="magic"), "method"),
        (lambda one: replace(one, bits=3), "bits"),
        (lambda one: replace(one, salient=1.5), "share"),
        (lambda one: _layer(one, down_at=1024), "do not lie"),
        (lambda one: _layer(one, nbytes=8192), "do not lie"),
        (lambda one: replace(one, planes=one.planes[::-1]), "where it cannot be"),
        (lambda one: replace(one, planes=one.planes[:1]), "their file"),
        (lambda one: replace(one, planes=(DeltaPlane(0, 0, 0, 1),)), "where it cannot be"),
        (lambda one: replace(one, planes=(DeltaPlane(7, 0, 0, 1),)), "where it cannot be"),
        (lambda one: replace(one, dense_file=FileEntry("dense.safetensors", 1000, 3)), "need"),
        (
            lambda one: replace(one, replacements={"norm.weight": DenseTensor("F32", (16,), 300, 64, 5)}),
            "where it cannot be",
        ),
        (lambda one: replace(one, replacements={"q.weight": DenseTensor("F32", (16,), 1216, 64, 5)}), "both"),
        (lambda one: replace(one, replacements={"norm.weight": DenseTensor("F32", (15,), 1216, 64, 5)}), "shape"),
        (lambda one: replace(one, planes_file=FileEntry("../x", 8192, None)), "plain file name"),
    ],
)
def test_what_contradicts_itself_is_named(change: Callable[[VariantManifest], VariantManifest], words: str) -> None:
    with pytest.raises(VariantError, match=words):
        decode(encode(change(small_variant())), _PATH)


def test_regions_that_cannot_be_and_other_versions() -> None:
    for key, value, words in (("version", 2, "version 2"), ("format", "x", "moestro-variant")):
        body = json.loads(encode(small_variant()))
        with pytest.raises(VariantError, match=words):
            decode(json.dumps({**body, key: value}).encode(), _PATH)
    with pytest.raises(VariantError, match="JSON"):
        decode(b"{", _PATH)
    for numbers in ([0, 1, 2, 0, 0], [16, 32, 3, 0, 0], [16, 32, 2, 33, 0], [16, 32, 2, 0, 2]):
        body = json.loads(encode(small_variant()))
        del body["checksum"]
        body["layers"][1]["up"] = numbers
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        body["checksum"] = xxhash.xxh3_64_hexdigest(text.encode())
        with pytest.raises(VariantError, match="cannot be"):
            decode(json.dumps(body, sort_keys=True, separators=(",", ":")).encode() + b"\n", _PATH)


def test_planes_are_whole_pages() -> None:
    assert expert_delta(None, None) == ExpertDelta(None, None, 0, 0, 0)
    region = DeltaRegion(64, 64, 4, 4)
    both = expert_delta(region, region)
    assert both.down_at == region.nbytes
    assert both.nbytes % 4096 == 0
    assert 0 <= both.nbytes - 2 * region.nbytes < 4096
