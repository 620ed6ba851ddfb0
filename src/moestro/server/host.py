"""The model behind the server: opened by a thread of its own while the server already answers, closed at the end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from moestro.engine.llm import LLM
from moestro.engine.service import Service
from moestro.server.defaults import Defaults, read_defaults
from moestro.server.errors import ApiError
from moestro.store.pack import PackProgress

_LOG = logging.getLogger("moestro.server")

Opener = Callable[[Callable[[PackProgress], None]], LLM]
"""Opens the model; tells how far packing is, if it has to be packed first."""


class Phase(Enum):
    """Where the model is in its life."""

    OPENING = "opening"
    PACKING = "packing"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True)
class Loading:
    """How far opening is; bytes are those of packing, 0 of 0 where nothing is packed."""

    phase: Phase
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True)
class Serving:
    """A model that answers."""

    llm: LLM
    service: Service
    defaults: Defaults


class ModelHost:
    """Opens the model in the background; `serving` is what requests work with.

    Args:
        name: of the model in requests.
        opened: called by the opening thread at the end, with the error if it failed.
    """

    def __init__(self, name: str, open_llm: Opener, *, max_queue: int) -> None:
        self.name = name
        self.created = int(time.time())
        self.error: Exception | None = None
        self._open_llm, self._max_queue = open_llm, max_queue
        self._loading = Loading(Phase.OPENING)
        self._serving: Serving | None = None
        self._closed = False

    def start(self, opened: Callable[[], None]) -> None:
        """Begin to open the model; `opened` is called by that thread when it is done or has failed (see `error`)."""
        # A daemon: when the server is ended while it opens or packs a model, nobody waits for that.
        threading.Thread(target=self._open, args=(opened,), name="moestro-open", daemon=True).start()

    @property
    def loading(self) -> Loading:
        return self._loading

    @property
    def opening(self) -> bool:
        """Whether the thread that opens the model is still at it."""
        return self._serving is None and self.error is None and not self._closed

    @property
    def serving(self) -> Serving:
        """The model. Raises ApiError (503) while it is not there."""
        if self._serving is None or self._loading.phase is not Phase.READY:
            raise self.not_ready()
        return self._serving

    def not_ready(self) -> ApiError:
        """Why nothing is answered now."""
        phase = self._loading.phase
        if phase is Phase.DRAINING:
            return ApiError(503, "The server is shutting down and takes no more requests.", code="shutting_down")
        done = ""
        if self._loading.total_bytes:
            done = f" ({self._loading.done_bytes / self._loading.total_bytes:.0%})"
        message = f"The model is not ready yet: {phase.value}{done}. /health tells when it is."
        return ApiError(503, message, code="model_loading", headers={"Retry-After": "2"})

    def drain(self) -> None:
        """Take no more requests; those that run go on."""
        self._loading = Loading(Phase.DRAINING)

    def close(self) -> None:
        """End what still runs, and give the memory back."""
        self.drain()
        if self._serving is not None:
            self._serving.service.close(drain_s=0.0)
            self._serving.llm.close()
            self._serving, self._closed = None, True

    def _open(self, opened: Callable[[], None]) -> None:
        try:
            llm = self._open_llm(self._packing)
            defaults = read_defaults(llm.path)
            self._serving = Serving(llm, Service(llm, max_queue=self._max_queue), defaults)
            if self._loading.phase is not Phase.DRAINING:
                self._loading = Loading(Phase.READY)
        except Exception as error:  # whoever started the server is told, whatever it is
            self.error = error
            self._loading = Loading(Phase.FAILED)
        opened()

    def _packing(self, step: PackProgress) -> None:
        self._loading = Loading(Phase.PACKING, step.done_bytes, step.total_bytes)
