"""Policies: pure code that turns observations into decisions.

`keeping` says what is worth keeping, `predictors` what will be used; `choice` makes both by name.
"""

from moestro.policy.base import Evictable, EvictionPolicy, Need
from moestro.policy.lru import LRU

__all__ = ["LRU", "Evictable", "EvictionPolicy", "Need"]
