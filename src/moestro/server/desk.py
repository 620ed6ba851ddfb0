"""What all endpoints work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moestro.engine.events import ServiceSnapshot
from moestro.server.answers import Answers
from moestro.server.errors import ApiError
from moestro.server.host import ModelHost, Phase, Serving
from moestro.server.metrics import Metrics

BASE_NAME = "base"
"""After the model's name, like a variant's: none."""


@dataclass(frozen=True)
class Asked:
    """What a request is for: `variant` of a model (empty: the base), by its whole name."""

    serving: Serving
    variant: str
    name: str


@dataclass(frozen=True)
class Desk:
    """The model, its metrics."""

    host: ModelHost
    metrics: Metrics

    def serving(self, model: str | None) -> Serving:
        """The model, if it is the one asked for. Raises ApiError: 503, 404."""
        return self.asked(model).serving

    def asked(self, model: str | None) -> Asked:
        """What a request that names `model` is for. Raises ApiError: 503, 404."""
        name = self.host.name
        if model is None or model in (name, f"{name}:{BASE_NAME}"):
            return Asked(self.host.serving, "", name)
        if not model.startswith(f"{name}:"):
            raise _no_model(model, self.names() if self.host.loading.phase is Phase.READY else [name])
        names = self.names()
        if model not in names:
            raise _no_model(model, names)
        return Asked(self.host.serving, model.removeprefix(f"{name}:"), model)

    def names(self) -> list[str]:
        """What requests can name: the model and its variants, as they are in the store now. Raises ApiError: 503."""
        name = self.host.name
        return [name, *(f"{name}:{variant}" for variant in self.host.serving.llm.variants())]

    def answers(self, serving: Serving) -> Answers:
        """For one call of the API."""
        return Answers(serving.service, self.metrics)


def _no_model(model: str, names: list[str]) -> ApiError:
    there = ", ".join(map(repr, names))
    message = f"There is no model {model!r} here. This server has {there}."
    return ApiError(404, message, param="model", code="model_not_found")


def make_desk(host: ModelHost) -> Desk:
    """A desk whose metrics follow the host's service."""
    return Desk(host, Metrics(host.name, lambda: snapshot_of(host)))


def snapshot_of(host: ModelHost) -> ServiceSnapshot | None:
    """How things are; None while there is no model."""
    try:
        serving = host.serving
    except ApiError:
        return None
    return serving.service.snapshot()


def timings_json(answers: Answers) -> dict[str, Any]:
    """moestro's own addition to an answer: where the time went, in seconds; over several answers, the longest."""
    names = ("queue_s", "prefill_s", "decode_s", "ttft_s", "total_s")
    return {name: max((round(getattr(one, name), 6) for one in answers.total.timings), default=0.0) for name in names}
