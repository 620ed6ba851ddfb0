"""Files of example prompts: JSON lines, or a text that is cut into prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moestro.errors import RouteError

MOST_EXAMPLES = 50
"""Of a file, if no other number is given."""

_CHARACTERS = 1000
_KEYS = ("prompt", "text", "messages")


def read_examples(path: Path, *, most: int = MOST_EXAMPLES) -> list[str]:
    """At most `most` prompts (0: all) of a file, evenly spread over it.

    A file that ends in .jsonl has a prompt a line: a string, or an object with `prompt`, `text` or `messages` (of which
    those of the user count). Any other is a UTF-8 text: documents, apart by form feeds, are cut at line ends into
    prompts of about 1000 characters.

    Raises:
        RouteError: it cannot be read, is no such file, or holds no prompt; the message names file and line.
    """
    try:
        content = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise RouteError(f"{path} cannot be read ({error.strerror}). Expected a file of example prompts.") from error
    except UnicodeDecodeError as error:
        raise RouteError(f"{path} is not UTF-8 text ({error}). Expected example prompts.") from error
    found = _lines(content, path) if path.suffix.lower() == ".jsonl" else _cut(content)
    found = [one for one in found if one.strip()]
    if not found:
        raise RouteError(f"{path} holds no prompt. Expected text, or JSON lines in a file that ends in .jsonl.")
    count = min(most or len(found), len(found))
    return [found[(2 * index + 1) * len(found) // (2 * count)] for index in range(count)]


def text_of_messages(messages: Any) -> str:
    """What the user says in a conversation, as OpenAI writes it. Raises ValueError when it is no conversation."""
    if not isinstance(messages, Sequence) or not all(isinstance(one, dict) for one in messages):
        raise ValueError("messages is no list of objects")
    contents = [one.get("content") for one in messages if one.get("role") == "user"]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str))


def _lines(content: str, path: Path) -> list[str]:
    found = []
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                found.append(_prompt(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise RouteError(
                    f"Line {number} of {path} is no example prompt ({error}). Expected a JSON string, or an object "
                    f"with one of {', '.join(_KEYS)}."
                ) from error
    return found


def _prompt(line: Any) -> str:
    if isinstance(line, dict):
        line = next(
            (line[key] if key != "messages" else text_of_messages(line[key]) for key in _KEYS if key in line), None
        )
    if not isinstance(line, str):
        raise ValueError("no text in it")
    return line


def _cut(content: str) -> list[str]:
    """Lines are put together until they are long enough; one that is much too long is a prompt of its own, cut."""
    found = []
    for document in content.split("\f"):
        prompt = ""
        for line in document.splitlines(keepends=True):
            prompt += line
            while len(prompt) >= _CHARACTERS:
                end = len(prompt) if len(prompt) < 2 * _CHARACTERS else _CHARACTERS
                found.append(prompt[:end])
                prompt = prompt[end:]
        found.append(prompt)
    return found
