"""The model behind the server: opened by a thread of its own while the server already answers, and opened anew when
that is asked for, closed at the end."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from moestro.engine.llm import LLM
from moestro.engine.service import Service
from moestro.engine.tokenizer import template_of
from moestro.errors import MoestroError, ServeError
from moestro.memory.heap import return_free_pages
from moestro.memory.pages import HostBuffer
from moestro.server.defaults import Defaults, read_defaults
from moestro.server.dialects import Dialect, find_dialect
from moestro.server.errors import ApiError
from moestro.store.pack import PackProgress

_LOG = logging.getLogger("moestro.server")

_RETURN_S = 10.0
"""How long memory of a closed model may be held by requests that are just ending."""

Opener = Callable[[Callable[[PackProgress], None]], LLM]
"""Opens the model; tells how far packing is, if it has to be packed first."""


class Phase(Enum):
    """Where the model is in its life."""

    OPENING = "opening"
    PACKING = "packing"
    READY = "ready"
    FINISHING = "finishing"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True)
class Loading:
    """How far opening is; bytes are those of packing, 0 of 0 where nothing is packed. `finishing`: the requests of the
    model that was served end before it is opened anew."""

    phase: Phase
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True)
class Serving:
    """A model that answers."""

    llm: LLM
    service: Service
    defaults: Defaults
    dialect: Dialect | None


class _GivenUp(Exception):  # noqa: N818
    """The server ends before its model has been packed."""


class ModelHost:
    """Opens the model in the background; `serving` is what requests work with.

    Args:
        name: of the model in requests.
        drain_s: how long requests under way get to end before the model is opened anew.
        tool_parser: how it writes calls of tools, as in `ServeOptions`.
    """

    def __init__(
        self, name: str, open_llm: Opener, *, max_queue: int, drain_s: float, tool_parser: str = "auto"
    ) -> None:
        self.name = name
        self.created = int(time.time())
        self.error: Exception | None = None
        self._open_llm, self._max_queue, self._drain_s = open_llm, max_queue, drain_s
        self._tool_parser = tool_parser
        self._failure = ""
        self._closed: tuple[HostBuffer, ...] = ()
        self._changing = threading.Lock()
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
        if self._failure:
            message = f"The model could not be loaded anew: {self._failure} Mend that, then POST /admin/reload again."
            return ApiError(503, message, code="model_failed")
        done = f" ({now.done_bytes / now.total_bytes:.0%})" if now.total_bytes else ""
        message = f"The model is not ready yet: {now.phase.value}{done}. /health tells when it is."
        return ApiError(503, message, code="model_loading", headers={"Retry-After": "2"})

    def reload(self, *, drain_s: float | None = None) -> None:
        """Begin to close the model and to open it anew, as it is in its folder then; `loading` tells how far that is.

        Requests under way get `drain_s` seconds to end (None: the host's own). The memory of the model that is closed
        has gone back before the other is opened. Should that fail, another reload may mend it.

        Raises:
            ApiError: the model is being opened already (409), or the server ends (503).
        """
        with self._changing:
            if self._ending.is_set():
                raise self.not_ready()
            if self._loading.phase not in (Phase.READY, Phase.FAILED):
                message = f"The model is being opened already ({self._loading.phase.value}). /health tells when it is."
                raise ApiError(409, message, code="model_loading")
            self._failure, self._loading = "", Loading(Phase.FINISHING)
        drain_s = self._drain_s if drain_s is None else drain_s
        self._thread = threading.Thread(target=self._reload, args=(drain_s,), name="moestro-reload", daemon=True)
        self._thread.start()

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
            self._open_model()
        except _GivenUp:
            pass
        except Exception as error:  # whoever started the server is told, whatever it is
            self.error = error
            self._loading = Loading(Phase.FAILED)
        opened()

    def _open_model(self) -> None:
        llm = self._open_llm(self._packing)
        try:
            defaults = read_defaults(llm.path)
            dialect = find_dialect(self._tool_parser, template_of(llm.tokenizer))
        except BaseException:
            llm.close()
            raise
        self._serving = Serving(llm, Service(llm, max_queue=self._max_queue), defaults, dialect)
        self._loading = Loading(Phase.READY)

    def _reload(self, drain_s: float) -> None:
        try:
            self._let_go(drain_s)
            if not self._ending.is_set():
                self._loading = Loading(Phase.OPENING)
                self._open_model()
                _LOG.warning("%s has been loaded anew.", self.name)
        except _GivenUp:
            pass
        except Exception as error:  # whoever asks is told, whatever it is; its traceback would keep memory
            known = isinstance(error, MoestroError | OSError)
            _LOG.error("%s could not be loaded anew: %s", self.name, error, exc_info=None if known else error)
            self._failure = str(error) if known else f"{type(error).__name__}: {error}."
            self._loading = Loading(Phase.FAILED)

    def _let_go(self, drain_s: float) -> None:
        """Close the model, and wait until its memory has gone back."""
        if self._serving is not None:
            self._serving.service.close(drain_s=drain_s)
            self._closed = self._serving.llm.buffers
            self._serving.llm.close()
            self._serving = None
        until = time.monotonic() + _RETURN_S
        while gc.collect() >= 0 and not all(buffer.returned for buffer in self._closed):
            if time.monotonic() > until:
                raise ServeError("Requests that are ending still hold memory of the model that was served.")
            time.sleep(0.05)
        self._closed = ()
        return_free_pages()

    def _packing(self, step: PackProgress) -> None:
        if self._ending.is_set():
            raise _GivenUp
        self._loading = Loading(Phase.PACKING, step.done_bytes, step.total_bytes)
