"""What holds for all tests: no network, no setting from outside, no store left in the user's cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# How long an example takes says something about the machine, not about the code.
settings.register_profile("moestro", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moestro")

os.environ["HF_HUB_OFFLINE"] = "1"
for _name in [name for name in os.environ if name.startswith("MOESTRO_")]:
    del os.environ[_name]

# Workers share the cores: with threads that wait for each other, what torch computes here takes half as long again.
torch.set_num_threads(1)


_LONGEST = (
    "runtime/test_budget.py",
    "runtime/test_budget_variants.py",
    "calibration/test_apart.py",
    "cli/test_eval.py",
    "cli/test_bench.py",
    "runtime/test_budget_quantised.py",
    "server/test_reload.py",
    "server/test_variants.py",
    "cli/test_commands.py",
    "engine/test_evaluate.py",
    "cli/test_generate.py",
)
"""Files that take longest, most of them because they start processes. (xdist would begin with those of most tests.)"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that workers that take a file at a time end together."""
    rank = {f"tests/{name}": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """What a test does to the number of threads is undone."""
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def raw_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the built-in model, its weights as they are (54 MB). Do not change it."""
    from moestro.store.locate import locate_source  # not before the environment is as above
    from packing import pack_raw

    return pack_raw(locate_source("tiny-qwen3moe-28m"), tmp_path_factory.mktemp("shipped") / "store").path


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stores that are packed automatically go into a folder of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESTRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
