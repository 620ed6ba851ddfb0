"""The only module that imports names of transformers which are not its documented public API.

`tests/hf/test_bridge.py` is the contract: it fails when a new transformers release moves or changes one of them. The
supported range in `pyproject.toml` is capped to what that test has seen.
"""

from __future__ import annotations

from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_EXPERTS_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "Concatenate",
    "MergeModulelist",
    "Transpose",
    "WeightConverter",
    "WeightRenaming",
    "get_model_conversion_mapping",
    "rename_source_key",
]
