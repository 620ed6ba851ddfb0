"""Whether a checkpoint is a fine-tune of a store's base: same architecture, vocabulary and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moestro.errors import VariantError
from moestro.hf.skeleton import config_from_dict, load_config
from moestro.store.assets import VOCABULARIES
from moestro.store.reader import Store

_UNIMPORTANT = frozenset(
    {
        *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "auto_map"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "quantization_config", "initializer_range"),
        *("output_router_logits", "output_attentions", "output_hidden_states", "router_aux_loss_coef", "id2label"),
        *("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout", "router_jitter_noise", "label2id"),
        *("return_dict", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder", "input_jitter_noise"),
    }
)
"""Fields of a config that say nothing about what the weights compute."""


def check_config(store: Store, folder: Path, name: str) -> None:
    """Raise VariantError unless the model in `folder` has the architecture of the store."""
    ours, theirs = config_from_dict(store.config_dict).to_dict(), load_config(folder).to_dict()
    if ours["model_type"] != theirs["model_type"]:
        raise VariantError(
            f"{name} is of another architecture: {theirs['model_type']}, the store {store.path} is "
            f"{ours['model_type']}. Give a fine-tune of the store's base."
        )
    for key in sorted({*ours, *theirs} - _UNIMPORTANT):
        if ours.get(key) != theirs.get(key):
            what = "has another vocabulary" if key == "vocab_size" else "is another model"
            raise VariantError(
                f"{name} {what}: {key} is {_short(theirs.get(key))} in its config.json, and "
                f"{_short(ours.get(key))} in that of the store {store.path}. Give a fine-tune of the store's base."
            )


def check_tokenizer(store: Store, folder: Path, name: str) -> None:
    """Raise VariantError when the model in `folder` comes with another tokenizer than the store."""
    for file in VOCABULARIES:
        ours, theirs = store.path / file, folder / file
        if ours.is_file() and theirs.is_file() and _vocabulary(ours) != _vocabulary(theirs):
            raise VariantError(
                f"{name} has another tokenizer than the store {store.path}: their {file} differ, so the same text is "
                "other tokens. Give a fine-tune that kept the tokenizer of its base."
            )


def _vocabulary(path: Path) -> Any:
    """What says which text is which token; the whole file where that is not known."""
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        if path.name != "tokenizer.json":
            return content
        added = {one["content"]: one["id"] for one in content.get("added_tokens", ())}
        return content["model"]["vocab"], content["model"].get("merges"), added
    except (ValueError, KeyError, TypeError):
        return raw


def _short(value: Any) -> str:
    return f"{json.dumps(value, default=str):.80}"
