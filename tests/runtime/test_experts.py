"""Rows to experts and back: grouping, combining, and the ways in which a layer's experts are computed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.activations import ACT2FN

from moestro.hf.skeleton import ExpertParam
from moestro.kernels import make_kernels
from moestro.keys import PlaneExtent, PlaneKey
from moestro.memory.arena import Arena
from moestro.memory.pages import HostBuffer
from moestro.memory.plane_cache import PlaneCache
from moestro.memory.transfer import TransferEngine
from moestro.policy import LRU
from moestro.quant import make_encoding
from moestro.runtime import expert_layers as room
from moestro.runtime.expert_layers import PackedExperts, PackedExpertsWithModule, packed_layer
from moestro.runtime.experts import RoutedExperts, combine
from moestro.runtime.grouping import Grouping
from moestro.runtime.level import cut
from moestro.store.layout import Layout, quantised_layout

EXPERTS, HIDDEN, WIDTH = 6, 64, 48
LEVELS = (2, 3, 4, 8)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**16))
def test_rows_of_an_expert_are_apart_by_level(rows: int, per_row: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    index_TK = chance.integers(0, EXPERTS + 2, (rows, per_row))
    levels_TK = chance.integers(0, 4, (rows, per_row))
    grouping = Grouping(index_TK, EXPERTS, bits=(2, 3, 8), levels_TK=levels_TK)
    pairs = list(zip(index_TK.ravel().tolist(), levels_TK.ravel().tolist(), strict=True))
    found = {}
    for group in grouping.used:
        expert, level = grouping.expert_of(group), grouping.level_of(group)
        assert grouping.bits_of(group) == (2, 3, 8)[level - 1]
        found[expert, level] = grouping.places_of(group).tolist()
    wanted = {pair for pair in pairs if pair[0] < EXPERTS and pair[1] > 0}
    assert found == {pair: [place for place, one in enumerate(pairs) if one == pair] for pair in wanted}
    assert grouping.covers(len(pairs)) == (len(pairs) == sum(map(len, found.values())))
    if grouping.used:
        jobs = grouping.jobs(grouping.used, np.zeros((len(found), 4), dtype=np.int64))
        assert jobs.levels.tolist() == [grouping.bits_of(group) for group in grouping.used]
        assert jobs.places.tolist() == [place for places in found.values() for place in places]
    for expert in range(EXPERTS):
        mine = [place // per_row for place, one in enumerate(pairs) if one[0] == expert and one[1] > 0]
        assert sorted(grouping.rows_of_expert(expert).tolist()) == mine


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**16))
def test_every_place_of_every_used_expert_is_in_one_job(rows: int, per_row: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    index_TK = chance.integers(0, EXPERTS + 2, (rows, per_row))  # EXPERTS and above: no expert
    grouping = Grouping(index_TK, EXPERTS, bits=(3,))
    flat = index_TK.ravel()
    assert sorted(grouping.used) == sorted(set(flat[flat < EXPERTS].tolist()))
    assert grouping.covers(flat.size) == bool((flat < EXPERTS).all())
    counts = [int((flat == expert).sum()) for expert in grouping.used]
    assert rows == 1 or counts == sorted(counts, reverse=True)
    if not grouping.used:
        return
    arrived = chance.permutation(grouping.used).tolist()
    jobs = grouping.jobs(arrived, np.zeros((len(arrived), 4), dtype=np.int64))
    assert jobs.levels.tolist() == [3] * len(arrived)
    for job, expert in enumerate(arrived):
        places = jobs.places[jobs.starts[job] : jobs.starts[job + 1]]
        assert places.tolist() == np.flatnonzero(flat == expert).tolist()
    assert (jobs.rows == jobs.places // per_row).all()
    assert {array.dtype for array in (jobs.levels, jobs.starts, jobs.rows, jobs.places)} == {np.dtype(np.int32)}


@given(st.integers(1, 40), st.integers(1, 20), st.integers(2, 70), st.integers(0, 2**16))
def test_outputs_are_added_in_ascending_k(rows: int, per_row: int, hidden: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    out_TKH = torch.randn(rows, per_row, hidden, generator=generator)
    weights_TK = torch.randn(rows, per_row, generator=generator)
    expected_TH = out_TKH[:, 0] * weights_TK[:, :1]
    for k in range(1, per_row):
        expected_TH = expected_TH + out_TKH[:, k] * weights_TK[:, k : k + 1]
    assert torch.equal(combine(out_TKH.reshape(-1, hidden), weights_TK), expected_TH)


class Module(nn.Module):
    """As much of an experts module as is looked at."""

    def __init__(self, activation: str, has_gate: bool) -> None:
        super().__init__()
        self.act_fn, self.has_gate = ACT2FN[activation], has_gate

    def _apply_gate(self, values: torch.Tensor) -> torch.Tensor:
        gate, up = values.chunk(2, dim=-1)
        activated: torch.Tensor = self.act_fn(gate) * up
        return activated


@cache
def _encoded(shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """A random matrix and its regions by level."""
    values_NK = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 8
    return values_NK, make_encoding("nested").encode(values_NK, levels=LEVELS)


class Shelf:
    """One layer of quantised experts with biases on disk, and its experts function."""

    def __init__(self, folder: Path, module: Module, level: int) -> None:
        up = "gate_up_proj" if module.has_gate else "up_proj"
        outputs = 2 * WIDTH if module.has_gate else WIDTH
        params = (
            ExpertParam(up, (outputs, HIDDEN), False),
            ExpertParam(f"{up}_bias", (outputs,), False),
            ExpertParam("down_proj", (HIDDEN, WIDTH), False),
            ExpertParam("down_proj_bias", (HIDDEN,), False),
        )
        layout = quantised_layout(params, "nested", LEVELS)
        self.values: list[dict[str, torch.Tensor]] = []
        self._extents: dict[PlaneKey, PlaneExtent] = {}
        with (folder / "planes").open("wb") as file:
            for expert in range(EXPERTS):
                self._write(file, folder / "planes", layout, params, expert, level)
        layout = cut(layout, level)
        sizes = [plane.nbytes for plane in layout.planes]
        extent = 8 * max(sizes)
        self.buffer = HostBuffer(4 * extent)
        self.engine = TransferEngine()
        planes = PlaneCache(
            arena=Arena(4 * extent, extent, sizes),
            buffer=self.buffer,
            engine=self.engine,
            policy=LRU(),
            locate=self._extents.__getitem__,
        )
        self.layer = packed_layer(
            make_kernels("cpu", threads=2),
            module,
            layout,
            self.buffer.tensor,
            level=level,
            experts=EXPERTS,
        )
        chains = [tuple((0, expert, plane) for plane in range(len(sizes))) for expert in range(EXPERTS)]
        self.experts = RoutedExperts(planes, [self.layer], [chains], level=level, arena=self.buffer.tensor.data_ptr())

    def _write(
        self, file: object, path: Path, layout: Layout, params: Sequence[ExpertParam], expert: int, level: int
    ) -> None:
        encoding = make_encoding("nested")
        original: dict[str, torch.Tensor] = {}
        regions: dict[str, dict[int, torch.Tensor]] = {}
        for param in params:
            if len(param.shape) == 2:
                original[param.name], regions[param.name] = _encoded(param.shape, expert)
            else:
                original[param.name] = torch.randn(param.shape, generator=torch.Generator().manual_seed(expert)) / 8
        decoded = dict(original)
        for name, by_level in regions.items():
            used = [by_level[one] for one in LEVELS if one <= level]
            decoded[name] = encoding.decode(used, *original[name].shape, level)
        self.values.append(decoded)
        for number, plane in enumerate(layout.planes):
            content = torch.zeros(plane.nbytes, dtype=torch.uint8)
            for tensor in plane.tensors:
                piece = regions[tensor.name][plane.level] if tensor.name in regions else original[tensor.name]
                content[tensor.offset : tensor.offset + tensor.nbytes] = piece.contiguous().view(torch.uint8)
            data = content.numpy().tobytes()
            offset = file.tell()  # type: ignore[attr-defined]
            file.write(data)  # type: ignore[attr-defined]
            self._extents[(0, expert, number)] = PlaneExtent(path, offset, len(data), xxhash.xxh3_64_intdigest(data))

    def expected(self, module: Module, row_H: torch.Tensor, expert: int) -> torch.Tensor:
        values = self.values[expert]
        up = "gate_up_proj" if module.has_gate else "up_proj"
        up_G = F.linear(row_H, values[up], values[f"{up}_bias"])
        activated_I = module._apply_gate(up_G) if module.has_gate else module.act_fn(up_G)
        return F.linear(activated_I, values["down_proj"], values["down_proj_bias"])

    def close(self) -> None:
        self.engine.close()


@pytest.fixture
def said_before() -> Iterator[None]:
    room._said.clear()
    yield
    room._said.clear()


@pytest.mark.parametrize("level", [2, 4, 8])
@pytest.mark.parametrize(
    ("activation", "has_gate", "known"),
    [("relu2", False, True), ("silu", True, True), ("mish", True, False), ("mish", False, False)],
)
@pytest.mark.usefixtures("said_before")
def test_a_layer_computes_its_decoded_experts(
    tmp_path: Path, activation: str, has_gate: bool, known: bool, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """With and without a gate, with activations that kernels know and ones that only the module does."""
    module = Module(activation, has_gate)
    shelf = Shelf(tmp_path, module, level)
    assert isinstance(shelf.layer, PackedExperts if known else PackedExpertsWithModule)
    assert caplog.text.count("do not know the activation of Module") == (not known)
    generator = torch.Generator().manual_seed(1)
    hidden_TH = torch.randn(7, HIDDEN, generator=generator)
    weights_TK = torch.rand(7, 2, generator=generator)
    index_TK = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(7)])
    index_TK[3, 1] = EXPERTS  # no expert
    actual_TH = shelf.experts(0, hidden_TH, index_TK, weights_TK, lambda _rows: frozenset())
    for row in range(7):
        expected_H = torch.zeros(HIDDEN)
        for k in range(2):
            if index_TK[row, k] < EXPERTS:
                expected_H += weights_TK[row, k] * shelf.expected(module, hidden_TH[row], int(index_TK[row, k]))
        assert (actual_TH[row] - expected_H).norm() <= 0.04 * expected_H.norm()
        alone_TH = shelf.experts(0, hidden_TH[row : row + 1], index_TK[row : row + 1], weights_TK[row : row + 1], set)  # type: ignore[arg-type]
        assert torch.equal(alone_TH[0], actual_TH[row]), "the neighbours change a row"
    shelf.close()


def test_a_row_goes_past_the_cache_only_while_nothing_has_been_dropped(tmp_path: Path) -> None:
    """One row at a time, its planes there, then dropped, then there again."""
    shelf = Shelf(tmp_path, Module("silu", True), 4)
    planes, generator = shelf.experts.planes, torch.Generator().manual_seed(2)
    hidden_1H, weights_1K = torch.randn(1, HIDDEN, generator=generator), torch.rand(1, 2, generator=generator)
    index_1K = torch.tensor([[EXPERTS - 1, 0]])

    def run() -> torch.Tensor:
        return shelf.experts(0, hidden_1H, index_1K, weights_1K, lambda _rows: frozenset())

    first = run()
    assert (planes.stats.hits, planes.stats.misses) == (0, 2)
    assert torch.equal(run(), first)
    assert (planes.stats.hits, planes.stats.misses) == (2, 2)
    planes.clear()
    shelf.buffer.tensor.zero_()  # what lay there is gone
    assert torch.equal(run(), first)
    assert (planes.stats.hits, planes.stats.misses) == (2, 4)
    assert torch.equal(run(), first)
    assert (planes.stats.hits, planes.stats.misses) == (4, 4)
    assert shelf.experts.counts_LE[0].tolist() == [4, *[0] * (EXPERTS - 2), 4]
    shelf.close()


@pytest.mark.usefixtures("said_before")
def test_the_slower_way_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with caplog.at_level(logging.WARNING):
            Shelf(tmp_path / name, Module("mish", True), 2).close()
    assert caplog.text.count("which is slower") == 1
