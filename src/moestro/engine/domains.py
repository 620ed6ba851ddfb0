"""Fitting and judging a store's router of domains on example prompts.

Shapes: N rows (tokens), L MoE layers, K experts per row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from moestro.config import RouteOptions, RuntimeOptions
from moestro.domain import (
    BASE,
    Choice,
    DomainRouter,
    RoutedExample,
    TraceClassifier,
    check_examples,
    fit_text,
    fit_trace,
    router_path,
    save_router,
)
from moestro.engine.chooser import Chooser
from moestro.engine.llm import LLM
from moestro.engine.tokenizer import encode, load_tokenizer
from moestro.errors import RouteError
from moestro.store.reader import Store
from moestro.store.variant_file import list_variants

_LAYERS = 4
"""Of the trace, where nothing else is said: on the built-in model more of them cost more and tell little more."""

Examples = Mapping[str, Sequence[str]]
"""Prompts by variant, and of `BASE`."""


@dataclass(frozen=True)
class RouteProgress:
    """Prompts done and in all."""

    done: int
    total: int


@dataclass(frozen=True)
class DomainScore:
    """One domain's prompts: how many, the share that the right one answers, and how many each one answers."""

    prompts: int
    accuracy: float
    answered_by: dict[str, int]


@dataclass(frozen=True)
class RouteReport:
    """What a router makes of prompts whose domains are known.

    `accuracy` is over all prompts, `balanced` the mean over domains. `below_threshold` is the share of prompts that the
    base answers because the router is not sure of a variant. `domain_tokens` are those that were run under the base
    only to choose, in `domain_s`; `choose_s` is all time that choosing took.
    """

    classifier: str
    threshold: float
    prompts: int
    accuracy: float
    balanced: float
    below_threshold: float
    domains: dict[str, DomainScore]
    domain_tokens: int
    domain_s: float
    choose_s: float


def fit_router(
    store: Store,
    examples: Examples,
    what: RouteOptions,
    *,
    opening: RuntimeOptions | None = None,
    progress: Callable[[RouteProgress], None] | None = None,
) -> DomainRouter:
    """Fit a router to example prompts and put it into the store, in place of one that is there.

    By trace, the base runs on all of them, opened with `opening`.

    Raises:
        RouteError: as `fit_text`; the store has no such variant; or the router cannot be written.
        MoestroError: as `LLM`, by trace.
    """
    _check_names(store, [name for name in examples if name != BASE])
    check_examples(examples, what.threshold)
    if what.classifier == TraceClassifier.kind:
        router = _fit_trace(store, examples, what, opening or RuntimeOptions(), progress)
    else:
        router = fit_text(examples, threshold=what.threshold)
    save_router(router_path(store.path), router, fingerprint=store.manifest.source.fingerprint)
    return router


def judge_router(
    store: Store,
    examples: Examples,
    *,
    opening: RuntimeOptions | None = None,
    progress: Callable[[RouteProgress], None] | None = None,
) -> RouteReport:
    """Ask a store's router for who answers each prompt.

    Raises:
        RouteError: there is no router, it is damaged, or it has never heard of one of these domains.
        MoestroError: as `LLM`, if the router goes by trace.
    """
    total = sum(map(len, examples.values()))
    choices: dict[str, list[Choice]] = {name: [] for name in examples}
    with choosing(store, opening) as (chooser, choose):
        router = chooser.router
        unknown = [name for name in examples if name not in router.domains]
        if unknown:
            raise RouteError(
                f"The router of {store.path} does not know {', '.join(unknown)}. It knows {', '.join(router.domains)}; "
                "fit it again with examples of all."
            )
        started = time.perf_counter()
        for name, prompts in examples.items():
            for prompt in prompts:
                choices[name].append(choose(prompt))
                if progress:
                    progress(RouteProgress(sum(map(len, choices.values())), total))
        seconds = time.perf_counter() - started
    return _report(router, choices, seconds)


@contextmanager
def choosing(store: Store, opening: RuntimeOptions | None = None) -> Iterator[tuple[Chooser, Callable[[str], Choice]]]:
    """A store's router and what asks it; the model is opened when the router first wants to see what it routes.

    Raises:
        MoestroError: as `LLM`.
    """
    tokenizer = load_tokenizer(store)
    chooser = Chooser(store, lambda text: encode(tokenizer, text))
    opened: list[LLM] = []

    def route(prompt_ids: Sequence[int], layers: int) -> np.ndarray:
        if not opened:
            opened.append(LLM(store.path, options=opening))
        return opened[0].route(prompt_ids, layers)

    try:
        yield chooser, lambda text: chooser.choose(text, list_variants(store.path), route)
    finally:
        for llm in opened:
            llm.close()


def _fit_trace(
    store: Store,
    examples: Examples,
    what: RouteOptions,
    opening: RuntimeOptions,
    progress: Callable[[RouteProgress], None] | None,
) -> DomainRouter:
    layers = what.layers or min(_LAYERS, len(store.layers))
    if layers > len(store.layers):
        raise RouteError(f"layers is {layers}, and the model has {len(store.layers)} MoE layers.")
    total, done = sum(map(len, examples.values())), 0
    routed: dict[str, list[RoutedExample]] = {name: [] for name in examples}
    with LLM(store.path, options=opening) as llm:
        for name, prompts in examples.items():
            for prompt in prompts:
                routed[name].append(RoutedExample(llm.route(llm.encode(prompt), layers)))
                done += 1
                if progress:
                    progress(RouteProgress(done, total))
    experts = max(layer.num_experts for layer in store.layers)
    return fit_trace(routed, experts=experts, threshold=what.threshold)


def _check_names(store: Store, names: Sequence[str]) -> None:
    there = list_variants(store.path)
    for name in names:
        if name not in there:
            raise RouteError(
                f"{store.path} has no variant {name!r} to send prompts to: it has {', '.join(there) or 'none'}. Add it "
                "first with `moestro variants add`."
            )


def _report(router: DomainRouter, choices: Mapping[str, Sequence[Choice]], seconds: float) -> RouteReport:
    every = [choice for some in choices.values() for choice in some]
    domains = {name: _score(name, some) for name, some in choices.items()}
    unsure = [choice for choice in every if choice.domain != BASE and choice.confidence < router.threshold]
    return RouteReport(
        classifier=router.classifier.kind,
        threshold=router.threshold,
        prompts=len(every),
        accuracy=sum(one.accuracy * one.prompts for one in domains.values()) / len(every),
        balanced=sum(one.accuracy for one in domains.values()) / len(domains),
        below_threshold=len(unsure) / len(every),
        domains=domains,
        domain_tokens=sum(choice.tokens for choice in every),
        domain_s=sum(choice.seconds for choice in every),
        choose_s=seconds,
    )


def _score(name: str, choices: Sequence[Choice]) -> DomainScore:
    answered = Counter(choice.variant or BASE for choice in choices)
    return DomainScore(len(choices), answered[name] / len(choices), dict(answered.most_common()))
