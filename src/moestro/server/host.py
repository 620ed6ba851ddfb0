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


class _GivenUp(Exception):  # noqa: N818
    """The server ends before its model has been packed."""


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
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()

    def start(self, opened: Callable[[], None]) -> None:
        """Begin to open the model; `opened` is called by that thread when it is done or has failed (see `error`)."""
        # A daemon: when the server is ended while it opens or packs a model, nobody waits for that.
        self._thread = threading.Thread(target=self._open, args=(opened,), name="moestro-open", daemon=True)
        self._thread.start()

    @property
    def loading(self) -> Loading:
        """Where the model is in its life."""
        return Loading(Phase.DRAINING) if self._ending.is_set() else self._loading

    @property
    def serving(self) -> Serving:
        """The model. Raises ApiError (503) while it is not there."""
        if self._serving is None or self.loading.phase is not Phase.READY:
            raise self.not_ready()
        return self._serving

    def not_ready(self) -> ApiError:
        """Why nothing is answered now."""
        now = self.loading
        if now.phase is Phase.DRAINING:
            return ApiError(503, "The server is shutting down and takes no more requests.", code="shutting_down")
        done = f" ({now.done_bytes / now.total_bytes:.0%})" if now.total_bytes else ""
        message = f"The model is not ready yet: {now.phase.value}{done}. /health tells when it is."
        return ApiError(503, message, code="model_loading", headers={"Retry-After": "2"})

    def drain(self) -> None:
        """Take no more requests; those that run go on."""
        self._ending.set()

    def end_requests(self) -> None:
        """End what still runs; whoever waits for it is told. Any thread."""
        serving = self._serving
        if serving is not None:
            serving.service.close(drain_s=0.0)

    def close(self, *, wait_s: float) -> bool:
        """End what still runs, and give the memory back. False if the model is still being opened after `wait_s`."""
        self.drain()
        if self._thread is not None:
            self._thread.join(wait_s)
            if self._thread.is_alive():
                return False
        self.end_requests()
        if self._serving is not None:
            self._serving.llm.close()
            self._serving = None
        return True

    def _open(self, opened: Callable[[], None]) -> None:
        try:
            llm = self._open_llm(self._packing)
            defaults = read_defaults(llm.path)
            self._serving = Serving(llm, Service(llm, max_queue=self._max_queue), defaults)
            self._loading = Loading(Phase.READY)
        except _GivenUp:
            pass
        except Exception as error:  # whoever started the server is told, whatever it is
            self.error = error
            self._loading = Loading(Phase.FAILED)
        opened()

    def _packing(self, step: PackProgress) -> None:
        if self._ending.is_set():
            raise _GivenUp
        self._loading = Loading(Phase.PACKING, step.done_bytes, step.total_bytes)
