"""A router on disk: one npz file among the store's variants, whole or not there. Nothing in it is ever unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moestro.domain.classifiers import Classifier, Linear, TextClassifier, TraceClassifier
from moestro.domain.features import FEATURES
from moestro.domain.router import BASE, DomainRouter
from moestro.errors import RouteError, TraceError
from moestro.store.checksum import checksum, to_hex
from moestro.trace.npz import read_npz, write_npz

ROUTER_FILE = "variants/domains.npz"
"""Its place in a store."""

_FORMAT = "moestro-domains 2"
_AGAIN = "Fit it again with `moestro variants route fit`."
_KEYS = {"facts", "weights", "bias"}


def router_path(store: Path) -> Path:
    """Where the router of a store is."""
    return store / ROUTER_FILE


def save_router(path: Path, router: DomainRouter, *, fingerprint: str) -> None:
    """Write a router of the store whose source has this fingerprint, or leave the file as it was.

    Raises:
        RouteError: it cannot be written.
    """
    linear = _linear(router.classifier)
    facts = {
        "format": _FORMAT,
        "store": fingerprint,
        "kind": router.classifier.kind,
        "domains": list(router.domains),
        "threshold": router.threshold,
        "left_out": router.left_out,
        "layers": getattr(router.classifier, "layers", 0),
        "experts": getattr(router.classifier, "experts", 0),
    }
    facts["checksum"] = _checksum(facts, linear.weights_DF, linear.bias_D)
    arrays = {
        "facts": np.array(json.dumps(facts, sort_keys=True)),
        "weights": linear.weights_DF,
        "bias": linear.bias_D,
    }
    try:
        path.parent.mkdir(exist_ok=True)
        write_npz(path, arrays)
    except OSError as error:
        raise RouteError(f"{path} cannot be written ({error.strerror}). Check the disk and the permissions.") from error


def load_router(path: Path, *, fingerprint: str) -> DomainRouter:
    """The router of the store whose source has this fingerprint.

    Raises:
        RouteError: the file is missing or damaged, or is of another model.
    """
    try:
        arrays = read_npz(path)
    except FileNotFoundError as error:
        raise RouteError(f"This store has no router: {path} is missing. {_AGAIN}") from error
    except OSError as error:
        raise RouteError(f"{path} cannot be read ({error.strerror}). Check the disk and the permissions.") from error
    except TraceError as error:
        raise RouteError(f"{path} is damaged ({error}). {_AGAIN}") from error
    facts = _facts(arrays, path)
    if facts["store"] != fingerprint:
        raise RouteError(
            f"{path} is of another model: its fingerprint is {facts['store']}, expected {fingerprint}. {_AGAIN}"
        )
    linear = Linear(arrays["weights"], arrays["bias"])
    domains = tuple(facts["domains"])
    return DomainRouter(_classifier(facts, linear), domains, float(facts["threshold"]), float(facts["left_out"]))


def _linear(classifier: Classifier) -> Linear:
    assert isinstance(classifier, TextClassifier | TraceClassifier)
    return classifier.linear


def _classifier(facts: dict[str, Any], linear: Linear) -> Classifier:
    if facts["kind"] == TextClassifier.kind:
        return TextClassifier(linear)
    return TraceClassifier(linear, layers=facts["layers"], experts=facts["experts"])


def _facts(arrays: dict[str, np.ndarray], path: Path) -> dict[str, Any]:
    """What a file says of itself, once all of it is as it should be."""
    try:
        facts = json.loads(str(arrays["facts"])) if set(arrays) == _KEYS else None
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise RouteError(f"{path} is not a router of domains: expected the format {_FORMAT!r}. {_AGAIN}")
    stated = facts.pop("checksum", None)
    if stated != _checksum(facts, arrays["weights"], arrays["bias"]):
        raise RouteError(f"{path} is damaged: what it holds does not match its checksum. {_AGAIN}")
    # The checksum matches, so that moestro wrote it: what follows would be its own mistake.
    domains = facts["domains"]
    features = FEATURES if facts["kind"] == TextClassifier.kind else facts["layers"] * facts["experts"]
    if arrays["weights"].shape != (len(domains), features) or arrays["bias"].shape != (len(domains),):
        raise RouteError(f"{path} is damaged: its weights are {arrays['weights'].shape}. {_AGAIN}")
    assert BASE in domains
    return facts


def _checksum(facts: dict[str, Any], *arrays: np.ndarray) -> str:
    told = json.dumps(facts, sort_keys=True).encode()
    shapes = json.dumps([[array.dtype.str, list(array.shape)] for array in arrays]).encode()
    return to_hex(checksum(b"\0".join([told, shapes, *(np.ascontiguousarray(one).tobytes() for one in arrays)])))
