"""Requests that name variants: their tokens, who waits for room, what is added and removed meanwhile."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.test_service import Listener
from engine.tiny import tiny_checkpoint
from moestro import LLM, SamplingParams
from moestro.engine.service import Service
from moestro.errors import BudgetError, PlaneReadError, RequestError, VariantError
from moestro.store.reader import Store
from moestro.store.variant_file import open_variant, remove_variant
from moestro.store.variant_name import split_variant
from moestro.trace.collection_file import COLLECTION_NAME
from variant_stores import Family, pack_family

PROMPTS = ["def main(argv):\n    ", "The dictionary", "Der Befehl", "1 + 2 ="]
LONG_PROMPT = [(7 * place) % 4000 + 3 for place in range(70)]
GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
RANDOM = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=5)
MEMORY = "40MiB"
OPENED = {"context": 128, "max_sequences": 4}


@pytest.fixture(scope="module", params=["raw", "nested"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """With the variants ada and bob. Do not change it."""
    return _family(tmp_path_factory.mktemp("shared"), raw=request.param == "raw")


@pytest.fixture
def own(tmp_path: Path) -> Family:
    """One that a test may change."""
    return _family(tmp_path, raw=False)


def _family(folder: Path, *, raw: bool) -> Family:
    family = pack_family(tiny_checkpoint(folder / "base"), folder / "store", raw=raw)
    family.add("ada", seed=1)
    family.add("bob", seed=2, bits=4)
    return family


@pytest.fixture(scope="module")
def llm(shared: Family) -> Iterator[LLM]:
    with LLM(shared.store, memory=MEMORY, **OPENED) as opened:
        yield opened


def _tokens(llm: LLM, prompt: str | list[int], variant: str, sampling: SamplingParams = GREEDY) -> list[int]:
    return llm.generate(prompt, sampling, variant=variant)[0].token_ids


def test_requests_of_several_variants_get_the_tokens_they_get_alone(llm: LLM) -> None:
    names = ["ada", "", "bob", "ada"]
    for sampling in (GREEDY, RANDOM):
        alone = [_tokens(llm, prompt, name, sampling) for prompt, name in zip(PROMPTS, names, strict=True)]
        together = llm.generate(PROMPTS, sampling, variant=names)
        assert [one.token_ids for one in together] == alone
    of_one_prompt = {tuple(_tokens(llm, PROMPTS[0], name)) for name in ("", "ada", "bob")}
    assert len(of_one_prompt) == 3


def test_a_model_is_opened_with_a_variant(shared: Family, llm: LLM) -> None:
    ada, base = _tokens(llm, PROMPTS[0], "ada"), _tokens(llm, PROMPTS[0], "")
    with LLM(f"{shared.store}:ada", memory=MEMORY, **OPENED) as opened:
        assert opened.generate(PROMPTS[0], GREEDY)[0].token_ids == ada
        assert _tokens(opened, PROMPTS[0], "") == base
        assert [token for delta in opened.stream(PROMPTS[0], GREEDY) for token in delta.token_ids] == ada
    with LLM(shared.store, memory=MEMORY, variant="ada", **OPENED) as opened:
        assert opened.generate(PROMPTS[0], GREEDY)[0].token_ids == ada


def test_a_name_that_is_none_is_refused_with_those_there_are(shared: Family, llm: LLM) -> None:
    assert llm.variants() == ("ada", "bob")
    with pytest.raises(VariantError, match=r"no variant named cleo.*ada, bob"):
        llm.generate(PROMPTS[0], GREEDY, variant="cleo")
    with pytest.raises(VariantError, match=r"cannot be named '\.\./ada'"):
        llm.generate(PROMPTS[0], GREEDY, variant="../ada")
    with pytest.raises(VariantError, match="cleo"):
        LLM(shared.store, memory=MEMORY, variant="cleo", **OPENED)
    with pytest.raises(RequestError, match="2 prompts came with 3 variants"):
        llm.generate(PROMPTS[:2], GREEDY, variant=["ada", "bob", ""])


def test_what_was_computed_for_one_variant_serves_no_other(llm: LLM) -> None:
    def cached(variant: str) -> int:
        return llm.generate(LONG_PROMPT, SamplingParams(max_tokens=2), variant=variant)[0].cached_tokens

    assert [cached(""), cached("ada"), cached("bob")] == [0, 0, 0]
    assert [cached(""), cached("ada"), cached("bob")] == [64, 64, 64]


def _least_for(store: Path, variant: str, **more: str) -> int:
    """The memory that the refusal names."""
    with pytest.raises(BudgetError) as refused:
        LLM(store, memory="1MiB", **OPENED, **more)
    least = int(re.findall(r"\((\d+) bytes\)", str(refused.value))[0])
    opened = LLM(store, memory=least, **OPENED, **more)
    with opened, pytest.raises(BudgetError, match=f"variant {variant}") as refused:
        opened.generate(PROMPTS[0], GREEDY, variant=variant)
    return int(re.findall(r"\((\d+) bytes\)", str(refused.value))[0])


def test_who_finds_no_room_waits_and_what_never_fits_is_refused_with_the_least(shared: Family, llm: LLM) -> None:
    names = ["ada", "bob", "", "ada"]
    alone = [_tokens(llm, prompt, name) for prompt, name in zip(PROMPTS, names, strict=True)]
    least = max(_least_for(shared.store, name) for name in ("ada", "bob"))
    with LLM(shared.store, memory=least, **OPENED) as small:
        variants = small._model.variants
        answers = [small._submit(prompt, GREEDY, name) for prompt, name in zip(PROMPTS, names, strict=True)]
        most = 0
        while not all(answer.finished for answer in answers):
            small.engine.step()
            most = max(most, len(variants.resident))
        assert most == 1
        assert [answer.sequence.token_ids for answer in answers] == alone
        assert variants.resident.keys() == {"ada"}
        small.engine.forget()
        assert not variants.resident


def test_a_removed_variant_goes_with_its_last_request(own: Family) -> None:
    with LLM(own.store, memory=MEMORY, **OPENED) as llm:
        long = SamplingParams(max_tokens=100, ignore_eos=True)
        expected = _tokens(llm, PROMPTS[0], "ada", long)
        with Service(llm) as service:
            llm.engine.forget()
            running, waiting = Listener(), Listener()
            service.submit(llm.encode(PROMPTS[0]), long, running, variant="ada")
            service.submit(llm.encode(PROMPTS[0]), long, waiting, variant="ada")
            while not running.has_begun():
                time.sleep(0.001)
            remove_variant(own.store, "ada")
            assert llm.variants() == ("bob",)
            with pytest.raises(VariantError, match=r"no variant named ada.*bob"):
                service.submit(llm.encode(PROMPTS[0]), long, running, variant="ada")
            for listener in (running, waiting):
                listener.last()
                assert listener.token_ids == expected
        assert not llm._model.variants.resident
        assert llm._model.shares.lent_bytes == 0
        assert all(plane < 4 for _, _, plane in llm._model.runner.planes.resident())


def test_variants_are_added_and_replaced_while_the_model_is_open(own: Family) -> None:
    with LLM(own.store, memory=MEMORY, **OPENED) as llm:
        before, bob = _tokens(llm, PROMPTS[0], "ada"), _tokens(llm, PROMPTS[0], "bob")
        own.add("cleo", seed=3)
        cleo = _tokens(llm, PROMPTS[0], "cleo")
        remove_variant(own.store, "ada")
        own.add("ada", seed=3)
        assert _tokens(llm, PROMPTS[0], "ada") == cleo != before
        assert _tokens(llm, PROMPTS[0], "bob") == bob


def test_more_variants_than_have_a_number_take_turns(own: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.runtime.variants.MOST_VARIANTS", 1)
    with LLM(own.store, memory=MEMORY, **OPENED) as llm:
        alone = [_tokens(llm, PROMPTS[0], name) for name in ("ada", "bob", "ada")]
        assert alone[0] == alone[2] != alone[1]
        together = llm.generate([PROMPTS[0]] * 3, GREEDY, variant=["ada", "bob", "ada"])
        assert [one.token_ids for one in together] == alone


def _damage(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))


def test_damage_ends_the_requests_that_it_hits_and_no_others(own: Family) -> None:
    stored = open_variant(Store.open(own.store), "ada")
    for delta in stored.manifest.planes:
        _damage(stored.planes_file, delta.offset + 64)
    bob = open_variant(Store.open(own.store), "bob")
    _damage(bob.dense_file, next(iter(bob.dense_deltas.values())).offset + 70)
    with LLM(own.store, memory=MEMORY, **OPENED) as llm:
        base = _tokens(llm, PROMPTS[2], "")
        answers = [
            llm._submit(prompt, GREEDY, name) for prompt, name in zip(PROMPTS[:3], ["ada", "bob", ""], strict=True)
        ]
        while not all(answer.finished for answer in answers):
            llm.engine.step()
        assert [answer.sequence.finish_reason for answer in answers] == ["error", "error", "length"]
        assert answers[2].sequence.token_ids == base
        errors = [str(answer.sequence.error) for answer in answers]
        assert re.search(r"variant's plane of expert \d+ of MoE layer 0 .*variants/ada.*checksum", errors[0])
        assert re.search(r"variant bob .*variants/bob.*damaged", errors[1])
        with pytest.raises(PlaneReadError, match="bob"):
            llm.generate(PROMPTS[0], GREEDY, variant="bob")
        assert llm._model.shares.lent_bytes == 0 or llm._model.variants.resident.keys() == {"ada"}


def test_each_variant_remembers_its_own_requests(own: Family) -> None:
    least = _least_for(own.store, "ada", learn="on")
    with LLM(own.store, memory=least, learn="on", **OPENED) as llm:
        assert llm._model.history is not None
        llm.generate(PROMPTS[:3], GREEDY, variant=["ada", "", "ada"])
        assert len(llm._model.history.collections.decode) == 1
    folder = own.store / "variants"
    assert (own.store / COLLECTION_NAME).is_file()
    assert (folder / "ada" / COLLECTION_NAME).is_file()
    assert not (folder / "bob" / COLLECTION_NAME).exists()


def test_names(tmp_path: Path) -> None:
    assert split_variant("some/store:ada") == ("some/store", "ada")
    assert split_variant("tiny:auto") == ("tiny", "auto")
    for name in ("tiny", "owner/name", "a:b/c", ":ada", str(tmp_path / "x")):
        assert split_variant(name) == (name, "")
    folder = tmp_path / "odd:name"
    folder.mkdir()
    assert split_variant(str(folder)) == (str(folder), "")
    assert split_variant(f"{folder}:ada") == (str(folder), "ada")
