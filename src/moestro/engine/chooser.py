"""Choosing the variant that answers a prompt: the store's router of domains, asked with what it needs to know."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moestro.domain import Choice, DomainRouter, RoutedPrompt, load_router, router_path
from moestro.store.reader import Store

Route = Callable[[Sequence[int], int], np.ndarray]
"""Experts [N, layers, K] that the base picks for a prompt's first tokens in its first MoE layers."""


@dataclass(frozen=True)
class _TextPrompt:
    """A prompt whose routing the model is asked for when somebody wants to know it."""

    text: str
    encode: Callable[[str], Sequence[int]]
    route: Route

    def routed(self, layers: int) -> RoutedPrompt:
        """Raises RequestError, PlaneReadError."""
        token_ids = self.encode(self.text)
        if not token_ids:  # a conversation in which the user has said nothing
            return RoutedPrompt(np.empty((0, layers, 1), dtype=np.int64), 0.0)
        started = time.perf_counter()
        return RoutedPrompt(self.route(token_ids, layers), time.perf_counter() - started)


class Chooser:
    """The router of a store, read when it is first asked and again when its file is another one.

    Any thread may ask. `encode` gives the tokens of a text.
    """

    def __init__(self, store: Store, encode: Callable[[str], Sequence[int]]) -> None:
        self._path, self._fingerprint = router_path(store.path), store.manifest.source.fingerprint
        self._encode = encode
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._router: DomainRouter | None = None

    @property
    def there(self) -> bool:
        """Whether the store has a router."""
        return _identity(self._path) is not None

    def choose(self, text: str, available: Collection[str], route: Route) -> Choice:
        """Who answers a prompt, of the variants that are `available`.

        Raises:
            RouteError: there is no router, or its file is damaged or of another model.
            RequestError, PlaneReadError: the prompt cannot be looked at.
        """
        return self.router.choose(_TextPrompt(text, self._encode, route), available)

    @property
    def router(self) -> DomainRouter:
        """The router as it is now. Raises RouteError."""
        with self._lock:
            seen = _identity(self._path)
            if self._router is None or seen is None or seen != self._seen:
                self._router = load_router(self._path, fingerprint=self._fingerprint)
                self._seen = seen
            return self._router


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
