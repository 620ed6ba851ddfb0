"""A store's router: fitted, judged, asked by LLM and Service; it follows the file and the variants that there are."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue

import pytest

from domain.domains import examples, texts
from engine.tiny import tiny_checkpoint
from moestro import LLM, SamplingParams
from moestro.client.conversation import Local, Told
from moestro.config import ChatOptions, RouteOptions, RuntimeOptions
from moestro.domain import BASE, router_path
from moestro.engine.domains import choosing, fit_router, judge_router
from moestro.engine.events import Event
from moestro.engine.service import Service
from moestro.errors import RouteError
from moestro.store.reader import Store
from moestro.store.variant_file import remove_variant
from packing import pack_raw
from routed_store import routed_store

SHORT = SamplingParams(max_tokens=4)
SMALL = RuntimeOptions(memory="64MB")
TRACE = RouteOptions(classifier="trace", layers=2, threshold=0.0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return routed_store(tmp_path_factory.mktemp("routed"), examples())


@pytest.fixture
def store(shared: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(shared, tmp_path / "store"))


def prompt_of(domain: str) -> str:
    return texts(domain, 1, words=15, seed=99)[0]


def test_auto_is_the_variant_that_is_chosen(shared: Path) -> None:
    prompts = [prompt_of(domain) for domain in (BASE, "code", "sums")]
    with LLM(f"{shared}:auto", memory="64MB", max_sequences=3) as llm:
        chosen = llm.generate(prompts, SHORT)
        named = llm.generate(prompts, SHORT, variant=["", "code", "sums"])
        streamed = [list(llm.stream(prompt, SHORT))[-1].completion for prompt in prompts]
    assert [one.choice.variant if one.choice else "?" for one in chosen] == [None, "code", "sums"]
    assert [one.token_ids for one in chosen] == [one.token_ids for one in named]
    assert [one.token_ids for one in streamed if one] == [one.token_ids for one in named]
    assert all(one.choice is None for one in named)
    assert len({tuple(one.token_ids) for one in named}) == 3


def test_judging_counts_what_is_right_and_what_it_took(store: Path) -> None:
    opened = Store.open(store)
    held_out = {domain: texts(domain, 5, words=30, seed=7) for domain in examples()}
    by_text = judge_router(opened, held_out)
    assert by_text.accuracy == by_text.balanced == 1.0
    assert (by_text.classifier, by_text.prompts, by_text.domain_tokens, by_text.domain_s) == ("text", 15, 0, 0.0)
    fit_router(opened, examples(), TRACE, opening=SMALL)
    by_trace = judge_router(opened, held_out, opening=SMALL)
    assert by_trace.classifier == "trace"
    assert by_trace.accuracy > 0.6  # a random model routes by tokens, and that is told apart well enough
    assert by_trace.domain_tokens > 15
    assert 0 < by_trace.domain_s <= by_trace.choose_s
    assert sum(sum(one.answered_by.values()) for one in by_trace.domains.values()) == 15


def test_the_same_choice_from_service_and_alone_while_others_run(store: Path) -> None:
    opened = Store.open(store)
    fit_router(opened, examples(), TRACE, opening=SMALL)
    prompts = [prompt_of(domain) for domain in examples()]
    with choosing(opened, SMALL) as (_, choose):
        alone = [choose(prompt) for prompt in prompts]
    news: SimpleQueue[Event] = SimpleQueue()
    # One sequence's KV rows are all there is: choosing waits until the requests that hold them are done.
    with LLM(store, memory="64MB", context=128, max_sequences=1, lend_kv=False) as llm, Service(llm) as service:
        for _ in range(3):
            service.submit(llm.encode("Once upon"), SamplingParams(max_tokens=100, ignore_eos=True), news.put)
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(service.choose, prompts))
        stats = llm.stats()
    assert [(one.domain, one.confidence) for one in together] == [(one.domain, one.confidence) for one in alone]
    assert stats.domain_tokens == sum(one.tokens for one in together) > 0
    assert stats.domain_s > 0


def test_variants_that_are_removed_are_not_chosen_and_files_are_followed(store: Path) -> None:
    prompt = prompt_of("code")
    with LLM(store, memory="64MB") as llm:
        assert llm.choose(prompt).variant == "code"
        assert llm.choose(llm.encode(prompt)).variant == "code"
        remove_variant(store, "code")
        gone = llm.choose(prompt)
        assert (gone.variant, gone.domain) == (None, "code")
        assert llm.generate(prompt, SHORT, variant="auto")[0].token_ids == llm.generate(prompt, SHORT)[0].token_ids
        swapped = {BASE: examples()["code"], "sums": examples()[BASE]}
        fit_router(Store.open(store), swapped, RouteOptions())
        assert llm.choose(prompt_of(BASE)).variant == "sums"
        router_path(store).write_bytes(router_path(store).read_bytes()[:-9])
        with pytest.raises(RouteError, match="damaged"):
            llm.generate(prompt, SHORT, variant="auto")
        router_path(store).unlink()
        with pytest.raises(RouteError, match=r"no router.*route fit"):
            llm.choose(prompt)
        assert llm.generate(prompt, SHORT)[0].choice is None


def test_who_says_nothing_is_answered_too(store: Path) -> None:
    fit_router(Store.open(store), examples(), TRACE, opening=SMALL)
    with LLM(store, memory="64MB") as llm:
        silent = llm.choose("")
    assert (silent.tokens, silent.seconds) == (0, 0.0)
    assert 1 / 3 <= silent.confidence < 1


def test_a_conversation_in_this_process_finds_its_variant(store: Path) -> None:
    (store / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with (
        LLM(f"{store}:auto", memory="64MB") as llm,
        closing(Local(llm, ChatOptions(max_tokens=3), name="x")) as partner,
    ):
        told = {}
        for domain in examples():
            told[domain] = list(partner.answer([{"role": "user", "content": prompt_of(domain)}]))[-1]
    assert {domain: one.variant for domain, one in told.items() if isinstance(one, Told)} == {
        name: name for name in (BASE, "code", "sums")
    }


def test_fitting_is_refused_before_any_work(store: Path) -> None:
    opened = Store.open(store)
    before = router_path(store).read_bytes()
    with pytest.raises(RouteError, match="no variant 'poems'"):
        fit_router(opened, {**examples(), "poems": ["a", "b"]}, RouteOptions())
    with pytest.raises(RouteError, match="at least 2"):
        fit_router(opened, {**examples(), "code": ["x"]}, TRACE, opening=RuntimeOptions(memory="1KB"))
    with pytest.raises(RouteError, match="MoE layers"):
        fit_router(opened, examples(), RouteOptions(classifier="trace", layers=99), opening=SMALL)
    with pytest.raises(RouteError, match="does not know poems"):
        judge_router(opened, {"poems": ["a"]})
    for bad in ({"classifier": "guess"}, {"threshold": 2.0}, {"layers": 1}, {"layers": -1, "classifier": "trace"}):
        with pytest.raises(RouteError):
            RouteOptions(**bad)  # type: ignore[arg-type]
    assert router_path(store).read_bytes() == before


def test_the_router_of_another_model_is_refused(store: Path, tmp_path: Path) -> None:
    other = pack_raw(tiny_checkpoint(tmp_path / "other", seed=5), tmp_path / "packed").path
    router_path(other).parent.mkdir()
    shutil.copyfile(router_path(store), router_path(other))
    with LLM(other, memory="64MB") as llm, pytest.raises(RouteError, match="another model"):
        llm.choose("x = 1")
