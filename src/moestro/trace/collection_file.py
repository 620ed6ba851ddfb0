"""Collections on disk, in the store of their model: kept whole, and shared by all processes that run it.

The file is an npz of `version`, `model` (the fingerprint of the checkpoint), and for each phase `PHASE_ids` int64 [n]
and `PHASE_counts` uint16 or uint32 [n, L, E].

Shapes: n entries, L MoE layers, E experts per layer.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from moestro.errors import TraceError
from moestro.trace.checks import Checks
from moestro.trace.collection import MOST_COUNT, Collections
from moestro.trace.npz import read_npz, write_npz

COLLECTION_NAME = "requests.npz"
"""In the folder of a store."""
FORMAT_VERSION = 1
PHASES = ("prefill", "decode")

_Entries = dict[int, np.ndarray]
"""Counts [L, E] by id, oldest first."""


class _OtherModelError(TraceError):
    """The file is whole, but not for us: it stays where it is."""


class CollectionFile(Collections):
    """The collections of a model, prefill and decode, and the file that they come from and go to.

    Requests' matrices are inserted into `prefill` and `decode`. `save` takes in what other processes have added to the
    file since, and adds ours.

    Args:
        path: of the file; it need not exist.
        model: fingerprint of the checkpoint.
        capacity: of each phase (None: by the size of the model).

    Raises:
        TraceError: the file is of another model or format version, or cannot be read. A damaged one is set aside
            instead, with a warning.
    """

    def __init__(self, path: Path, *, model: str, layers: int, experts: int, capacity: int | None = None) -> None:
        super().__init__(layers, experts, capacity=capacity)
        self.path, self.model, self._shape = path, model, (layers, experts)
        self._met: dict[str, set[int]] = {phase: set() for phase in PHASES}
        self._saved_versions = (0, 0)
        self._merge(self._read_at_start())
        self._saved_versions = self._versions

    @property
    def changed(self) -> bool:
        """Whether there is something to save."""
        return self._versions != self._saved_versions

    def save(self) -> None:
        """Merge with what other processes have saved, and write. Without changes nothing is written.

        Raises:
            TraceError: the file cannot be written, or is by now of another model.
        """
        if not self.changed:
            return
        try:
            with self._lock():
                self._merge(self._read_or_set_aside())
                write_npz(self.path, self._arrays(), compress=False)
        except OSError as error:
            raise TraceError(
                f"{self.path} cannot be written: {error.strerror or error}. What requests did is not kept beyond this "
                "process; make the folder writable, copy the store to where it is, or open it with learn off."
            ) from error
        self._saved_versions = self._versions

    @property
    def _versions(self) -> tuple[int, int]:
        return self.prefill.version, self.decode.version

    def _merge(self, found: dict[str, _Entries]) -> None:
        """Insert what we have not met. What we met and gave up for something newer stays away."""
        for phase, collection in self.phases.items():
            met = self._met[phase]
            met.update(collection.ids_n.tolist())
            for one, counts_LE in found.get(phase, {}).items():
                if one not in met:
                    collection.insert(counts_LE, id=one)
                    met.add(one)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Exclusive among processes; freed by the system when one dies. Raises OSError."""
        descriptor = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _read_at_start(self) -> dict[str, _Entries]:
        """Without a lock, since a file is only ever replaced whole and the folder may be one that cannot be written."""
        try:
            return self._read()
        except _OtherModelError:
            raise
        except TraceError as error:
            damage = error
        except OSError as error:
            raise TraceError(
                f"{self.path} cannot be read: {error.strerror or error}. Check its permissions."
            ) from error
        try:
            with self._lock():
                return self._read_or_set_aside()
        except OSError:
            _warn("%s The file cannot be set aside; past requests are not known.", damage)
            return {}

    def _read_or_set_aside(self) -> dict[str, _Entries]:
        """The file's entries; a damaged file is renamed. Call it under the lock. Raises OSError."""
        try:
            return self._read()
        except _OtherModelError:
            raise
        except TraceError as error:
            aside = _free_name(self.path)
            self.path.rename(aside)
            _warn("%s It is set aside as %s; past requests are learned anew.", error, aside.name)
            return {}

    def _read(self) -> dict[str, _Entries]:
        """Nothing when there is no file. Raises TraceError, OSError."""
        try:
            arrays = read_npz(self.path)
        except FileNotFoundError:
            return {}
        checks = Checks(str(self.path))
        self._check_model(arrays, checks)
        return {phase: _entries(arrays, phase, self._shape, checks) for phase in PHASES}

    def _check_model(self, arrays: dict[str, np.ndarray], checks: Checks) -> None:
        expected = {"version", "model", *(f"{phase}_{part}" for phase in PHASES for part in ("ids", "counts"))}
        if "version" not in arrays or arrays["version"].shape != () or arrays["version"].dtype.kind != "i":
            raise checks.fail("version", "is missing or no number: this is not a collection of requests.")
        if int(arrays["version"]) != FORMAT_VERSION:
            raise _OtherModelError(
                f"{self.path} is of format version {int(arrays['version'])}, expected {FORMAT_VERSION}. Delete it, or "
                "use the moestro that wrote it."
            )
        if arrays.keys() != expected:
            raise checks.fail("keys", f"are {', '.join(sorted(arrays))}, expected {', '.join(sorted(expected))}.")
        checks.array("model", arrays["model"], (np.str_,), ())
        found = str(arrays["model"])
        if found != self.model:
            raise _OtherModelError(
                f"{self.path} is of another model ({found}), expected {self.model}. Delete it, or put it back into the "
                "store that it is from."
            )

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {
            "version": np.array(FORMAT_VERSION, dtype=np.int64),
            "model": np.array(self.model),
        }
        for phase, collection in self.phases.items():
            counts_nLE = collection.all_counts()
            kind = np.uint16 if counts_nLE.max(initial=0) < 1 << 16 else np.uint32
            arrays[f"{phase}_ids"] = collection.ids_n
            arrays[f"{phase}_counts"] = counts_nLE.astype(kind)
        return arrays


def _entries(arrays: dict[str, np.ndarray], phase: str, shape: tuple[int, int], checks: Checks) -> _Entries:
    ids_n, counts_nLE = arrays[f"{phase}_ids"], arrays[f"{phase}_counts"]
    checks.array(f"{phase}_ids", ids_n, (np.int64,), (len(counts_nLE),))
    checks.array(f"{phase}_counts", counts_nLE, (np.uint16, np.uint32), (len(ids_n), *shape))
    if len(set(ids_n.tolist())) != len(ids_n):
        raise checks.fail(f"{phase}_ids", "has an id twice.")
    if not counts_nLE.any(axis=(1, 2)).all() or counts_nLE.max(initial=0) >= MOST_COUNT:
        raise checks.fail(f"{phase}_counts", f"has an entry without tokens, or a count of {MOST_COUNT} or more.")
    return dict(zip(ids_n.tolist(), counts_nLE, strict=True))


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return aside


def _warn(message: str, *values: object) -> None:
    logging.getLogger("moestro").warning(message, *values)
