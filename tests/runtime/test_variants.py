"""Variants at run time: what they compute, and that nobody else in the step, nor the memory, changes a bit of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch

from families import FAMILIES, random_model
from moestro.kernels import KERNELS
from moestro.kernels.base import MatrixSpec
from moestro.kernels.reference import ReferenceKernels
from moestro.quant.delta import DeltaRegion
from moestro.store.reader import Store
from opening import Feed, logits_of, open_store
from variant_stores import Family, pack_family, variant_model

PROMPT = [5, 17, 3, 99, 42, 8, 120, 64, 31, 77, 12, 150, 9, 9, 23, 58, 101, 6, 44, 71]
LONG = [(7 * index * index + 3 * index + 11) % 157 + 3 for index in range(60)]
SHORT = [9, 4, 77]
NAMES = ("ada", "bob", "cleo")

MORE = 512 << 10
"""Beside what the base takes: dense parts of three variants, and slots for planes of another size."""

# A tied embedding, norms in heads; biases, sinks and an activation of its own; a routing correction, latent attention;
# an activation that only transformers knows.
CASES = [
    ("qwen3_moe", "nested", True),
    ("qwen3_moe", "nested", False),
    ("gpt_oss", "nested", True),
    ("gpt_oss", "raw", True),
    ("gpt_oss", "raw", False),
    ("deepseek_v3", "nested", False),
    ("mish", "nested", True),
]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Family]:
    """With three variants each; every one is made once."""

    @cache
    def make(name: str, kind: str) -> Family:
        folder = tmp_path_factory.mktemp(f"{name}-{kind}")
        config = FAMILIES["mixtral" if name == "mish" else name]()
        if name == "mish":
            config.hidden_act = "mish"
        random_model(config, dtype=torch.bfloat16).save_pretrained(folder / "base")
        made = pack_family(folder / "base", folder / "store", raw=kind == "raw")
        for seed, (variant, bits) in enumerate(zip(NAMES, (2, 4, 1), strict=True), start=1):
            made.add(variant, seed=seed, bits=bits)
        return made

    return make


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request: pytest.FixtureRequest, families: Callable[[str, str], Family]) -> tuple[Family, bool]:
    name, kind, native = request.param
    return families(name, kind), native


@pytest.fixture(scope="module")
def family(case: tuple[Family, bool]) -> Family:
    return case[0]


@pytest.fixture(scope="module")
def native(case: tuple[Family, bool]) -> bool:
    """Whether it runs on the native path, if the family has one."""
    return case[1]


Logits = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def alone(family: Family, native: bool) -> dict[str, Logits]:
    """Of each variant and of the base, with nobody else in the step and everything in memory."""
    found: dict[str, Logits] = {}
    for name in ("", *NAMES):
        with open_store(family.store, share=1.0, threads=1, native=native, more_bytes=32 << 20) as opened:
            found[name] = {
                "long": logits_of(opened, LONG, variant=name),
                "short": logits_of(opened, SHORT, variant=name),
            }
    return found


def test_variants_differ_from_each_other_and_from_the_base(alone: dict[str, Logits]) -> None:
    rows = [logits["long"] for logits in alone.values()]
    assert all((one - other).abs().max() > 0.05 for place, one in enumerate(rows) for other in rows[:place])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_neighbours_and_memory_change_no_bit(
    family: Family, alone: dict[str, Logits], native: bool, share: float
) -> None:
    more = MORE if share < 1 else 32 << 20
    with open_store(family.store, share=share, native=native, more_bytes=more, threads=2, max_sequences=8) as opened:
        variants = {0: "ada", 1: "bob", 3: "ada", 4: "cleo"}
        feed = Feed(opened, variants=variants)
        first = feed.step({0: LONG[:40], 1: SHORT, 2: LONG[:7], 3: SHORT[:1], 4: LONG[:1]})
        second = feed.step({3: SHORT[1:], 2: LONG[7:], 0: LONG[40:], 4: LONG[1:2]})
        third = feed.step({4: LONG[2:], 5: SHORT})
        stats = opened.runner.planes.stats
    assert torch.equal(torch.cat([first[0], second[0]]), alone["ada"]["long"])
    assert torch.equal(first[1], alone["bob"]["short"])
    assert torch.equal(torch.cat([first[2], second[2]]), alone[""]["long"])
    assert torch.equal(torch.cat([first[3], second[3]]), alone["ada"]["short"])
    assert torch.equal(torch.cat([first[4], second[4], third[4]]), alone["cleo"]["long"])
    assert torch.equal(third[5], alone[""]["short"])
    assert share == 1.0 or stats.evictions > 0


def test_decoding_row_by_row_changes_no_bit(family: Family, alone: dict[str, Logits], native: bool) -> None:
    with open_store(family.store, share=0.5, native=native, more_bytes=MORE, max_sequences=4) as opened:
        feed = Feed(opened, variants={0: "ada", 1: "bob"})
        steps = [feed.step({0: LONG[at : at + 1], 1: LONG[at : at + 1], 2: LONG[at : at + 1]}) for at in range(12)]
    for request, name in enumerate(("ada", "bob", "")):
        assert torch.equal(torch.cat([step[request] for step in steps]), alone[name]["long"][:12])


def test_both_paths_are_one_model(families: Callable[[str, str], Family]) -> None:
    """But for the order of sums, which now and then rounds an activation the other way: most rows are very near."""
    family = families("qwen3_moe", "nested")
    found = []
    for native in (True, False):
        with open_store(family.store, native=native, more_bytes=32 << 20) as opened:
            assert opened.runner.path == ("native" if native else "general")
            found.append(torch.cat([logits_of(opened, LONG, variant=name) for name in NAMES]))
    distance_T = (found[0] - found[1]).abs().amax(-1)
    assert distance_T.median() <= 1e-3
    assert distance_T.quantile(0.9) <= 0.05


class FloatActivations(ReferenceKernels):
    """Computes with the values that codes stand for, and with activations as they are."""

    def packed_linear(
        self,
        x_TK: torch.Tensor,
        matrix: MatrixSpec,
        planes: Sequence[int],
        level: int,
        bias_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.linear(x_TK, self.unpack(matrix, planes, level), bias_N)

    def add_delta(self, x_TK: torch.Tensor, delta: DeltaRegion, address: int, out_TN: torch.Tensor) -> None:
        bias = torch.zeros(1, delta.columns)
        super().add_delta(bias, delta, address, out_TN)
        out_TN += self.linear(x_TK, self.unpack_delta(delta, address))


def test_logits_are_those_of_a_float_model_of_the_decoded_sum(
    family: Family, alone: dict[str, Logits], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(family.store)
    monkeypatch.setitem(KERNELS, "auto", lambda _threads: FloatActivations())
    with open_store(family.store, share=0.3, native=False, more_bytes=MORE) as opened:
        actual = {name: logits_of(opened, PROMPT, variant=name) for name in NAMES}
    monkeypatch.undo()
    for name in NAMES:
        with torch.inference_mode():
            model = variant_model(store, name, store.manifest.exact_level)
            expected = model(torch.tensor([PROMPT])).logits[0]
        assert (actual[name] - expected).abs().max() <= 1e-3, name
        assert expected.std() > 0.1, "the logits say nothing"


def test_variants_leave_memory_for_others_and_come_back(family: Family, alone: dict[str, Logits], native: bool) -> None:
    with open_store(family.store, share=0.0, native=native, more_bytes=MORE) as opened:
        for name in (*NAMES, *NAMES[::-1]):
            variant = opened.variants.open(name)
            assert opened.variants.enter(variant)
            opened.variants.leave(variant)
            assert torch.equal(logits_of(opened, SHORT, variant=name), alone[name]["short"])
            opened.variants.leave(variant)
            opened.variants.release()
            assert opened.variants.resident == {}
            assert opened.shares.lent_bytes == 0
