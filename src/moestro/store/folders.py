"""Where moestro keeps files of its own. Imports nothing heavy: commands that open no model ask too."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where stores that were packed automatically are kept: `MOESTRO_CACHE`, or ~/.cache/moestro."""
    return Path(os.environ.get("MOESTRO_CACHE") or Path.home() / ".cache" / "moestro")
