"""Texts cut into windows of tokens, over which a model's quality is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from moestro.errors import RequestError


@dataclass(frozen=True)
class Text:
    """A text to be measured on; `name` is what results and messages call it."""

    name: str
    content: str


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of text number `text`. Each from number `first_scored` on is predicted from those before."""

    text: int
    token_ids: tuple[int, ...]
    first_scored: int


def cut_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], *, window: int, max_tokens: int = 0
) -> list[Window]:
    """Cut each text into windows of `window` tokens that do not overlap; what is left at its end is not used.

    A tokenizer that puts special tokens before a text has them put before every window, inside its length. The first
    token of a window is not scored. `max_tokens` (0: all) bounds the tokens of all windows together: each text then
    gives as many windows as the others, as far as it has them, evenly spread over it.

    Raises:
        RequestError: a text is empty or shorter than a window, or `max_tokens` is not a window for each text.
    """
    prefix = _special_prefix(tokenizer)
    if window <= len(prefix) + 1:
        raise RequestError(
            f"A window of {window} tokens leaves nothing to predict: this tokenizer puts {len(prefix)} special "
            f"token(s) before a text. Give a window of at least {len(prefix) + 2}."
        )
    cut = [_windows_of(number, text, tokenizer, prefix, window) for number, text in enumerate(texts)]
    if not max_tokens:
        return [one for windows in cut for one in windows]
    if max_tokens < window * len(cut):
        raise RequestError(
            f"max_tokens is {max_tokens}, expected at least {window * len(cut)}: a window of {window} tokens for "
            f"each of {len(cut)} text(s)."
        )
    wanted = _shares([len(windows) for windows in cut], max_tokens // window)
    return [one for windows, count in zip(cut, wanted, strict=True) for one in _evenly(windows, count)]


def _special_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text (usually none, or one that begins a text)."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def _windows_of(
    number: int, text: Text, tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...], window: int
) -> list[Window]:
    if not text.content:
        raise RequestError(f"{text.name} is empty. Expected text of at least {window} tokens.")
    token_ids: list[int] = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    step = window - len(prefix)
    if len(token_ids) < step:
        raise RequestError(
            f"{text.name} has {len(token_ids)} tokens, fewer than a window of {step} takes. Give a longer text or a "
            "shorter window."
        )
    starts = range(0, len(token_ids) - step + 1, step)
    first_scored = max(1, len(prefix))
    return [Window(number, prefix + tuple(token_ids[start : start + step]), first_scored) for start in starts]


def _shares(available: Sequence[int], total: int) -> list[int]:
    """How many windows each text gives so that there are `total` (or all there are): as equal as can be."""
    shares = [0] * len(available)
    left = min(total, sum(available))
    while left:
        open_texts = [index for index, count in enumerate(available) if shares[index] < count]
        each, rest = divmod(left, len(open_texts))
        for place, index in enumerate(open_texts):
            take = min(available[index] - shares[index], each + (place < rest))
            shares[index] += take
            left -= take
    return shares


def _evenly(windows: Sequence[Window], count: int) -> list[Window]:
    """`count` of the windows, evenly spread: the middles of `count` equal stretches."""
    return [windows[(2 * index + 1) * len(windows) // (2 * count)] for index in range(count)]
