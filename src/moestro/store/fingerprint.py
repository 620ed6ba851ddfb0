"""Which checkpoint a store was made from: a checksum of its small files, its headers and samples of its weights."""

from __future__ import annotations

from moestro.errors import CheckpointError
from moestro.store.assets import asset_paths
from moestro.store.checkpoint import Checkpoint
from moestro.store.checksum import RunningChecksum, to_hex
from moestro.store.quantised import entries_of

_MOST_SAMPLES = 4096
_SAMPLE_BYTES = 256


def fingerprint(checkpoint: Checkpoint) -> str:
    """16 hex digits that differ when the config, the tokenizer, a header or (almost surely) the weights differ; the
    checkpoint's origin stands before them.

    Weights are sampled (256 bytes from the middle of up to 4096 tensors, spread evenly), because reading everything
    would cost as much as packing: a checkpoint in which a single number was edited may keep its fingerprint.

    Raises:
        CheckpointError: a file cannot be read.
    """
    running = RunningChecksum()
    for path in asset_paths(checkpoint.folder):
        try:
            _add(running, path.name.encode(), path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error
    for file in checkpoint.files:
        _add(running, file.path.name.encode(), file.header_bytes)
    entries = list(entries_of(checkpoint.files))
    step = -(-len(entries) // _MOST_SAMPLES) or 1
    for file, name, entry in entries[::step]:
        start = max(0, entry.nbytes // 2 - _SAMPLE_BYTES // 2)
        running.update(file.read_bytes(name, start, min(_SAMPLE_BYTES, entry.nbytes - start)))
    return checkpoint.origin + to_hex(running.value)


def _add(running: RunningChecksum, name: bytes, content: bytes) -> None:
    for part in (name, content):
        running.update(len(part).to_bytes(8, "little"))
        running.update(part)
