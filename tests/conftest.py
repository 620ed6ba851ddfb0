"""What holds for all tests: no network, no setting from outside, no store left in the user's cache."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
for _name in [name for name in os.environ if name.startswith("MOESTRO_")]:
    del os.environ[_name]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stores that are packed automatically go into a folder of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESTRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
