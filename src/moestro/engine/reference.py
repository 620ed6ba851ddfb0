"""What a store must be to serve as the raw reference of another."""

from __future__ import annotations

import logging
from typing import Any

from moestro.config import RAW
from moestro.errors import RequestError
from moestro.store.reader import Store


def is_raw(store: Store) -> bool:
    """Whether all weights are kept as they are, experts' and dense ones."""
    return store.manifest.encoding == RAW and store.manifest.dense_bits == 16


def require_raw(store: Store) -> None:
    """Raise RequestError unless all weights are kept as they are."""
    if not is_raw(store):
        raise RequestError(
            f"{store.path} does not hold raw weights, which a reference must. Give the checkpoint, or a store "
            "of it that was packed with --levels raw."
        )


def require_reference(store: Store, reference: Store) -> None:
    """Raise RequestError unless `reference` is raw and of the shape of `store`; warn when its checkpoint is another."""
    require_raw(reference)
    if _shape(store) != _shape(reference):
        raise RequestError(
            f"The reference {reference.path} is another model than {store.path}: their layers or vocabularies differ. "
            "Give the raw weights of the same model."
        )
    ours, theirs = store.manifest.source.fingerprint, reference.manifest.source.fingerprint
    if ours != theirs:
        logging.getLogger("moestro").warning(
            "%s was packed from another checkpoint (%s) than the reference %s (%s): two models are compared.",
            *(store.path, ours, reference.path, theirs),
        )


def _shape(store: Store) -> dict[str, Any]:
    experts = {layer.module: layer.num_experts for layer in store.layers}
    return experts | {name: tensor.shape for name, tensor in store.dense.items()}
