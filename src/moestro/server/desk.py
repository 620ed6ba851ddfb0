"""What all endpoints work with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moestro.domain import AUTO, BASE, Choice
from moestro.engine.events import ServiceSnapshot
from moestro.engine.llm import Prompt
from moestro.server.answers import Answers
from moestro.server.errors import ApiError
from moestro.server.host import ModelHost, Phase, Serving
from moestro.server.metrics import Metrics


@dataclass(frozen=True)
class Asked:
    """What a request is for: `variant` of a model (empty: the base), by its whole name; `choice` is how it came to be
    this one where the request leaves that to the router of domains."""

    serving: Serving
    variant: str
    name: str
    choice: Choice | None = None

    def decided(self, prompt: Prompt) -> Asked:
        """What answers a prompt. Raises MoestroError as `Service.choose`."""
        if self.variant != AUTO:
            return self
        choice = self.serving.service.choose(prompt)
        model = self.name.removesuffix(f":{AUTO}")
        return Asked(
            self.serving, choice.variant or "", f"{model}:{choice.variant}" if choice.variant else model, choice
        )


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
        if model is None or model in (name, f"{name}:{BASE}"):
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
        llm = self.host.serving.llm
        return [name, *(f"{name}:{variant}" for variant in (*llm.variants(), *((AUTO,) if llm.chooser.there else ())))]

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


def choice_json(choice: Choice | None) -> dict[str, Any]:
    """moestro's own addition to an answer of a variant that was chosen for it."""
    if choice is None:
        return {}
    return {
        "moestro": {
            "variant": choice.variant,
            "domain": choice.domain,
            "confidence": round(choice.confidence, 6),
            "domain_tokens": choice.tokens,
            "domain_s": round(choice.seconds, 6),
        }
    }


def choice_headers(choices: Sequence[Choice | None]) -> dict[str, str]:
    """Who was chosen, as a header: `BASE` where that is no variant, one name for each prompt."""
    names = [choice.variant or BASE for choice in choices if choice is not None]
    return {"x-moestro-variant": ", ".join(names)} if names else {}


def timings_json(answers: Answers) -> dict[str, Any]:
    """moestro's own addition to an answer: where the time went, in seconds; over several answers, the longest."""
    names = ("queue_s", "prefill_s", "decode_s", "ttft_s", "total_s")
    return {name: max((round(getattr(one, name), 6) for one in answers.total.timings), default=0.0) for name in names}
