"""JSON files with their own checksum inside, and one text only for one content. Specified in docs/format.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from moestro.errors import MoestroError, StoreError
from moestro.store.checksum import checksum, to_hex
from moestro.store.fields import Fields

T = TypeVar("T")


def seal(body: dict[str, Any]) -> bytes:
    """The text of a file: sorted keys, no spaces, ASCII, `checksum` among the keys, a newline at the end.

    Raises:
        StoreError: the body holds something that JSON cannot hold.
    """
    return _canonical({**body, "checksum": to_hex(checksum(_canonical(body)))}) + b"\n"


def parse_json(raw: bytes) -> Any:
    """What a text holds. Raises ValueError when it is none."""
    try:
        return json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON, {error}") from error


def unseal(
    body: dict[str, Any],
    raw: bytes,
    *,
    parse: Callable[[Fields], T],
    encode: Callable[[T], bytes],
    damaged: Callable[[str], MoestroError],
) -> T:
    """What `parse` makes of the body of the text `raw`, which has to be the one that `encode` makes of that again.

    Raises what `damaged` makes of the reason, where the text is not as it was written.
    """
    stated = body.pop("checksum", None)
    try:
        actual = to_hex(checksum(_canonical(body)))
        found = parse(Fields(body, "the manifest"))
        same_text = actual == stated and encode(found) == raw
    except (StoreError, ValueError, OverflowError) as error:
        raise damaged(str(error)) from error
    if not same_text:
        raise damaged(f"its checksum is {actual}, expected {stated!r:.40}")
    return found


def _canonical(body: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except ValueError as error:
        raise StoreError(f"The manifest cannot be written as JSON: {error}. Mend the model's config.json.") from error
    return text.encode("ascii")
