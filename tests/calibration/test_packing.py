"""Calibrated packing: what the store says is so, and it ends with the same bytes whatever happens on the way."""

from __future__ import annotations

import logging
import random
import signal
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from calibration.checkpoints import save_with_tokenizer, write_text
from decoding import decoded_model
from families import FAMILIES
from moestro.calibration import calibrator, pack
from moestro.calibration.dense import DenseInputs
from moestro.calibration.text import TOKENS, load_tokenizer, make_windows, read_text
from moestro.config import PackOptions
from moestro.errors import CheckpointError, PackError, StoreError
from moestro.store import workers
from moestro.store.calibration_facts import CalibrationFacts
from moestro.store.checksum import checksum
from moestro.store.expert_work import ExpertWork
from moestro.store.pack import PackProgress
from moestro.store.reader import Store
from store.crash import LIMITS, pack_counting, pack_until, run
from store.reading import read_level


class Case:
    """A checkpoint with a tokenizer, a text for it, and options to calibrate on that."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = folder
        self.model: PreTrainedModel = save_with_tokenizer(family, folder / "source")
        self.text = write_text(folder / "text.txt")
        self.options = PackOptions(calibrate=str(self.text))

    def pack(self, name: str = "store", **options: Any) -> Store:
        return pack(self.folder / "source", self.folder / name, options=replace(self.options, **options))

    def edit(self, change: dict[str, Any]) -> None:
        """Replace tensors whose key contains a name by what a function makes of them."""
        path = self.folder / "source" / "model.safetensors"
        tensors = load_file(path)
        for part, function in change.items():
            found = [key for key in tensors if part in key]
            assert found, part
            for key in found:
                tensors[key] = function(tensors[key]).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case("olmoe", tmp_path)


def _facts(store: Store) -> CalibrationFacts:
    facts = store.manifest.calibration
    assert facts is not None
    return facts


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_calibrated(family: str, tmp_path: Path) -> None:
    case = Case(family, tmp_path)
    store = case.pack()
    assert store.verify() == []
    facts = _facts(store)
    assert facts.text is not None
    assert (facts.text.name, facts.text.checksum) == ("text.txt", checksum(case.text.read_bytes()))
    assert facts.tokens == 6 * 60
    assert facts.warnings == (f"calibrated on 360 tokens only, {TOKENS} are usual",)
    assert facts.sensitivity is not None
    assert len(facts.sensitivity) == len(store.layers)
    assert all(value > 0 for value in facts.sensitivity)
    for experts in facts.errors:
        for errors in experts:
            assert list(errors) == sorted(errors, reverse=True)
            assert 0 < errors[3] < 2e-3 < errors[0] < 0.6
    assert {path.name for path in store.path.iterdir()} >= {"manifest.json", "tokenizer.json"}
    assert not (store.path / "scratch").exists()


def test_sign_planes_are_calibrated_too(case: Case) -> None:
    store = case.pack(encoding="signs", levels="2,4", exact_level=2)
    assert store.verify() == []
    assert all(0 < four < 0.1 < two < 0.6 for experts in _facts(store).errors for two, four in experts)


class _Seen:
    """What the experts of transformers' own model are given: (hidden, index, weights) by layer, of all windows."""

    def __init__(self, case: Case, store: Store) -> None:
        tokenizer = load_tokenizer(case.folder / "source")
        assert tokenizer is not None
        self.windows = make_windows(read_text(str(case.text)), tokenizer, context=512, vocabulary=160)
        self.modules = [case.model.get_submodule(layer.module) for layer in store.layers]
        self.rows: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in self.modules]
        handles = [
            module.register_forward_pre_hook(lambda _, given, layer=layer: self.rows[layer].append(given))
            for layer, module in enumerate(self.modules)
        ]
        with torch.inference_mode():
            for sequence in self.windows.sequences:
                case.model(torch.tensor([sequence]))
        for handle in handles:
            handle.remove()

    def inputs(self, layer: int, expert: int) -> torch.Tensor:
        """The hidden states of the tokens routed to an expert."""
        return torch.cat([hidden[(index == expert).any(-1)] for hidden, index, _ in self.rows[layer]])


def _output(weights: dict[str, torch.Tensor], hidden_TH: torch.Tensor) -> torch.Tensor:
    gate, up = (hidden_TH @ weights["gate_up_proj"].T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ weights["down_proj"].T


def _original(case: Case, store: Store, layer: int, expert: int) -> dict[str, torch.Tensor]:
    state = case.model.state_dict()
    return {name: state[f"{store.layers[layer].module}.{name}"][expert] for name in ("gate_up_proj", "down_proj")}


def _errors(case: Case, store: Store, seen: _Seen, layer: int, expert: int) -> list[float]:
    """Relative squared errors of an expert's outputs at every level, by plain torch."""
    inputs = seen.inputs(layer, expert)
    wanted = _output(_original(case, store, layer, expert), inputs)
    found = [_output(read_level(store, layer, expert, level), inputs) for level in store.manifest.levels]
    return [float((one - wanted).square().sum() / wanted.square().sum()) for one in found]


def test_the_error_table_is_what_transformers_would_see(case: Case) -> None:
    store = case.pack()
    free = case.pack("free", calibrate="", calibration=False)
    seen = _Seen(case, store)
    better = [0, 0, 0, 0]
    for layer in range(3):
        for expert in range(8):
            stated = _facts(store).errors[layer][expert]
            assert stated == pytest.approx(_errors(case, store, seen, layer, expert), rel=1e-3)
            without = _errors(case, free, seen, layer, expert)
            better = [count + (one < other) for count, one, other in zip(better, stated, without, strict=True)]
    # The text tells more than the weights alone: at each level, for nearly every expert.
    assert min(better[:3]) >= 22


def test_sensitivity_is_what_transformers_would_see(case: Case) -> None:
    store = case.pack()
    facts = _facts(store)
    assert facts.sensitivity is not None
    short = torch.tensor([_Seen(case, store).windows.short])
    state = case.model.state_dict()
    with torch.inference_mode():
        wanted = case.model(short).logits[0].log_softmax(-1)
        for layer in store.layers:
            kept = {name: state[f"{layer.module}.{name}"].clone() for name in ("gate_up_proj", "down_proj")}
            for expert in range(layer.num_experts):
                for name, value in read_level(store, layer.layer, expert, 2).items():
                    state[f"{layer.module}.{name}"][expert] = value
            found = case.model(short).logits[0].log_softmax(-1)
            for name, value in kept.items():
                state[f"{layer.module}.{name}"].copy_(value)
            divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
            mean = sum(errors[0] for errors in facts.errors[layer.layer]) / layer.num_experts
            assert facts.sensitivity[layer.layer] == pytest.approx(float(divergence) / mean, rel=1e-2)


def test_the_lowest_promised_level_is_the_measure_of_sensitivity(case: Case) -> None:
    two, four = _facts(case.pack()), _facts(case.pack("four", levels="4,8"))
    assert two.sensitivity is not None
    assert four.sensitivity is not None
    assert len(four.errors[0][0]) == 2
    # Effects are about proportional to errors, which is what the number is for.
    for one, other in zip(two.sensitivity, four.sensitivity, strict=True):
        assert 0.3 < one / other < 3


def test_the_bytes_do_not_depend_on_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = []
    for count in (1, 3):
        torch.set_num_threads(count)
        monkeypatch.setattr(workers, "worker_count", lambda count=count: count)
        stores.append(_content(case.pack(f"store{count}").path))
        assert torch.get_num_threads() == count
    assert stores[0] == stores[1]


def test_experts_that_get_no_token_are_named(tmp_path: Path) -> None:
    case = Case("deepseek_v3", tmp_path)
    # Two experts make a group, which is chosen first.
    never = lambda bias: torch.where(torch.arange(8) // 2 == 1, -100.0, bias)  # noqa: E731
    case.edit({"e_score_correction_bias": never})
    store, free = case.pack(), case.pack("free", calibrate="", calibration=False)
    assert _facts(store).unrouted == ((0, 2), (0, 3), (1, 2), (1, 3))
    for layer in range(2):
        assert _facts(store).errors[layer][3] == _facts(free).errors[layer][3]
        assert _facts(store).errors[layer][4] != _facts(free).errors[layer][4]
        wanted = read_level(free, layer, 3, 4)
        for name, value in read_level(store, layer, 3, 4).items():
            assert torch.equal(value, wanted[name])


def test_experts_of_zeros_and_of_one_value(case: Case) -> None:
    case.edit(
        {"layers.1.mlp.experts.1.": torch.zeros_like, "layers.1.mlp.experts.2.": lambda t: torch.full_like(t, 0.5)}
    )
    store = case.pack()
    facts = _facts(store)
    assert facts.errors[1][1] == (0.0, 0.0, 0.0, 0.0)
    assert max(facts.errors[1][2]) < 1e-6
    for value in read_level(store, 1, 1, 2).values():
        assert not value.any()


def test_weights_that_are_no_numbers_are_named(case: Case) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[2, 3] = float("nan")
        return tensor

    case.edit({"layers.2.mlp.experts.5.down_proj": spoil})
    with pytest.raises(CheckpointError, match=r"Tensor model\.layers\.2\.mlp\.experts\.down_proj of expert 5 holds 1"):
        case.pack()
    assert not list(case.folder.glob("store*"))


def test_states_that_are_no_numbers_are_named(case: Case) -> None:
    case.edit({"layers.1.post_attention_layernorm": lambda tensor: torch.full_like(tensor, 3e38)})
    with pytest.raises(PackError, match=r"hidden states in MoE layer 1 are not numbers"):
        case.pack()


def test_without_a_tokenizer_it_is_said(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    (case.folder / "source" / "tokenizer.json").unlink()
    with pytest.raises(PackError, match="has no tokenizer that can be loaded"):
        case.pack()
    with caplog.at_level(logging.WARNING, logger="moestro"):
        facts = _facts(case.pack(calibrate=""))
    assert "its experts are quantised from their weights alone" in caplog.text
    assert (facts.text, facts.warnings) == (None, ("not calibrated: the checkpoint has no tokenizer",))


def test_another_text_is_another_store(case: Case) -> None:
    store = case.pack()
    assert case.pack() == store
    write_text(case.text, seed=1)
    with pytest.raises(StoreError, match=r"packed otherwise .* calibrated on text .* asked for .* calibrated on text"):
        case.pack()
    with pytest.raises(StoreError, match=r"packed otherwise .* not calibrated"):
        case.pack(calibrate="", calibration=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, dict[str, bytes], int]:
    """A case, what an undisturbed pack of it writes, and in how many calls."""
    case = Case("mixtral", tmp_path_factory.mktemp("killed"))
    case.options = replace(case.options, dense_bits=4)  # whose linear maps are written layer by layer
    report = case.folder / "calls"
    assert run(pack_counting, case.folder / "source", case.folder / "whole", report, case.options) == 0
    return case, _content(case.folder / "whole"), int(report.read_text())


@pytest.mark.parametrize("point", range(5))
def test_killed_at_a_random_point(point: int, whole: tuple[Case, dict[str, bytes], int], tmp_path: Path) -> None:
    case, content, calls = whole
    source, destination = case.folder / "source", tmp_path / "store"
    rng = random.Random(point)
    for fatal_call in (rng.randint(calls // 4, calls), rng.randint(1, calls // 2)):
        if run(pack_until, source, destination, fatal_call, case.options) == 0:
            break
    assert pack(source, destination, options=case.options, limits=LIMITS).verify() == []
    assert _content(destination) == content


def test_finished_layers_are_not_computed_again(whole: tuple[Case, dict[str, bytes], int], tmp_path: Path) -> None:
    case, content, calls = whole
    source, destination = case.folder / "source", tmp_path / "store"
    assert run(pack_until, source, destination, calls * 9 // 10, case.options) == -signal.SIGKILL
    kept = sorted(path.name for path in (tmp_path / "store.partial" / "scratch").iterdir())
    assert "layer-00000.outputs" in kept
    reports: list[PackProgress] = []
    pack(source, destination, options=case.options, progress=reports.append)
    assert reports[0].done_bytes > reports[0].total_bytes // 2
    assert "experts of layer 1 of 3" not in {report.stage for report in reports}
    assert reports[-1].done_bytes == reports[-1].total_bytes
    assert _content(destination) == content


def test_few_experts_and_one_layer_of_hessians_are_held(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    real_weights, real_take = ExpertWork.weights, DenseInputs.take
    born: list[weakref.ref[torch.Tensor]] = []
    most, taken = 0, []

    def weights(work: ExpertWork, layer: int, expert: int) -> dict[str, torch.Tensor]:
        nonlocal most
        values = real_weights(work, layer, expert)
        born.append(weakref.ref(values["down_proj"]))
        most = max(most, sum(ref() is not None for ref in born))
        return values

    def take(inputs: DenseInputs) -> dict[int, torch.Tensor]:
        taken.append(real_take(inputs))
        return dict(taken[-1])

    real_metrics = calibrator.kept_metrics

    def metrics(*arguments: Any) -> list[torch.Tensor]:
        found = real_metrics(*arguments)
        born.clear()  # it has read experts time after time
        return found

    monkeypatch.setattr(calibrator, "kept_metrics", metrics)
    monkeypatch.setattr(ExpertWork, "weights", weights)
    monkeypatch.setattr(DenseInputs, "take", take)
    store = case.pack(dense_bits=4)
    layers = len(store.layers)
    assert len(born) == sum(layer.num_experts for layer in store.layers)
    assert most <= workers.worker_count() + 3
    flat = {name for name, tensor in store.dense.items() if tensor.dtype == "flat4"}
    assert [len(hessians) for hessians in taken] == [len(flat) // layers] * layers + [0]


def test_calibrated_linear_maps_keep_their_outputs(case: Case) -> None:
    calibrated = case.pack("calibrated", dense_bits=4)
    plain = case.pack("plain", dense_bits=4, calibration=False, calibrate="")
    assert {store.dense["lm_head.weight"].dtype for store in (calibrated, plain)} == {"flat8"}
    inputs: dict[str, list[torch.Tensor]] = {}
    for name in calibrated.dense:
        if calibrated.dense[name].dtype == "flat4":
            module = case.model.get_submodule(name.removesuffix(".weight"))
            module.register_forward_pre_hook(lambda _, given, name=name: inputs.setdefault(name, []).append(given[0]))
    _Seen(case, calibrated)
    states = [decoded_model(store, 8).state_dict() for store in (calibrated, plain)]
    assert inputs
    for name, given in inputs.items():
        wanted = case.model.state_dict()[name]
        own, other = (float((torch.cat(given, dim=1) @ (wanted - state[name]).T).square().sum()) for state in states)
        assert own < 0.9 * other, name
