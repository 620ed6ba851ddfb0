"""What errors of a layer's experts do to the model's choice of the next token, to second order.

The divergence of a model whose layer makes errors e in its outputs from the one that makes none is about half the mean
of (g e)^2, g the gradient of the log probability of tokens drawn from the model itself (the Fisher information). The
mean of g g^T over rows is the layer's metric: in some directions an error costs many times what it costs in others.

Pieces of the calibration text go, a few together, through the original model, then back. Experts' activations are not
kept: they are computed again on the way back, so that one expert at a time is in memory.

Memory, beside the dense weights in fp32: of one batch for each worker, what transformers' layers keep for the way back.

Shapes: B sequences of N tokens, T rows of all of them, H hidden, K experts per row, R rows of an expert, G = 2I where
gate and up are one matrix, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock, local
from typing import Any

import torch
from torch.nn import functional

from moestro.calibration.scratch import LayerScratch
from moestro.errors import PackError
from moestro.hf.skeleton import build_skeleton, config_from_dict, is_experts_module
from moestro.quant.hessian import gram
from moestro.runtime.dense import put_tensors
from moestro.runtime.expert_mlp import activate
from moestro.store.expert_work import ExpertWork
from moestro.store.workers import in_order

PIECE = 256
"""Tokens of one sequence that are used."""

BATCH = 4
"""Sequences that go through the model together: experts are read twice for each batch."""

ROWS = 8192
"""Most tokens that metrics are the mean of."""


def kept_metrics(work: ExpertWork, sequences: Sequence[Sequence[int]], identity: str) -> list[torch.Tensor]:
    """As `output_metrics`, or what an interrupted calibration of this identity has kept of them."""
    scratch = LayerScratch(work.scratch / "metrics", identity)
    layers, width = len(work.plan.layers), int(work.plan.skeleton.config.hidden_size)
    kept = scratch.load(0, [torch.Size((width, width))] * layers)
    if kept is None:
        kept = output_metrics(work, sequences)
        work.scratch.mkdir(exist_ok=True)
        scratch.save(0, kept)
    return kept


def output_metrics(work: ExpertWork, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The metric [H, H] of each layer of experts, from pieces of these sequences.

    Raises:
        PackError: the model's states or gradients are not numbers.
    """
    model = _GradientModel(work)
    batches = cut_batches(sequences)
    sums = [torch.zeros((model.width, model.width)) for _ in range(model.layers)]
    work.say("looking at what errors do")
    jobs = [partial(model.metrics, number, ids_BN) for number, ids_BN in enumerate(batches)]
    for number, found in enumerate(in_order(jobs), start=1):
        work.say(f"looking at what errors do, {number} of {len(jobs)} pieces of text")
        for total_HH, one_HH in zip(sums, found, strict=True):
            total_HH += one_HH
    rows = sum(ids_BN.numel() for ids_BN in batches)
    for layer, total_HH in enumerate(sums):
        if not bool(total_HH.isfinite().all()):
            raise not_numbers(f"gradients in MoE layer {layer}")
        total_HH /= rows
    return sums


def cut_batches(sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The beginnings of sequences [B, N], those of one length that follow each other together."""
    pieces = [sequence[:PIECE] for sequence in sequences[: max(1, ROWS // PIECE)]]
    batches: list[list[Sequence[int]]] = []
    for piece in pieces:
        if not batches or len(batches[-1]) == BATCH or len(batches[-1][0]) != len(piece):
            batches.append([])
        batches[-1].append(piece)
    return [torch.tensor(batch) for batch in batches]


def not_numbers(what: str) -> PackError:
    """The error for values of the model that are NaN or infinite."""
    return PackError(
        f"The model's {what} are not numbers: fp32 cannot hold them, or the checkpoint is damaged. Download or copy it "
        "again, or pack with --no-calibration."
    )


class _GradientModel:
    """The original model, whose experts are read when they are needed. Several threads may run it at once."""

    def __init__(self, work: ExpertWork) -> None:
        self._work, self._reading = work, Lock()
        skeleton = build_skeleton(config_from_dict(work.plan.model))
        self._model: Any = skeleton.model
        self._model.set_attn_implementation("eager")
        put_tensors(self._model, {name: _own(tensor) for name, tensor in work.raw_dense()})
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        modules = [module for module in self._model.modules() if is_experts_module(module)]
        self._thread = local()
        for layer, module in enumerate(modules):
            module.forward = partial(self._experts, _Layer(layer, module, partial(self._weights, layer)))
        self.layers, self.width = len(modules), int(skeleton.config.hidden_size)

    def metrics(self, seed: int, ids_BN: torch.Tensor) -> list[torch.Tensor]:
        """Of every layer the sum over rows of g g^T, [H, H], tokens drawn with this seed."""
        self._thread.found = []
        with torch.inference_mode(mode=False), torch.enable_grad():
            # What reaches the first layer has no gradient of its own, and the way back has to come there.
            self._thread.anchor = torch.zeros((), requires_grad=True)
            logits_TV = self._model(input_ids=ids_BN, use_cache=False).logits.flatten(0, 1).float()
            if not bool(logits_TV.isfinite().all()):
                raise not_numbers("logits")
            log_TV = logits_TV.log_softmax(-1)
            generator = torch.Generator().manual_seed(seed)
            drawn_T1 = torch.multinomial(log_TV.detach().exp(), 1, generator=generator)
            torch.autograd.backward(log_TV.gather(1, drawn_T1).sum())
        found: list[torch.Tensor] = self._thread.found[::-1]
        return found

    def _weights(self, layer: int, expert: int) -> Mapping[str, torch.Tensor]:
        with self._reading:
            return self._work.weights(layer, expert)

    def _experts(
        self, layer: _Layer, hidden: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        thread = self._thread
        output_TH: torch.Tensor = _Routed.apply(  # type: ignore[no-untyped-call]
            thread.anchor, layer, thread.found, hidden_TH, index_TK, weights_TK.float()
        )
        return output_TH.view_as(hidden)


@dataclass(frozen=True)
class _Layer:
    """transformers' module of a layer's experts, and where their parameters come from."""

    number: int
    module: Any
    weights: Callable[[int], Mapping[str, torch.Tensor]]

    def parts(self, index_TK: torch.Tensor) -> Iterator[tuple[Mapping[str, torch.Tensor], torch.Tensor, torch.Tensor]]:
        """The experts that rows are routed to: their parameters, their rows and the places in these rows' choices."""
        for expert in sorted(set(index_TK.flatten().tolist())):
            rows_R, places_R = (index_TK == expert).nonzero(as_tuple=True)
            yield self.weights(expert), rows_R, places_R

    def output(self, weights: Mapping[str, torch.Tensor], hidden_RH: torch.Tensor) -> torch.Tensor:
        """One expert's output, not weighted."""
        up = "gate_up_proj" if self.module.has_gate else "up_proj"
        up_RG = functional.linear(hidden_RH, weights[up], weights.get(f"{up}_bias"))
        activated_RI = activate(self.module, up_RG)
        return functional.linear(activated_RI, weights["down_proj"], weights.get("down_proj_bias"))


class _Routed(torch.autograd.Function):
    """A layer's experts, computed without a trace and again on the way back; `found` gets g^T g of the outputs."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,  # noqa: ARG004
        layer: _Layer,
        found: list[torch.Tensor],
        hidden_TH: torch.Tensor,
        index_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        if not bool(hidden_TH.isfinite().all()):
            raise not_numbers(f"hidden states in MoE layer {layer.number}")
        ctx.layer, ctx.found = layer, found
        ctx.save_for_backward(hidden_TH, index_TK, weights_TK)
        output_TH = torch.zeros_like(hidden_TH)
        for weights, rows_R, places_R in layer.parts(index_TK):
            output_TH[rows_R] += layer.output(weights, hidden_TH[rows_R]) * weights_TK[rows_R, places_R, None]
        return output_TH

    @staticmethod
    def backward(ctx: Any, gradient_TH: torch.Tensor) -> Any:
        hidden_TH, index_TK, weights_TK = ctx.saved_tensors
        ctx.found.append(gram(gradient_TH))
        to_hidden_TH, to_weights_TK = torch.zeros_like(hidden_TH), torch.zeros_like(weights_TK)
        if any(ctx.needs_input_grad[3:]):
            for weights, rows_R, places_R in ctx.layer.parts(index_TK):
                with torch.enable_grad():
                    hidden_RH = hidden_TH[rows_R].requires_grad_(True)
                    output_RH = ctx.layer.output(weights, hidden_RH)
                back_RH = gradient_TH[rows_R]
                to_weights_TK[rows_R, places_R] = (output_RH.detach() * back_RH).sum(-1)
                (part_RH,) = torch.autograd.grad(output_RH, hidden_RH, back_RH * weights_TK[rows_R, places_R, None])
                to_hidden_TH[rows_R] += part_RH
        return None, None, None, to_hidden_TH, None, to_weights_TK


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor.clone()
