"""Classifiers tell synthetic domains apart; the base answers what they are not sure of."""

from __future__ import annotations

import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.domains import EXPERTS, LAYERS, Asked, examples, routing, routings, texts
from moestro.domain import BASE, Prompt, TextClassifier, TraceClassifier, fit_text, fit_trace
from moestro.domain.features import FEATURES, features_of
from moestro.errors import RouteError

THERE = ("code", "sums")


def prompt_of(domain: str, seed: int) -> Asked:
    return Asked(texts(domain, 1, words=12, seed=seed)[0], routing(domain, 40, seed=seed))


@pytest.mark.parametrize("kind", ["text", "trace"])
def test_domains_are_told_apart(kind: str) -> None:
    router = (
        fit_text(examples(), threshold=0.5) if kind == "text" else fit_trace(routings(), experts=EXPERTS, threshold=0.5)
    )
    asked = [(domain, prompt_of(domain, seed)) for domain in examples() for seed in range(100, 120)]
    choices = [(domain, router.choose(prompt, THERE)) for domain, prompt in asked]
    right = [choice.variant == (None if domain == BASE else domain) for domain, choice in choices]
    assert np.mean(right) > 0.95
    assert all(1 / 3 <= choice.confidence <= 1 for _, choice in choices)


def test_only_the_trace_takes_work() -> None:
    text = fit_text(examples(), threshold=0.5).choose(Asked("1 + 2 = 3"), THERE)
    trace = fit_trace(routings(), experts=EXPERTS, threshold=0.5).choose(Asked("", routing("sums", 40)), THERE)
    assert (text.tokens, text.seconds) == (0, 0.0)
    assert (trace.tokens, trace.seconds) == (40, 0.25)


def test_the_trace_needs_only_the_layers_it_learnt() -> None:
    shallow = {domain: [type(one)(one.experts_NLK[:, :1]) for one in some] for domain, some in routings().items()}
    classifier = fit_trace(shallow, experts=EXPERTS, threshold=0.5).classifier
    assert isinstance(classifier, TraceClassifier)
    assert classifier.layers == 1 < LAYERS
    assert classifier.judge(prompt_of("sums", 7)).probabilities_D.argmax() == list(examples()).index("sums")


def test_the_base_answers_below_the_threshold_and_for_variants_that_are_gone() -> None:
    router = fit_text(examples(), threshold=0.5)
    prompt = prompt_of("code", 5)
    sure = router.choose(prompt, THERE)
    assert sure.variant == "code"
    gone = router.choose(prompt, ("sums",))
    assert (gone.variant, gone.domain, gone.confidence) == (None, "code", sure.confidence)
    as_sure = replace(router, threshold=sure.confidence).choose(prompt, THERE)
    surer = replace(router, threshold=float(np.nextafter(sure.confidence, 2))).choose(prompt, THERE)
    assert (as_sure.variant, surer.variant) == ("code", None)


def test_probabilities_are_calibrated() -> None:
    """Texts that mix two domains evenly are not told with certainty."""
    router = fit_text(examples(20), threshold=0.5)
    mixed = [
        Asked(" ".join(texts("code", 1, words=10, seed=seed) + texts("base", 1, words=10, seed=seed)))
        for seed in range(20)
    ]
    pure = [prompt_of("code", seed) for seed in range(20)]
    unsure = np.mean([router.choose(prompt, THERE).confidence for prompt in mixed])
    sure = np.mean([router.choose(prompt, THERE).confidence for prompt in pure])
    assert sure > 0.9
    assert unsure < sure


def test_two_domains_do() -> None:
    two = {name: some for name, some in examples().items() if name != "sums"}
    router = fit_text(two, threshold=0.5)
    assert router.choose(prompt_of("code", 3), ("code",)).variant == "code"
    assert router.choose(prompt_of("base", 3), ("code",)).variant is None


@given(st.text(st.characters()))
def test_any_text_has_features_and_a_choice(text: str) -> None:
    found = features_of(text)
    assert (np.diff(found.places_F) > 0).all()
    assert found.places_F.size == 0 or 0 <= found.places_F[0] <= found.places_F[-1] < FEATURES
    length = np.linalg.norm(found.values_F)
    assert length == pytest.approx(1.0 if text else 0.0, abs=1e-5)
    probabilities_D = ROUTER.classifier.judge(Asked(text)).probabilities_D
    assert probabilities_D.sum() == pytest.approx(1.0)
    assert np.isfinite(probabilities_D).all()


def test_lone_surrogates_and_the_empty_text() -> None:
    for text in ("", "\ud800", "a"):
        prompt: Prompt = Asked(text)
        assert np.isfinite(ROUTER.classifier.judge(prompt).probabilities_D).all()


def test_fitting_twice_gives_the_same() -> None:
    again = fit_text(examples(), threshold=0.5).classifier
    assert isinstance(again, TextClassifier)
    assert isinstance(ROUTER.classifier, TextClassifier)
    assert (again.linear.weights_DF == ROUTER.classifier.linear.weights_DF).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"code": []}, ("code", "at least 2")),
        ({"base": ["one"]}, ("base", "at least 2")),
    ],
)
def test_too_few_examples(change: dict[str, list[str]], words: tuple[str, ...]) -> None:
    with pytest.raises(RouteError) as caught:
        fit_text({**examples(), **change}, threshold=0.5)
    assert all(word in str(caught.value) for word in words)


def test_no_base_no_variant_no_probability() -> None:
    with pytest.raises(RouteError, match="base=FILE"):
        fit_text({name: some for name, some in examples().items() if name != BASE}, threshold=0.5)
    with pytest.raises(RouteError, match="at least one variant"):
        fit_text({BASE: examples()[BASE]}, threshold=0.5)
    with pytest.raises(RouteError, match="probability"):
        fit_text(examples(), threshold=1.5)
    with pytest.raises(RouteError, match="probability"):
        fit_text(examples(), threshold=float("nan"))


def test_without_scikit_learn_fitting_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(RouteError, match=r"moestro\[route\]"):
        fit_text(examples(), threshold=0.5)


ROUTER = fit_text(examples(), threshold=0.5)


def test_words_and_their_order_count() -> None:
    one, same, turned = (features_of(text) for text in ("import os", "IMPORT OS", "os import"))
    assert one.places_F.tolist() == same.places_F.tolist()
    assert len(set(one.places_F.tolist()) - set(turned.places_F.tolist())) > 1
    word, pair = (set(features_of(text).places_F.tolist()) for text in ("import", "import os"))
    crc = zlib.crc32(b"import") + 2**32
    place = ((crc ^ (crc >> 32)) * 0x9E3779B97F4A7C15) % 2**64 >> 49
    assert place in word & pair
