"""Sequences side by side give what each gives alone, in every family."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from families import FAMILIES, save_checkpoint
from moestro.calibration.expert import ExpertMath, ExpertRows
from moestro.calibration.stream import LayerRows, SequenceStream
from moestro.hf.skeleton import build_skeleton, load_config
from moestro.kernels import make_kernels
from moestro.quant import make_encoding
from moestro.runtime.dense import place_dense
from moestro.runtime.probe import probe

_NONE = torch.empty(0)


class _Streamed:
    """A random model of a family, and a stream of three sequences through it."""

    def __init__(self, family: str, folder: Path) -> None:
        self.model = save_checkpoint(family, folder)
        self.state = self.model.state_dict()
        self.skeleton = build_skeleton(load_config(folder))
        probe(self.skeleton, rows=2, history=2, logit_rows=1)
        self.kernels = make_kernels("auto", threads=2)
        place_dense(self.skeleton.model, {name: self.state[name] for name in self.skeleton.dense}, self.kernels)
        generator = torch.Generator().manual_seed(0)
        self.sequences = [torch.randint(3, 160, (size,), generator=generator).tolist() for size in (40, 8, 33)]
        self.stream = SequenceStream(self.skeleton, self.kernels, self.sequences, frozenset({0, 1, 2}))
        self.calls: list[tuple[int, list[int]]] = []

    def process(self, layer: int, rows: list[LayerRows]) -> list[torch.Tensor]:
        self.calls.append((layer, [len(one.hidden_TH) for one in rows]))
        return [self._outputs(layer, one) for one in rows]

    def _outputs(self, layer: int, rows: LayerRows) -> torch.Tensor:
        entry = self.skeleton.expert_layers[layer]
        math = ExpertMath(self.stream.modules[layer], make_encoding("nested"), (2,), rows.hidden_TH)
        output_TH = torch.zeros_like(rows.hidden_TH)
        for expert in range(entry.num_experts):
            own = {p.name: self.state[f"{entry.module}.{p.name}"][expert] for p in entry.params}
            weights = {p.name: (own[p.name].t() if p.transposed else own[p.name]).contiguous() for p in entry.params}
            tokens, choices = (rows.index_TK == expert).nonzero(as_tuple=True)
            nothing = rows.hidden_TH[:0]
            wanted = ExpertRows(nothing, _NONE, rows.hidden_TH[tokens], nothing)
            result = math.work(weights, wanted, {}).raw_TH
            output_TH[tokens] += result * rows.weights_TK[tokens, choices].unsqueeze(1)
        return output_TH


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    case = _Streamed(family, tmp_path)
    found: dict[int, torch.Tensor] = {}
    with torch.inference_mode():
        case.stream.run(case.process, found.__setitem__)
        for index, token_ids in enumerate(case.sequences):
            wanted = case.model(torch.tensor([token_ids])).logits[0]
            torch.testing.assert_close(found[index], wanted, rtol=0, atol=1e-4)
    layers = len(case.skeleton.expert_layers)
    assert case.calls == [(layer, [40, 8, 33]) for layer in range(layers)]
    assert list(found) == [0, 1, 2]


def test_an_error_in_a_layer_ends_all_threads(tmp_path: Path) -> None:
    case = _Streamed("mixtral", tmp_path)
    before = threading.active_count()

    def fail(layer: int, rows: list[LayerRows]) -> list[torch.Tensor]:
        if layer == 1:
            assert threading.active_count() == before + 3
            raise KeyError("layer 1")
        return case.process(layer, rows)

    with torch.inference_mode(), pytest.raises(KeyError, match="layer 1"):
        case.stream.run(fail, lambda *_: None)
    assert threading.active_count() == before


def test_an_error_in_a_sequence_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    case = _Streamed("mixtral", tmp_path)
    before = threading.active_count()
    wrong_shape = lambda _, rows: [torch.zeros(3, 3) for _ in rows]  # noqa: E731
    with torch.inference_mode(), pytest.raises(RuntimeError, match="size"):
        case.stream.run(wrong_shape, lambda *_: None)
    assert threading.active_count() == before
