"""Variants whose deltas are products of thin matrices: the general path serves them, beside others and the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from families import FAMILIES, random_model
from moestro.errors import VariantError
from moestro.kernels import KERNELS
from moestro.store.reader import Store
from moestro.store.variant_file import remove_variant
from opening import Feed, logits_of, open_store
from runtime.test_variants import LONG, PROMPT, SHORT, FloatActivations
from variant_stores import Family, pack_family, variant_model

PLENTY = 64 << 20


def _family(name: str, kind: str, folder: Path) -> Family:
    config = FAMILIES["mixtral" if name == "mish" else name]()
    if name == "mish":
        config.hidden_act = "mish"
    random_model(config, dtype=torch.bfloat16).save_pretrained(folder / "base")
    return pack_family(folder / "base", folder / "store", raw=kind == "raw")


@pytest.fixture(
    scope="module",
    params=[("qwen3_moe", "nested"), ("gpt_oss", "nested"), ("gpt_oss", "raw"), ("mish", "nested")],
    ids="-".join,
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """With a variant of flat deltas, and one of low rank."""
    made = _family(*request.param, tmp_path_factory.mktemp("family"))
    made.add("ada", seed=1)
    made.add("dora", seed=2, method="delta-come")
    return made


def test_logits_are_those_of_a_float_model_of_the_decoded_sum(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(family.store)
    monkeypatch.setitem(KERNELS, "auto", lambda _threads: FloatActivations())
    with open_store(family.store, more_bytes=PLENTY) as opened:
        assert opened.runner.path == "general"
        actual, base = logits_of(opened, PROMPT, variant="dora"), logits_of(opened, PROMPT)
    monkeypatch.undo()
    with torch.inference_mode():
        model = variant_model(store, "dora", store.manifest.exact_level)
        expected = model(torch.tensor([PROMPT])).logits[0]
    assert (actual - expected).abs().max() <= 1e-3
    assert (actual - base).abs().max() > 0.05


def test_neighbours_and_memory_change_no_bit(family: Family) -> None:
    alone = {}
    for name in ("", "ada", "dora"):
        with open_store(family.store, threads=1, native=False, more_bytes=PLENTY) as opened:
            alone[name] = logits_of(opened, LONG, variant=name)
    with open_store(family.store, share=0.0, native=False, more_bytes=PLENTY // 8, threads=2) as opened:
        feed = Feed(opened, variants={0: "ada", 1: "dora", 3: "dora"})
        first = feed.step({0: LONG[:40], 1: LONG[:1], 2: LONG[:7], 3: SHORT})
        second = feed.step({1: LONG[1:2], 2: LONG[7:], 0: LONG[40:]})
        third = feed.step({1: LONG[2:]})
    assert torch.equal(torch.cat([first[0], second[0]]), alone["ada"])
    assert torch.equal(torch.cat([first[1], second[1], third[1]]), alone["dora"])
    assert torch.equal(torch.cat([first[2], second[2]]), alone[""])


def test_a_model_on_the_native_path_refuses_one_that_comes_later_and_goes_on(tmp_path: Path) -> None:
    family = _family("qwen3_moe", "nested", tmp_path)
    family.add("ada", seed=1)
    with open_store(family.store, more_bytes=PLENTY) as opened:
        assert opened.runner.path == "native"
        before = logits_of(opened, SHORT, variant="ada")
        family.add("dora", seed=2, method="delta-come")
        with pytest.raises(VariantError, match=r"dora is by delta-come, .* Open the model again"):
            opened.variants.open("dora")
        assert torch.equal(logits_of(opened, SHORT, variant="ada"), before)
    with open_store(family.store, more_bytes=PLENTY) as opened:
        assert opened.runner.path == "general"
        logits_of(opened, SHORT, variant="dora")
    remove_variant(family.store, "dora")
    with open_store(family.store, more_bytes=PLENTY) as opened:
        assert opened.runner.path == "native"
