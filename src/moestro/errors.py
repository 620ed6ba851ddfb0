"""Errors that a user can cause and mend.

Every message is one paragraph: it names the thing, says what was expected, and says what to do. The command line prints
it without a traceback and exits with code 2 (`--debug` shows the traceback). Broken invariants are `assert`s instead.
"""

from __future__ import annotations

from moestro.keys import PlaneKey


class MoestroError(ValueError):
    """Base of all errors that are the user's (or the machine's) to mend, not a bug of moestro."""


class UnsupportedModelError(MoestroError):
    """The model is of a kind that moestro does not run: not a mixture of experts, encoder-decoder, recurrent, ..."""


class CheckpointError(MoestroError):
    """A source checkpoint is incomplete, damaged or of an unsupported file format."""


class StoreError(MoestroError):
    """A store is missing, incomplete, damaged or of another format version."""


class PackError(MoestroError):
    """A store cannot be packed as asked: options that are not valid together, or an unusable calibration text."""


class VariantError(MoestroError):
    """A variant of a store is missing, damaged or of another base, or a checkpoint cannot become one."""


class BudgetError(MoestroError):
    """The memory given cannot be parsed or is below the least number that would do."""


class TraceError(MoestroError):
    """A trace of routing, or a collection of them, is missing, damaged, of another model or not valid."""


class RouteError(MoestroError):
    """The router of domains cannot be fitted as asked, is missing or damaged, or is of another model."""


class DiskError(MoestroError):
    """A disk cannot be measured where that was asked for."""


class ServeError(MoestroError):
    """A server cannot listen as asked: the port is taken, everybody could use it, a file of keys is unusable, ..."""


class ClientError(MoestroError):
    """A server that was asked cannot be reached, or refused."""


class RequestError(MoestroError):
    """A request cannot be served as asked: prompt too long, bad sampling parameter, ..."""


class ClosedError(RequestError):
    """A request is for a model that has been closed."""


class QueueFullError(MoestroError):
    """So many requests wait that no other is taken now. `retry_after_s` is when there is likely to be room."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServiceError(MoestroError):
    """A service does not take requests (any more): it is closing, or has failed."""


class PlaneReadError(MoestroError):
    """A plane could not be read from disk, or what was read does not match its checksum.

    `key` is the plane's (None: not a plane of the cache); `requests` are the numbers of the requests that needed it.
    """

    key: PlaneKey | None = None
    requests: frozenset[int] = frozenset()
