"""Loading a store's tokenizer."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moestro.errors import StoreError
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
    return tokenizer
