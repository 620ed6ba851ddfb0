"""How often prompts of known domains find the variant fit for them, from how few examples, and what choosing costs.

    python benchmarks/domain_router.py CORPUS --variants spanish python arithmetic [--store tiny-qwen3moe-28m]

CORPUS is a folder of X.train.txt and X.val.txt, a pair for each kind of text. Those named are for variants, all others
for the base. Routers are fitted to windows of 256 tokens of the training texts, evenly spread, and judged on windows of
other lengths of the validation texts. Writes docs/benchmarks/domain-router.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path

import numpy as np

from moestro import LLM, SamplingParams
from moestro.calibration import pack_apart
from moestro.domain import BASE, Choice, DomainRouter, RoutedExample, RoutedPrompt, fit_text, fit_trace
from moestro.store.locate import locate

LENGTHS = (16, 64, 256)
UNSEEN = 5
LAYERS = (1, 2, 4, 8)
THRESHOLD = 0.5
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "domain-router.md"


@dataclass(frozen=True, eq=False)
class Window:
    """A prompt, the kind of text that it is of, and what the base routes for it."""

    kind: str
    text: str
    experts_NLK: np.ndarray
    seconds: float = 0.0

    def routed(self, layers: int) -> RoutedPrompt:
        return RoutedPrompt(self.experts_NLK[:, :layers], self.seconds)


@dataclass(frozen=True)
class Score:
    """Shares of prompts: right in all, right as a mean over domains, answered by the base for want of certainty."""

    right: float
    balanced: float
    unsure: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--variants", nargs="+", required=True)
    parser.add_argument("--store", default="tiny-qwen3moe-28m")
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--examples", type=int, nargs="+", default=[5, 20, 50], help="of each kind to learn from")
    parser.add_argument("--prompts", type=int, default=40, help="of each kind and length to judge on")
    arguments = parser.parse_args()
    kinds = sorted(path.name.removesuffix(".train.txt") for path in arguments.corpus.glob("*.train.txt"))
    store = locate(arguments.store, auto_pack=True, pack=pack_apart)
    with LLM(store, memory=arguments.memory, context=512, prefix_cache=False) as llm:
        train = {kind: _windows(llm, arguments.corpus, kind, "train", 256, max(arguments.examples)) for kind in kinds}
        judged = {
            length: [
                one for kind in kinds for one in _windows(llm, arguments.corpus, kind, "val", length, arguments.prompts)
            ]
            for length in LENGTHS
        }
        bench = Bench(train, judged, frozenset(arguments.variants), tuple(arguments.examples))
        parts = []
        for part in chain([_head(arguments, kinds)], _text_part(bench), _trace_part(bench, llm)):
            print(part, flush=True)
            parts.append(part)
    PAGE.write_text("\n".join(parts) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Bench:
    """Windows to learn from by kind, to judge on by length, which kinds are variants', how many examples are tried."""

    train: Mapping[str, Sequence[Window]]
    judged: Mapping[int, Sequence[Window]]
    variants: frozenset[str]
    counts: tuple[int, ...]

    def domain(self, kind: str) -> str:
        return kind if kind in self.variants else BASE

    def examples(self, count: int, without: str = "") -> dict[str, list[Window]]:
        """`count` windows of each kind but one, by domain."""
        found: dict[str, list[Window]] = {}
        for kind, windows in self.train.items():
            if kind != without:
                found.setdefault(self.domain(kind), []).extend(_spread(windows, count))
        return found

    def score(self, router: DomainRouter, windows: Sequence[Window]) -> Score:
        choices = [(self.domain(one.kind), router.choose(one, self.variants)) for one in windows]
        domains = {domain for domain, _ in choices}
        by_domain = [
            np.mean([_is(domain, choice) for other, choice in choices if other == domain]) for domain in domains
        ]
        unsure = [choice.domain != BASE and choice.confidence < router.threshold for _, choice in choices]
        right = [_is(domain, choice) for domain, choice in choices]
        return Score(float(np.mean(right)), float(np.mean(by_domain)), float(np.mean(unsure)))


def _is(domain: str, choice: Choice) -> bool:
    return (choice.variant or BASE) == domain


def _by_text(examples: Mapping[str, Sequence[Window]]) -> DomainRouter:
    return fit_text({name: [one.text for one in some] for name, some in examples.items()}, threshold=THRESHOLD)


def _by_trace(examples: Mapping[str, Sequence[Window]], layers: int, experts: int) -> DomainRouter:
    routed = {name: [RoutedExample(one.experts_NLK[:, :layers]) for one in some] for name, some in examples.items()}
    return fit_trace(routed, experts=experts, threshold=THRESHOLD)


def _text_part(bench: Bench) -> Iterator[str]:
    yield "## By text\n"
    yield _table_head("examples of each kind", "fit")
    routers = {}
    for count in bench.counts:
        started = time.perf_counter()
        router = routers[count] = _by_text(bench.examples(count))
        yield _line(str(count), f"{time.perf_counter() - started:.1f} s", bench, router)
    best = routers[max(bench.counts)]
    yield ""
    yield f"Who answers, of {max(bench.counts)} examples, over prompts of all lengths:\n"
    yield from _confusion(bench, best)
    yield ""
    shares = [_unseen(bench, kind) for kind in bench.train if kind not in bench.variants]
    kept = ", ".join(f"{kind} {share:.0%}" for kind, share in sorted(shares, key=lambda one: one[1]))
    yield (
        f"Prompts of a kind of which the router saw no example, that the base answers as it should ({UNSEEN} examples "
        f"of each other kind, mean {np.mean([share for _, share in shares]):.0%}): {kept}.\n"
    )
    texts = [one.text for one in bench.judged[256]]
    spent = [_seconds(lambda text=text: best.choose(Window("", text, _NONE), bench.variants)) for text in texts]
    yield f"Choosing takes {1e3 * statistics.median(spent):.2f} ms for a prompt of 256 tokens (median), and no token.\n"


def _unseen(bench: Bench, kind: str) -> tuple[str, float]:
    router = _by_text(bench.examples(UNSEEN, without=kind))
    prompts = [one for windows in bench.judged.values() for one in windows if one.kind == kind]
    return kind, bench.score(router, prompts).right


def _trace_part(bench: Bench, llm: LLM) -> Iterator[str]:
    experts = llm.expert_counts().shape[1]
    depths = [layers for layers in LAYERS if layers <= llm.expert_counts().shape[0]]
    yield "## By trace\n"
    yield _table_head("layers", "examples of each kind")
    for layers in depths:
        for count in bench.counts:
            yield _line(str(layers), str(count), bench, _by_trace(bench.examples(count), layers, experts))
    yield ""
    yield "What looking at a prompt takes, all in memory, beside its whole prefill (medians of 15, and the range):\n"
    yield f"| prompt | {' | '.join(f'{layers} layer(s)' for layers in depths)} | prefill |"
    yield "|---|" + "---|" * (len(depths) + 1)
    for length in LENGTHS:
        ids = llm.encode(next(one.text for one in bench.judged[256]))[:length]
        timed = [_timed(lambda layers=layers, ids=ids: llm.route(ids, layers)) for layers in depths]
        whole = _timed(lambda ids=ids: llm.generate(ids, SamplingParams(max_tokens=1)))
        yield f"| {length} tokens | {' | '.join(timed)} | {whole} |"
    yield ""


_NONE = np.empty((0, 1, 1), dtype=np.int64)


def _windows(llm: LLM, corpus: Path, kind: str, split: str, length: int, count: int) -> list[Window]:
    """Windows of a text, evenly spread, as a client would send them: as text."""
    ids = llm.encode((corpus / f"{kind}.{split}.txt").read_text(encoding="utf-8"))
    cut = [ids[first : first + length] for first in range(0, len(ids) - length + 1, length)]
    found = []
    for one in _spread(cut, count):
        text = llm.tokenizer.decode(one)
        started = time.perf_counter()
        found.append(Window(kind, text, llm.route(llm.encode(text), max(LAYERS)), time.perf_counter() - started))
    return found


def _spread(some: Sequence, count: int) -> list:  # type: ignore[type-arg]
    return [some[(2 * index + 1) * len(some) // (2 * count)] for index in range(min(count, len(some)))]


def _table_head(*names: str) -> str:
    columns = [*names, *(f"{length} tokens" for length in LENGTHS), "all", "mean of domains", "unsure"]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def _line(first: str, second: str, bench: Bench, router: DomainRouter) -> str:
    each = [f"{bench.score(router, windows).right:.1%}" for windows in bench.judged.values()]
    whole = bench.score(router, [one for windows in bench.judged.values() for one in windows])
    shares = [*each, f"**{whole.right:.1%}**", f"{whole.balanced:.1%}", f"{whole.unsure:.1%}"]
    return f"| {first} | {second} | {' | '.join(shares)} |"


def _confusion(bench: Bench, router: DomainRouter) -> Iterator[str]:
    names = [*sorted(bench.variants), BASE]
    yield f"| prompts of | {' | '.join(f'by {name}' for name in names)} |"
    yield "|---|" + "---|" * len(names)
    for name in names:
        some = [one for windows in bench.judged.values() for one in windows if bench.domain(one.kind) == name]
        answered = [router.choose(one, bench.variants).variant or BASE for one in some]
        yield f"| {name} ({len(some)}) | {' | '.join(f'{answered.count(who) / len(some):.1%}' for who in names)} |"


def _timed(action: Callable[[], object]) -> str:
    action()
    spent = sorted(_seconds(action) for _ in range(15))
    return f"{1e3 * statistics.median(spent):.1f} ms ({1e3 * spent[0]:.1f} to {1e3 * spent[-1]:.1f})"


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _machine() -> str:
    names = ("numpy", "scikit-learn", "torch")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return f"{len(os.sched_getaffinity(0))} cores of a shared virtual machine ({platform.machine()}), {versions}."


def _head(arguments: argparse.Namespace, kinds: Sequence[str]) -> str:
    others = [kind for kind in kinds if kind not in arguments.variants]
    return f"""# The router of domains

`model="STORE:auto"` sends a prompt to the variant fit for it. How often that is the right one, from how few examples:

```console
$ python benchmarks/domain_router.py CORPUS --variants {" ".join(arguments.variants)} \\
      --examples {" ".join(map(str, arguments.examples))} --prompts {arguments.prompts}
```

Of {len(kinds)} kinds of text, {", ".join(arguments.variants)} are for variants, the others for the base:
{", ".join(others)}.
Examples are windows of 256 tokens of training texts. {arguments.prompts} prompts of each kind and length are cut out of
validation texts wherever that falls, so that some are in no way of their domain: a licence in English in a Spanish
manual, a docstring, a table of characters. Threshold {THRESHOLD:g}: below it the base answers ("unsure"). Base:
{arguments.store}. {_machine()}
"""


if __name__ == "__main__":
    main()
