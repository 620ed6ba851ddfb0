"""Loading a store's tokenizer, and which tokens end a text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from moestro.errors import RequestError, StoreError
from moestro.store.reader import Store


def load_tokenizer(store: Store) -> PreTrainedTokenizerBase:
    """The tokenizer that came with the model.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(store.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(
            f"The tokenizer in {store.path} cannot be loaded ({error}). Expected the tokenizer files of the model; "
            "pack the store again from a complete checkpoint."
        ) from error
    if tokenizer.vocab_size == 0:
        raise StoreError(
            f"There is no tokenizer in {store.path}: the checkpoint it was packed from had none. Put the model's "
            "tokenizer files (tokenizer.json, tokenizer_config.json) beside the checkpoint and pack it again."
        )
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of a text. Raises RequestError when it is not valid Unicode."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"The prompt is not valid Unicode text ({error.reason}).") from error
    token_ids: list[int] = tokenizer(prompt)["input_ids"]
    return token_ids


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    model: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt that the chat template of `model` makes of `messages`, of tools that may be called and of settings.

    Raises:
        RequestError: it has none, or it does not take these messages.
    """
    if not tokenizer.chat_template:
        raise RequestError(f"{model} has no chat template. Give the prompt as plain text instead.")
    try:
        conversation = [dict(message) for message in messages]
        # Ids, not text: templates write special tokens themselves, and encoding text would add them once more.
        token_ids = tokenizer.apply_chat_template(
            conversation,
            tools=[dict(tool) for tool in tools] if tools else None,
            **{**(settings or {}), "add_generation_prompt": True, "return_dict": False, "tokenize": True},
        )
    except Exception as error:  # templates are programs of the model's authors and raise what they like
        raise RequestError(f"The model's chat template does not take these messages: {error}") from error
    return list(cast(list[int], token_ids))


def end_token_ids(store: Store, config: PreTrainedConfig) -> frozenset[int]:
    """End-of-text tokens: of generation_config.json where it names them, else of the model's config.

    Raises:
        StoreError: the file is damaged, or what it names are no token ids.
    """
    path = store.path / "generation_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        ids = settings.get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} cannot be read as a JSON object ({error}). Pack the store again.") from error
    ids = config.eos_token_id if ids is None else ids
    found = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token, int) for token in found):
        raise StoreError(f"The eos_token_id of {store.path} is {ids!r}. Expected a token id or a list of them.")
    return frozenset(found)


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The model's chat template, empty if there is none. Of several, the first."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else str(next(iter(template.values()), ""))
