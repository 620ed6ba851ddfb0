"""What holds for all tests: no network, no setting from outside, no store left in the user's cache."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says something about the machine, not about the code.
settings.register_profile("moestro", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moestro")

os.environ["HF_HUB_OFFLINE"] = "1"
for _name in [name for name in os.environ if name.startswith("MOESTRO_")]:
    del os.environ[_name]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stores that are packed automatically go into a folder of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESTRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
