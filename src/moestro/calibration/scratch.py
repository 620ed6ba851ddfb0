"""Outputs of finished layers, kept so that an interrupted calibration goes on where it was.

A file holds the fp32 outputs of all sequences one after another, and a checksum that covers what they belong to.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from moestro.store.checksum import RunningChecksum
from moestro.store.disk import sync_file, write_all
from moestro.store.dtypes import byte_view

_TRAILER = 8


class LayerScratch:
    """The files in `folder`, of the calibration that `identity` names."""

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder, self._identity = folder, identity.encode()

    def save(self, layer: int, outputs: Sequence[torch.Tensor]) -> None:
        """Keep the outputs of a layer; they are on the disk when this returns. Raises OSError."""
        self._folder.mkdir(exist_ok=True)
        path = self._path(layer)
        temporary = path.with_suffix(".tmp")
        running = self._checksum(layer)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for output in outputs:
                data = byte_view(output)
                running.update(data)
                write_all(descriptor, data)
            write_all(descriptor, running.value.to_bytes(_TRAILER, "little"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        sync_file(self._folder)

    def load(self, layer: int, shapes: Sequence[torch.Size]) -> list[torch.Tensor] | None:
        """The outputs of a layer, None where they were not kept or are damaged."""
        outputs = [torch.empty(shape) for shape in shapes]
        running = self._checksum(layer)
        try:
            with self._path(layer).open("rb", buffering=0) as file:
                for output in outputs:
                    view = byte_view(output)
                    if _fill(file.fileno(), view) != len(view):
                        return None
                    running.update(view)
                trailer = file.read(_TRAILER + 1)
        except FileNotFoundError:
            return None
        return outputs if trailer == running.value.to_bytes(_TRAILER, "little") else None

    def _checksum(self, layer: int) -> RunningChecksum:
        running = RunningChecksum()
        running.update(self._identity + f" {layer}".encode())
        return running

    def _path(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:05d}.outputs"


def _fill(descriptor: int, view: memoryview) -> int:
    done = 0
    while done < len(view):
        count = os.readv(descriptor, [view[done:]])
        if count == 0:
            break
        done += count
    return done
