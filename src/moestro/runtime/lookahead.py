"""Which experts the gates of the next layers would pick if they saw a layer's hidden state already.

Computed beside the model's own layers: `Gates` for prefetching on the general path (the native one asks them itself);
`Lookahead` for traces from which predictors are judged, beside transformers' layers alone.

Shapes: T rows of the step, H hidden width, E experts of a layer, K experts per row, L MoE layers, P layers ahead,
C = 2 K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from moestro.errors import UnsupportedModelError
from moestro.hf.skeleton import is_experts_module
from moestro.policy.choice import GATE
from moestro.runtime.narrow import plain

_BIAS_OF_CHOICE = "e_score_correction_bias"


class Lookahead:
    """Hooks on the routers of a model that runs on the general path. `take` is to be called after each step.

    Raises:
        UnsupportedModelError: where this family's routers are is not known.
    """

    def __init__(self, model: nn.Module, *, ahead: int) -> None:
        assert ahead > 0
        self._ahead = ahead
        self._routers = _routers_of(model, "Record the trace without --lookahead.")
        self._hidden: list[torch.Tensor] = []
        for router in self._routers:
            router.register_forward_pre_hook(self._note)

    def take(self, experts_LTK: np.ndarray) -> np.ndarray:
        """Candidates [L, T, P, C] of the step that has just gone through, in falling order; zeros past the last layer.

        Raises:
            UnsupportedModelError: from its own layer's hidden state a gate would not have picked `experts_LTK`, so it
                picks in a way that is not known here.
        """
        hidden, self._hidden = self._hidden, []
        layers, rows, picks = experts_LTK.shape
        assert len(hidden) == layers
        experts = min(router.weight.shape[0] for router in self._routers)
        found_LTPC = np.zeros((layers, rows, self._ahead, min(2 * picks, experts)), dtype=np.int64)
        for layer, hidden_TH in enumerate(hidden):
            self._check(layer, hidden_TH, experts_LTK[layer])
            for ahead in range(1, min(self._ahead, layers - 1 - layer) + 1):
                scores_TE = _scores(self._routers[layer + ahead], hidden_TH)
                best_TC = scores_TE.topk(found_LTPC.shape[-1]).indices
                found_LTPC[layer, :, ahead - 1] = best_TC.numpy()
        return found_LTPC

    def forget(self) -> None:
        """The step failed."""
        self._hidden.clear()

    def _note(self, _router: nn.Module, arguments: tuple[Any, ...]) -> None:
        hidden = plain(arguments[0])
        self._hidden.append(hidden.reshape(-1, hidden.shape[-1]))

    def _check(self, layer: int, hidden_TH: torch.Tensor, experts_TK: np.ndarray) -> None:
        scores_TE = _scores(self._routers[layer], hidden_TH)
        least_T = scores_TE.gather(1, torch.from_numpy(experts_TK)).min(dim=1).values
        best_T = scores_TE.topk(experts_TK.shape[1]).values[:, -1]
        if not torch.allclose(least_T, best_T, rtol=1e-3, atol=1e-4):
            raise UnsupportedModelError(
                f"The {type(self._routers[layer]).__name__} of this model picks experts in a way that lookahead does "
                "not know. Record the trace without --lookahead."
            )


class Looks(Protocol):
    """Whoever can tell what the gates of layers to come would pick."""

    def candidates(self, layer: int, hidden_TH: torch.Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """(layers ahead, ids [T, C] in falling order) for what goes into the experts of `layer`, as far as is known."""
        ...


class Gates:
    """Those of the MoE layers to come, asked with what goes into the experts of a layer.

    Where a family's router does more than compare its scores (groups of experts, say), or its experts see something
    else than its router, the candidates are not exactly those it would pick: how often they are right is learned by
    whoever uses them.

    Raises:
        UnsupportedModelError: where this family's routers are is not known.
    """

    def __init__(self, model: nn.Module, *, picks: int, ahead: int = 1) -> None:
        assert ahead > 0
        self._routers = _routers_of(model, f"Choose a predictor without {GATE!r}.")
        self._picks, self._ahead = picks, ahead

    def candidates(self, layer: int, hidden_TH: torch.Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """(layers ahead, ids [T, C] in falling order) for each of the next layers that there are."""
        for ahead, router in enumerate(self._routers[layer + 1 : layer + 1 + self._ahead], start=1):
            scores_TE = _scores(router, hidden_TH)
            yield ahead, scores_TE.topk(min(2 * self._picks, scores_TE.shape[1])).indices.numpy()


def has_gates(model: nn.Module) -> bool:
    """Whether it is known where the routers of this family are."""
    return all(_found_router(block) is not None for block in _blocks(model))


def _routers_of(model: nn.Module, instead: str) -> list[Any]:
    """In the order of layers. `instead`: what to do where they are not known."""
    return [_router_of(block, instead) for block in _blocks(model)]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a router and experts, in the order of layers."""
    return [module for module in model.modules() if any(is_experts_module(child) for child in module.children())]


def _router_of(block: nn.Module, instead: str) -> Any:
    found = _found_router(block)
    if found is None:
        raise UnsupportedModelError(
            f"The router of a {type(block).__name__} is not where lookahead looks for it. {instead}"
        )
    return found


def _found_router(block: nn.Module) -> Any | None:
    """The child that holds a matrix [E, H] as `weight`: transformers' top-k routers and plain linear maps do."""
    found = [child for name, child in block.named_children() if name in ("gate", "router")]
    if len(found) != 1 or getattr(found[0], "weight", None) is None or found[0].weight.ndim != 2:
        return None
    return found[0]


def _scores(router: Any, hidden_TH: torch.Tensor) -> torch.Tensor:
    """Scores [T, E] that order experts as the router does."""
    scores_TE: torch.Tensor = plain(
        F.linear(hidden_TH.to(torch.float32), router.weight, getattr(router, "bias", None))
    ).float()
    choice = getattr(router, _BIAS_OF_CHOICE, None)
    if choice is not None:
        scores_TE = scores_TE.sigmoid() + plain(choice)
    return scores_TE
