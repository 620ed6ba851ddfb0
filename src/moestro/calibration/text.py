"""From a text to the token sequences that a model is calibrated on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moestro.errors import PackError
from moestro.store.assets import has_tokenizer
from moestro.store.calibration_facts import CalibrationText
from moestro.store.checksum import checksum

WINDOW = 512
"""Most tokens of a calibration sequence."""

TOKENS = 65536
"""So many tokens are taken, where the text has them. Measured on the built-in model: half as many cost 4% more
divergence at every level."""

MOST_WINDOWS = 256
"""Models of tiny contexts get fewer tokens rather than more sequences."""

LEAST_WINDOW = 8
"""Shorter pieces say nothing about a model's usual states."""

_PROBE_PIECES = 4
_PROBE_TOKENS = 128


@dataclass(frozen=True)
class TextFile:
    """A calibration text, read: its documents, and what the store says of it."""

    facts: CalibrationText
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Windows:
    """Token sequences to calibrate on, and a short one, of pieces of them, on which layers' effects are compared."""

    sequences: tuple[tuple[int, ...], ...]
    short: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


def read_text(name: str) -> TextFile:
    """The text file `name`, or the shipped sample when it is empty.

    Raises:
        PackError: it cannot be read, is no UTF-8 text, or holds nothing.
    """
    path = Path(name).expanduser() if name else Path(str(files("moestro.calibration") / "sample.txt"))
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise PackError(
            f"The calibration text {path} cannot be read ({error.strerror}). Expected a text file; without one, "
            "--no-calibration finds the codes from the weights alone."
        ) from error
    except UnicodeDecodeError as error:
        raise PackError(f"The calibration text {path} is not UTF-8 ({error}). Convert it to UTF-8.") from error
    documents = tuple(part.strip("\n") for part in text.split("\f") if part.strip())
    if not documents:
        raise PackError(f"The calibration text {path} is empty. Give a text like those that the model will see.")
    return TextFile(CalibrationText(path.name if name else "the shipped sample", checksum(raw)), documents)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint folder, None where it has none or it cannot be loaded."""
    if not has_tokenizer(folder):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None
    return tokenizer if tokenizer.vocab_size else None


def make_windows(
    text: TextFile, tokenizer: PreTrainedTokenizerBase, *, context: int, vocabulary: int, tokens: int = TOKENS
) -> Windows:
    """Cut the text into windows: the first of every document, then the second of every document that has one, ...

    Raises:
        PackError: no window holds as many tokens as are of use, or the tokenizer is not the model's.
    """
    size = min(WINDOW, context)
    encoded: list[list[int]] = [
        tokenizer(document, verbose=False).input_ids for document in islice(text.documents, MOST_WINDOWS)
    ]
    sequences: list[tuple[int, ...]] = []
    taken = 0
    for window in _round_robin(encoded, size):
        if taken >= tokens or len(sequences) == MOST_WINDOWS:
            break
        sequences.append(window[: tokens - taken] if tokens - taken >= LEAST_WINDOW else window)
        taken += len(sequences[-1])
    if not sequences:
        raise PackError(
            f"The calibration text {text.facts.name} has no document of at least {LEAST_WINDOW} tokens. Give a longer "
            "one, or find the codes from the weights alone with --no-calibration."
        )
    largest = max(map(max, sequences))
    if largest >= vocabulary:
        raise PackError(
            f"The tokenizer gives token {largest}, the model has {vocabulary}: the tokenizer files are not this "
            "model's. Copy the model's own beside the checkpoint, or pack with --no-calibration."
        )
    return Windows(tuple(sequences), _short(sequences, min(_PROBE_TOKENS, context)))


def _round_robin(documents: Sequence[Sequence[int]], size: int) -> Iterator[tuple[int, ...]]:
    longest = max(map(len, documents))
    for start in range(0, longest, size):
        for document in documents:
            window = tuple(document[start : start + size])
            if len(window) >= min(LEAST_WINDOW, size):
                yield window


def _short(sequences: Sequence[tuple[int, ...]], size: int) -> tuple[int, ...]:
    """The beginnings of a few sequences, spread over all, one after another."""
    pieces = min(_PROBE_PIECES, len(sequences), size)
    chosen = [sequences[index * len(sequences) // pieces] for index in range(pieces)]
    return tuple(token for sequence in chosen for token in sequence[: size // pieces])
