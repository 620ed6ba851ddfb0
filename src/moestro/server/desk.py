"""What all endpoints work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moestro.engine.events import ServiceSnapshot
from moestro.server.answers import Answers
from moestro.server.errors import ApiError
from moestro.server.host import ModelHost, Serving
from moestro.server.metrics import Metrics


@dataclass(frozen=True)
class Desk:
    """The model, its metrics."""

    host: ModelHost
    metrics: Metrics

    def serving(self, model: str | None) -> Serving:
        """The model, if it is the one asked for. Raises ApiError: 503, 404."""
        if model is not None and model != self.host.name:
            raise ApiError(
                404,
                f"There is no model {model!r} here. This server has {self.host.name!r}.",
                param="model",
                code="model_not_found",
            )
        return self.host.serving

    def answers(self, serving: Serving) -> Answers:
        """For one call of the API."""
        return Answers(serving.service, self.metrics)


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
