"""Running many sequences through a model side by side, stopping all of them at each layer of experts.

transformers runs a sequence through all layers; calibration wants all sequences in one layer, so that the layer's
experts are read once and its activations are the only ones kept. Each sequence therefore runs in a thread of its own
and waits at every call of the experts until all have come there. Exactly one thread runs at a time, in a fixed order:
threads serve as coroutines here, not for speed.

Shapes: T rows of a sequence, H hidden or heads, D key width, V vocabulary, K experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moestro.hf.skeleton import Skeleton, is_experts_module
from moestro.kernels.base import Kernels
from moestro.runtime import hooks
from moestro.runtime.cache import HookedCache
from moestro.runtime.context import AttentionCall, forward_pass
from moestro.runtime.narrow import plain


@dataclass(frozen=True)
class LayerRows:
    """What one sequence brings to a layer: hidden states, chosen experts and their weights."""

    hidden_TH: torch.Tensor
    index_TK: torch.Tensor
    weights_TK: torch.Tensor


class SequenceStream:
    """All `sequences` of token ids through the model, whose dense weights have been placed.

    Sequences whose index is in `with_logits` compute logits of all their rows, the others of none that are kept.
    """

    def __init__(
        self, skeleton: Skeleton, kernels: Kernels, sequences: Sequence[Sequence[int]], with_logits: frozenset[int]
    ) -> None:
        hooks.install(skeleton.model)
        modules = [module for module in skeleton.model.modules() if is_experts_module(module)]
        self.modules: tuple[nn.Module, ...] = tuple(modules)
        self._runs = [
            _Run(skeleton, kernels, modules, token_ids, all_logits=index in with_logits)
            for index, token_ids in enumerate(sequences)
        ]

    def run(
        self,
        process: Callable[[int, list[LayerRows]], list[torch.Tensor]],
        finish: Callable[[int, torch.Tensor], None],
    ) -> None:
        """Call `process(layer, rows of every sequence)` for each layer of experts in turn; it returns the outputs
        [T, H] of every sequence. In the end, `finish(sequence, logits [T, V])` for each in turn."""
        try:
            outputs: list[torch.Tensor | None] = [None] * len(self._runs)
            for layer in range(len(self.modules)):
                rows = [run.to_layer(layer, output) for run, output in zip(self._runs, outputs, strict=True)]
                outputs = list(process(layer, rows))
            for index, run in enumerate(self._runs):
                finish(index, run.to_end(outputs[index]))
                outputs[index] = None
        finally:
            for run in self._runs:
                run.stop()


class _Stopped(BaseException):
    """Unwinds the thread of a sequence that nobody wants to go on."""


class _Run:
    """One sequence: the `ForwardContext` of its thread, and the baton between that thread and its owner."""

    def __init__(
        self,
        skeleton: Skeleton,
        kernels: Kernels,
        modules: list[nn.Module],
        token_ids: Sequence[int],
        *,
        all_logits: bool,
    ) -> None:
        self._model: Any = skeleton.model
        self._kernels = kernels
        self._layer_of = {id(module): layer for layer, module in enumerate(modules)}
        self._cache = HookedCache(skeleton.config.model_type, lambda keys, values, _: (keys, values))
        self._token_ids_T = torch.tensor(token_ids)
        self._positions_T = torch.arange(len(token_ids))
        self._all_logits = all_logits
        self._go, self._came = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._stopped = False
        self._layer = -1
        self._rows: LayerRows | None = None
        self._output_TH: torch.Tensor | None = None
        self._logits_TV: torch.Tensor | None = None
        self._error: BaseException | None = None

    def to_layer(self, layer: int, output_TH: torch.Tensor | None) -> LayerRows:
        """Run until the experts of `layer`; `output_TH` is that of the layer before."""
        self._resume(output_TH)
        assert self._layer == layer, "layers of experts run out of order"
        rows, self._rows = self._rows, None
        assert rows is not None
        return rows

    def to_end(self, output_TH: torch.Tensor | None) -> torch.Tensor:
        """Run to the end and give the logits."""
        self._resume(output_TH)
        logits_TV, self._logits_TV = self._logits_TV, None
        assert logits_TV is not None, "a layer of experts ran twice"
        return logits_TV

    def stop(self) -> None:
        """End the thread, wherever it is."""
        self._stopped = True
        if self._thread.is_alive():
            self._go.release()
            self._thread.join()

    def _resume(self, output_TH: torch.Tensor | None) -> None:
        self._output_TH = output_TH
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._came.acquire()
        if self._error is not None:
            raise self._error

    def _forward(self) -> None:
        try:
            self._wait()
            with torch.inference_mode(), forward_pass(self):
                output = self._model(
                    input_ids=self._token_ids_T.unsqueeze(0),
                    position_ids=self._positions_T.unsqueeze(0),
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=self._positions_T if self._all_logits else self._positions_T[-1:],
                )
                self._logits_TV = plain(output.logits[0]).float()
        except _Stopped:
            return
        except BaseException as error:
            # Raised again in the thread that waits for this one.
            self._error = error
        self._came.release()

    def _wait(self) -> None:
        self._go.acquire()
        if self._stopped:
            raise _Stopped

    def experts(
        self, module: nn.Module, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Hand in the layer's rows and wait for what becomes of them."""
        self._layer = self._layer_of[id(module)]
        self._rows = LayerRows(plain(hidden_TH), plain(index_TK), plain(weights_TK).float())
        self._came.release()
        self._wait()
        output_TH, self._output_TH = self._output_TH, None
        assert output_TH is not None
        return output_TH

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention over the sequence's own rows: its keys and values are one block of the pool."""
        rows = call.query.shape[2]
        return self._kernels.attention(
            plain(call.query)[0].transpose(0, 1),
            plain(call.key),
            plain(call.value),
            torch.zeros((1, 1), dtype=torch.int32),
            torch.zeros(rows, dtype=torch.int32),
            torch.arange(rows, dtype=torch.int32),
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            sinks_H=call.sinks_H,
        )

    def check_mask(self, mask_function: Any, window: int) -> None:
        """The probe has checked the family's masks already."""
