"""Fine-tunes in the compiled decoder: right, and a row's own bits whatever runs beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moestro import _native
from moestro.kernels.cpu import CpuKernels
from moestro.kernels.shapes import native_delta
from packed_matrices import ExpertDeltas, Source, expert_deltas, filled_delta
from runtime.native.decoders import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    MATRICES,
    PICKS,
    VOCABULARY,
    Changed,
    Dense,
    Model,
    random_change,
    random_dense,
    random_expert_set,
)

SOURCE = Source(1)
DENSE, EXPERT_SET = random_dense(SOURCE), random_expert_set(SOURCE)
CHANGES = [random_change(SOURCE, EXPERT_SET, bits=bits) for bits in (2, 1, 4)]
TOKENS = [[3, 7, 1], [5], [9, 9, 30, 2, 11, 12], [4, 4], [39, 0, 8]]
SLOTS = [None, 0, 2, 5, 5]
"""Of each sequence; slots 0, 2 and 5 hold the three fine-tunes."""

kernels = CpuKernels(threads=2)


def model(bits: int = 16, **options: Any) -> Model:
    made = Model(DENSE, EXPERT_SET, bits=bits, **options)
    for slot, changed in zip((0, 2, 5), CHANGES, strict=True):
        made.set_variant(slot, changed)
    return made


@pytest.mark.parametrize("bits", [16, 8])
def test_rows_of_a_fine_tune_have_their_own_bits(bits: int) -> None:
    """A step of many, then one that goes on with it, against each sequence alone; in any order of logits."""
    mixed, alone = model(bits), model(bits)
    outputs_SV = mixed.step(TOKENS, SLOTS)
    later_SV = mixed.step([[6]] * len(TOKENS), SLOTS, [len(each) for each in TOKENS])
    first = 0
    for number, (tokens, slot) in enumerate(zip(TOKENS, SLOTS, strict=True)):
        own_SV = alone.step([tokens], [slot], sequences=[number])
        assert torch.equal(outputs_SV[first : first + len(tokens)], own_SV)
        assert torch.equal(later_SV[number], alone.step([[6]], [slot], [len(tokens)], [number])[0])
        first += len(tokens)
    rows = mixed.begin(TOKENS, SLOTS)
    assert mixed.decoder.run(0) == LAYERS
    assert torch.equal(mixed.logits(range(rows)[::-1]), outputs_SV.flip(0))
    assert torch.equal(mixed.logits([4, 3, 4, 14]), outputs_SV[[4, 3, 4, 14]])


def test_the_base_is_not_touched() -> None:
    with_variants, base = model(), Model(DENSE, EXPERT_SET)
    outputs_SV = with_variants.step(TOKENS, SLOTS)
    expected_SV = base.step(TOKENS, [None] * len(TOKENS))
    assert torch.equal(outputs_SV[:3], expected_SV[:3])
    assert bool((outputs_SV[3:] != expected_SV[3:]).any(-1).all())


def test_bits_do_not_depend_on_instructions_or_threads() -> None:
    made, isa, threads = model(), _native.get_isa(), _native.get_threads()
    expected_SV = made.step(TOKENS, SLOTS)
    try:
        for each in _native.available_isas():
            for count in (1, 2, 5):
                _native.set_isa(each)
                _native.set_threads(count)
                assert torch.equal(made.step(TOKENS, SLOTS), expected_SV), (each, count)
    finally:
        _native.set_isa(isa)
        _native.set_threads(threads)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


PARTS = ["embedding", "head", *(f"1.{name}" for name in MATRICES)]


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("name", PARTS)
def test_a_delta_is_as_if_the_matrix_were_another(name: str, bits: int) -> None:
    """Near a decoder with the sum as its matrix (activations are quantised here), and far from the base."""
    rows, columns = DENSE[name].shape
    biased = name not in ("embedding", "head")
    delta = filled_delta(Source(3), rows, columns, bits=2, salient=5, size=0.7, biased=biased)
    changed: Dense = {name: DENSE[name] + kernels.unpack_delta(delta.region, delta.address)}
    if biased:
        difference_N = delta.bytes[delta.region.bias_at :].view(torch.float32)[:rows]
        changed[f"{name}.bias"] = DENSE[f"{name}.bias"] + difference_N
    made = Model(DENSE, EXPERT_SET, bits=bits)
    made.set_variant(1, Changed(deltas={name: delta}))
    slots = [1] * len(TOKENS)
    outputs_SV, base_SV = made.step(TOKENS, slots), made.step(TOKENS, [None] * len(TOKENS))
    expected_SV = Model(DENSE | changed, EXPERT_SET, bits=bits).step(TOKENS, slots, runs=[])
    assert distance(outputs_SV, expected_SV) < 0.1 * distance(base_SV, expected_SV) + 0.01, name
    assert distance(base_SV, expected_SV) > 0.05, name


@pytest.mark.parametrize(
    "name",
    [*PARTS, "norm", "1.sinks", *(f"1.{norm}" for norm in ("input_norm", "post_norm", "q_norm", "k_norm"))],
)
def test_a_replacement_is_as_if_the_tensor_were_another(name: str) -> None:
    """To the bit."""
    other = random_dense(Source(4))
    replaced = {key: other[key] for key in (name, f"{name}.bias") if key in other}
    made = Model(DENSE, EXPERT_SET)
    made.set_variant(1, Changed(replaced=replaced))
    outputs_SV = made.step(TOKENS, [None, 1, 1, None, 1])
    expected_SV = Model(DENSE | replaced, EXPERT_SET).step(TOKENS, [None] * len(TOKENS))
    base_SV = made.step(TOKENS, [None] * len(TOKENS))
    own = [row for row, slot in enumerate([None] * 3 + [1] * 7 + [None] * 2 + [1] * 3) if slot == 1]
    others = [row for row in range(15) if row not in own]
    assert torch.equal(outputs_SV[own], expected_SV[own])
    assert torch.equal(outputs_SV[others], base_SV[others])
    # A sequence of one row attends to nothing but itself, whatever its query.
    assert bool((outputs_SV[own[1:]] != base_SV[own[1:]]).any())


def deltas_of(starts: np.ndarray, experts: np.ndarray, of_rows: np.ndarray) -> ExpertDeltas:
    tunes = [changed.experts for changed in CHANGES]
    placed = []
    for job in range(len(starts) - 1):
        for tune in range(len(tunes)):
            own = np.flatnonzero(of_rows[starts[job] : starts[job + 1]] == tune) + starts[job]
            if experts[job] != 0 and len(own):  # expert 0 has not changed
                placed.append((job, int(own[0]), int(own[-1]) + 1, tune))
    return expert_deltas([tune for tune in tunes if tune is not None], placed)


def test_known_experts_have_the_bits_of_experts_one_by_one() -> None:
    """The decoder that comes back for its experts is given what `Kernels.experts` says."""
    known, asking = model(), model(known=False)
    rows = asking.begin(TOKENS, SLOTS)
    of_row = np.repeat([-1, 0, 1, 2, 2], [len(each) for each in TOKENS])
    delta = 0
    for layer in range(LAYERS):
        assert asking.decoder.run(delta) == layer
        ids_TK = asking._ids.view(-1)[layer * rows * PICKS :][: rows * PICKS].view(rows, PICKS)
        weights_TK = asking._weights[layer * rows * PICKS :][: rows * PICKS].view(rows, PICKS).contiguous()
        assert (ids_TK.sort(1).values == torch.arange(EXPERTS)).all()
        places = [
            int((ids_TK[row] == expert).nonzero()) + row * PICKS for expert in range(EXPERTS) for row in range(rows)
        ]
        jobs = EXPERT_SET.jobs([4] * EXPERTS, [list(range(rows))] * EXPERTS, places)
        out_PH, sum_TH = torch.empty(rows * PICKS, HIDDEN), torch.empty(rows, HIDDEN)
        deltas = deltas_of(jobs.starts, np.arange(EXPERTS), np.tile(of_row, EXPERTS))
        kernels.experts(EXPERT_SET.spec, jobs, asking.hidden[:rows], out_PH, deltas)
        _native.combine(out_PH.data_ptr(), weights_TK.data_ptr(), sum_TH.data_ptr(), rows, PICKS, HIDDEN)
        delta = asking.at(sum_TH)
    assert asking.decoder.run(delta) == LAYERS
    assert torch.equal(asking.logits(range(rows)), known.step(TOKENS, SLOTS))


def test_a_delta_that_is_not_known_stops_the_step() -> None:
    made, known = model(), model()._experts_known[1]
    addresses_E = np.full(EXPERTS, -1, dtype=np.int64)
    addresses_E[3] = 0
    made.decoder.know(1, known)
    known.set_deltas(2, _native.make_expert_delta(None, None, 0, 0), addresses_E.ctypes.data)
    made.begin(TOKENS, SLOTS)
    assert made.decoder.run(0) == 1
    made.begin([TOKENS[0], TOKENS[3]], [None, 5])
    assert made.decoder.run(0) == LAYERS, "no row is of that fine-tune"
    known.set_deltas(5, None, 0)
    made.begin([TOKENS[0], TOKENS[3]], [None, 5])
    assert made.decoder.run(0) == 1


def test_variant_ids_look_up_the_embeddings_that_change() -> None:
    """The base's table holds a few rows of the vocabulary, in another order."""
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))
    shuffled, made = Model(DENSE | {"embedding": DENSE["embedding"][order]}, EXPERT_SET), Model(DENSE, EXPERT_SET)
    for each in (shuffled, made):
        each.set_variant(1, Changed(deltas={"embedding": CHANGES[0].deltas["embedding"]}))
    ids = torch.tensor([token for tokens in TOKENS for token in tokens])
    places = [[int(order.argsort()[token]) for token in tokens] for tokens in TOKENS]
    slots = [1, None, 1, 1, None]
    outputs_SV = shuffled.step(places, slots, variant_ids=ids.data_ptr())
    assert torch.equal(outputs_SV, made.step(TOKENS, slots))
    ids[2] = VOCABULARY
    with pytest.raises(ValueError, match="token 40 of a variant does not exist"):
        shuffled.begin(places, slots, variant_ids=ids.data_ptr())


def test_an_emptied_slot_is_empty_and_ends_the_step() -> None:
    made = model()
    before_SV = made.step(TOKENS, SLOTS)
    made.decoder.set_variant(2, None)
    with pytest.raises(ValueError, match="row that is not there"):
        made.logits([0])
    with pytest.raises(ValueError, match="no variant in slot 2"):
        made.begin(TOKENS, SLOTS)
    made.set_variant(2, CHANGES[1])
    assert torch.equal(made.step(TOKENS, SLOTS), before_SV)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(0, 3, 4), (2, 3, 10)], "not ascending runs"),
        ([(0, 4, 4)], "not ascending runs"),
        ([(0, -1, 3)], "not ascending runs"),
        ([(0, 12, 16)], "not ascending runs"),
        ([(0, 3, 5)], "a sequence is of two variants"),
        ([(0, 5, 10)], "a sequence is of two variants"),
        ([(1, 3, 4)], "no variant in slot 1"),
    ],
)
def test_wrong_runs_are_refused(runs: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model().begin(TOKENS, SLOTS, runs=runs)


def wrong_variants(made: Model) -> dict[str, _native.Variant]:
    def delta(rows: int, columns: int) -> _native.Delta:
        packed = made._keep(filled_delta(Source(5), rows, columns, bits=2, salient=0, size=1.0))
        return _native.Delta(native_delta(packed.region), packed.address)

    def variant(layers: int = LAYERS, **changes: Any) -> _native.Variant:
        made_of, layer = _native.Variant(), _native.VariantLayer()
        for name, value in changes.items():
            setattr(made_of if name in ("embedding", "head", "norm") else layer, name, value)
        for _ in range(layers):
            made_of.add(layer)
        return made_of

    flat = _native.Weight(kind=3, data=made.at(torch.zeros(9999)), outputs=64, inputs=64, group=64, bias=0)
    return {
        "another number of layers": variant(layers=1),
        "q has another shape": variant(q=delta(32, HIDDEN)),
        "gate has another shape": variant(gate=made.weight({"w": torch.ones(3, HIDDEN)}, "w")),
        "q is replaced by a matrix that is none": variant(q=flat),
        "head has another shape": variant(head=delta(VOCABULARY + 1, HIDDEN)),
        "embedding has another width": variant(embedding=delta(VOCABULARY, 32)),
        "k_norm has another width": variant(k_norm=made.norm(torch.ones(8))),
    }


def test_changes_that_do_not_fit_are_refused() -> None:
    made = model()
    before_SV = made.step(TOKENS, SLOTS)
    for message, wrong in wrong_variants(made).items():
        with pytest.raises(ValueError, match=message):
            made.decoder.set_variant(2, wrong)
    assert torch.equal(made.step(TOKENS, SLOTS), before_SV)
