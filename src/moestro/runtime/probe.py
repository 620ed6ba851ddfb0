"""Learn from the skeleton alone, by running it on the meta device, what a forward pass will need.

The probe finds the shape of every layer's KV rows, how much memory activations take at their high-water mark, and
whether the family does anything that packed batches do not support (recurrent state, odd attention patterns): all
before a single weight is read.

Shapes: T rows, H heads or hidden width, K experts per token, D and V key and value widths.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moestro.errors import UnsupportedModelError
from moestro.hf.skeleton import Skeleton, is_experts_module
from moestro.kernels.reference import ReferenceKernels
from moestro.runtime import hooks
from moestro.runtime.activation import find_activation
from moestro.runtime.cache import HookedCache
from moestro.runtime.context import AttentionCall, forward_pass
from moestro.runtime.expert_mlp import expert_mlp
from moestro.runtime.kv import LayerKV

_HARMLESS_EXTRAS = frozenset({"sliding_window", "position_ids", "use_cache", "output_attentions", "is_causal"})
_FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a family raises that wants something from the cache or the mask that ours do not have."""


@dataclass(frozen=True)
class LayerAttention:
    """How a layer calls attention: `window` in rows (0: none), `softcap` (0: none), `sinks` where it has any."""

    scale: float
    window: int
    softcap: float
    sinks: bool


@dataclass(frozen=True)
class Probe:
    """What a step of `rows` tokens with `history` cached ones needs.

    `value_width` is the widest value that attention adds up, `activation_bytes` the peak of live tensors,
    `experts_bytes` how much of it one layer's routed experts add, `activation_row_bytes` what each further row of
    history adds to it.
    """

    kv_layers: tuple[LayerKV, ...]
    attention: tuple[LayerAttention, ...]
    experts_per_token: tuple[int, ...]
    value_width: int
    activation_bytes: int
    experts_bytes: int
    rows: int
    history: int
    activation_row_bytes: int = 0


def probe(
    skeleton: Skeleton, *, rows: int, history: int, logit_rows: int, packed: bool = False, most: int = 0
) -> Probe:
    """Run `rows` tokens through the skeleton on the meta device, as if `history` tokens were cached in all, and, where
    that makes a difference, once more as if there were `most` of them.

    With `packed`, experts are quantised: those whose activation the kernels know then keep nothing between their
    projections but the kernels' scratch, which is not counted here.

    Raises:
        UnsupportedModelError: the family needs something that packed batches do not do.
    """
    _refuse_unpackable(skeleton)
    hooks.install(skeleton.model)
    shapes = _run(skeleton, rows=2, history=2, logit_rows=1, layers=None)
    layers = tuple(shapes.layers[index] for index in range(len(shapes.layers)))
    fused = _fused(skeleton) if packed else frozenset()

    def measure(cached: int) -> _PeakMemory:
        memory = _PeakMemory()
        with memory:
            _run(
                skeleton,
                rows=rows,
                history=max(cached, rows),
                logit_rows=logit_rows,
                layers=layers,
                memory=memory,
                fused=fused,
            )
        return memory

    memory, row_bytes = measure(history), 0
    if most > history and any(layer.gathered for layer in layers):
        # A peak is the largest of sums that grow by a row each: between two points it is at most their chord.
        row_bytes = math.ceil((measure(most).peak - memory.peak) / (most - history))
    return Probe(
        kv_layers=layers,
        attention=tuple(shapes.attention[index] for index in range(len(layers))),
        experts_per_token=tuple(shapes.experts_per_token),
        value_width=shapes.value_width,
        activation_bytes=memory.peak,
        experts_bytes=memory.part,
        rows=rows,
        history=history,
        activation_row_bytes=row_bytes,
    )


def _fused(skeleton: Skeleton) -> frozenset[int]:
    """The experts' modules (ids) whose whole MLP is one call of the kernels where experts are quantised."""
    modules = (module for module in skeleton.model.modules() if is_experts_module(module))
    return frozenset(id(module) for module in modules if find_activation(module) is not None)


def _refuse_unpackable(skeleton: Skeleton) -> None:
    scaling = getattr(skeleton.config, "rope_parameters", None) or {}
    if scaling.get("rope_type") == "dynamic":
        raise UnsupportedModelError(
            f"This {skeleton.config.model_type} model uses dynamic rotary scaling, whose values depend on the longest "
            "sequence of a batch. moestro packs requests together and does not run it yet."
        )


def _run(
    skeleton: Skeleton,
    *,
    rows: int,
    history: int,
    logit_rows: int,
    layers: tuple[LayerKV, ...] | None,
    memory: _PeakMemory | None = None,
    fused: frozenset[int] = frozenset(),
) -> _ProbeContext:
    family = skeleton.config.model_type
    context = _ProbeContext(family=family, history=history, known=layers, memory=memory, fused=fused)
    token_ids = torch.zeros((1, rows), dtype=torch.int64, device="meta")
    positions = torch.zeros((1, rows), dtype=torch.int64, device="meta")
    with torch.inference_mode(), forward_pass(context):
        try:
            output = skeleton.model(
                input_ids=token_ids,
                position_ids=positions,
                past_key_values=context.cache,
                use_cache=True,
                logits_to_keep=torch.zeros(logit_rows, dtype=torch.int64, device="meta"),
            )
        except UnsupportedModelError:
            raise
        except _FAILURES as error:
            raise UnsupportedModelError(
                f"{family} cannot be run on packed batches: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    assert output.logits.shape[1] == logit_rows
    if not context.layers:
        raise UnsupportedModelError(f"{family} has no attention that goes through transformers' attention interface.")
    return context


class _ProbeContext:
    def __init__(
        self,
        *,
        family: str,
        history: int,
        known: tuple[LayerKV, ...] | None,
        memory: _PeakMemory | None,
        fused: frozenset[int],
    ) -> None:
        self.family, self.history, self.known, self.memory, self.fused = family, history, known, memory, fused
        self.cache = HookedCache(family, self.cache_rows)
        self.layers: dict[int, LayerKV] = {}
        self.attention: dict[int, LayerAttention] = {}
        self.experts_per_token: list[int] = []
        self.value_width = 0
        self._cached: dict[int, torch.Tensor] = {}
        self._kernels = ReferenceKernels()

    def cache_rows(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert keys.ndim == values.ndim == 4
        if self.known is not None and self.known[layer].gathered:
            keys = keys.new_empty((1, keys.shape[1], self.history, keys.shape[3]))
            values = values.new_empty((1, values.shape[1], self.history, values.shape[3]))
        self._cached[layer] = keys
        self.layers[layer] = LayerKV(
            heads=keys.shape[1],
            key_width=keys.shape[3],
            value_heads=values.shape[1],
            value_width=values.shape[3],
            gathered=True,
        )
        return keys, values

    def attend(self, call: AttentionCall) -> torch.Tensor:
        unknown = {name for name, value in call.extras.items() if value is not None and value is not False}
        unknown -= _HARMLESS_EXTRAS
        if unknown:
            raise UnsupportedModelError(
                f"{self.family} passes {', '.join(sorted(unknown))} to attention, which moestro's does not know."
            )
        layer = int(call.module.layer_idx)  # type: ignore[arg-type]
        if layer not in self._cached:
            raise UnsupportedModelError(f"{self.family} shares or skips the KV cache in layer {layer}.")
        cached = self.layers[layer]
        self.layers[layer] = LayerKV(
            heads=cached.heads,
            key_width=cached.key_width,
            value_heads=cached.value_heads,
            value_width=cached.value_width,
            gathered=self._cached.pop(layer) is not call.key,
        )
        self.attention[layer] = LayerAttention(call.scale, call.window, call.softcap, call.sinks_H is not None)
        self.value_width = max(self.value_width, call.value.shape[-1])
        _, heads, rows, _ = call.query.shape
        return call.query.new_empty((rows, heads, call.value.shape[-1]))

    def check_mask(self, mask_function: Any, window: int) -> None:
        if window == hooks.NO_ROWS:
            return
        edge = [0, 1, 2, 5] + [window - 1, window, window + 1, 2 * window] * (window > 0)
        points = torch.tensor(sorted({point for point in edge if point >= 0}))
        zero = torch.tensor(0)
        queries, keys = points[:, None], points[None, :]
        expected = (keys <= queries) & (keys > queries - window) if window else keys <= queries
        actual = mask_function(zero, zero, queries, keys)
        if not torch.equal(torch.as_tensor(actual).expand_as(expected), expected):
            raise UnsupportedModelError(
                f"{self.family} uses an attention pattern that is neither causal nor a causal sliding window."
            )

    def experts(
        self, module: nn.Module, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        with self.memory.measure_part() if self.memory else nullcontext():
            return self._experts(module, hidden_TH, index_TK, weights_TK)

    def _experts(
        self, module: nn.Module, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        rows, hidden = hidden_TH.shape
        self.experts_per_token.append(index_TK.shape[1])
        outputs_TKH = hidden_TH.new_empty((rows, index_TK.shape[1], hidden), dtype=torch.float32)
        if id(module) in self.fused:
            return outputs_TKH[:, 0] * weights_TK[:, :1]
        views = {name: param[0] for name, param in module.named_parameters(recurse=False)}
        if module.is_transposed:
            views = {name: view.t() if view.ndim == 2 else view for name, view in views.items()}
        expert_mlp(self._kernels, module, views, hidden_TH + 0)
        return outputs_TKH[:, 0] * weights_TK[:, :1]


class _PeakMemory(TorchDispatchMode):
    """Peak bytes of the storages that are created while it is active and still referenced.

    `part` is the most that any of the parts under `measure_part` added to what was there before.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.part = 0
        self._part_peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    @contextmanager
    def measure_part(self) -> Iterator[None]:
        """What is created in here is one part."""
        before = self._part_peak = self.live
        yield
        self.part = max(self.part, self._part_peak - before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, args)
        return result

    def _note(self, tensor: torch.Tensor, args: Any) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen or any(_shares(tensor, arg) for arg in args):
            return
        self._seen.add(storage)
        nbytes = storage.nbytes()
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        self._part_peak = max(self._part_peak, self.live)
        weakref.finalize(storage, self._freed, nbytes)

    def _freed(self, nbytes: int) -> None:
        self.live -= nbytes


def _shares(tensor: torch.Tensor, other: Any) -> bool:
    return isinstance(other, torch.Tensor) and tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
