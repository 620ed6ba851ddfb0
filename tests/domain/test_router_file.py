"""A router comes back from its file as it was; every damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from domain.domains import EXPERTS, Asked, examples, routing, routings
from moestro.domain import DomainRouter, fit_text, fit_trace, load_router, router_path, save_router
from moestro.errors import RouteError
from moestro.trace.npz import read_npz, write_npz

ASKED = Asked("2 + 2 = 4", routing("sums", 30))


@pytest.fixture(scope="module")
def router() -> DomainRouter:
    return fit_trace(routings(), experts=EXPERTS, threshold=0.4)


@pytest.fixture
def file(router: DomainRouter, tmp_path: Path) -> Path:
    save_router(router_path(tmp_path), router, fingerprint="f0")
    return router_path(tmp_path)


def test_it_comes_back(router: DomainRouter, file: Path, tmp_path: Path) -> None:
    prompt = ASKED
    assert load_router(file, fingerprint="f0").choose(prompt, ("sums",)) == router.choose(prompt, ("sums",))
    text = fit_text(examples(), threshold=0.5)
    save_router(file, text, fingerprint="f0")
    assert load_router(file, fingerprint="f0").choose(prompt, ("sums",)) == text.choose(prompt, ("sums",))
    assert [one.name for one in file.parent.iterdir()] == ["domains.npz"]


def test_the_same_router_is_the_same_bytes(router: DomainRouter, file: Path) -> None:
    before = file.read_bytes()
    save_router(file, router, fingerprint="f0")
    assert file.read_bytes() == before


def test_missing_and_of_another_model(file: Path) -> None:
    with pytest.raises(RouteError, match=r"another model.*route fit"):
        load_router(file, fingerprint="f1")
    file.unlink()
    with pytest.raises(RouteError, match="no router"):
        load_router(file, fingerprint="f0")


def test_every_damaged_byte_is_found(router: DomainRouter, file: Path) -> None:
    whole = file.read_bytes()
    for place in range(0, len(whole), 37):
        damaged = bytearray(whole)
        damaged[place] ^= 0x40
        file.write_bytes(damaged)
        named = []
        try:
            again = load_router(file, fingerprint="f0")
        except RouteError as error:
            named.append(str(error))
        else:  # a byte of the zip file's own that says nothing, such as a date
            assert again.choose(ASKED, ("sums",)) == router.choose(ASKED, ("sums",))
        assert all(str(file) in message for message in named)
    for length in range(0, len(whole), 501):
        file.write_bytes(whole[:length])
        with pytest.raises(RouteError, match=r"damaged|not a router"):
            load_router(file, fingerprint="f0")


@pytest.mark.parametrize("name", ["weights", "bias", "facts"])
def test_other_contents_are_refused(file: Path, name: str) -> None:
    arrays = read_npz(file)
    arrays[name] = np.array("{}") if name == "facts" else arrays[name] * 2
    write_npz(file, arrays)
    with pytest.raises(RouteError, match=r"domains\.npz"):
        load_router(file, fingerprint="f0")
    del arrays[name]
    write_npz(file, arrays)
    with pytest.raises(RouteError, match="not a router"):
        load_router(file, fingerprint="f0")


def test_a_place_that_cannot_be_written(router: DomainRouter, tmp_path: Path) -> None:
    (tmp_path / "variants").write_text("in the way")
    with pytest.raises(RouteError, match="cannot be written"):
        save_router(router_path(tmp_path), router, fingerprint="f0")
