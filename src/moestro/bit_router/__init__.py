"""The bit router: a tiny net per layer that says what each level of each expert would cost a token. Kept in a store."""

from __future__ import annotations

from moestro.bit_router.net import BitRouter
from moestro.bit_router.net_file import (
    BIT_ROUTER_FILE,
    encode_bit_router,
    load_bit_router,
    save_bit_router,
    stored_bit_router_bytes,
)

__all__ = [
    "BIT_ROUTER_FILE",
    "BitRouter",
    "encode_bit_router",
    "load_bit_router",
    "save_bit_router",
    "stored_bit_router_bytes",
]
