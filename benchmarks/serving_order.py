"""Who starts when a place is free: first come, or whose prompt is most like those that run?

    python benchmarks/serving_order.py MODEL --text FILE... [--shares 0.25,0.5,0.75] [--at-once 4,8] [--rounds 3]

Prompts are pieces of the texts, as many of each, in random order, all there from the start. Each run answers them with
a model opened anew, whose memory gives a share of the experts a place. The two orders take turns, round after round.
Reported per generated token are bytes read (medians; the same in each round, or nearly) and time (with range), and of
the time to the first token the median and the 99th percentile; tokens must be the same in both.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from itertools import product
from pathlib import Path

from moestro import LLM, SamplingParams

CONTEXT, PROMPT, NEW, PIECES = 512, 384, 48, 8
ORDERS = ("arrival", "alike")


def prompts(texts: list[Path]) -> list[str]:
    """Pieces of PROMPT characters."""
    chance = random.Random(0)
    pieces = []
    for text in (file.read_text() for file in texts):
        starts = [chance.randint(0, len(text) - PROMPT) for _ in range(PIECES)]
        pieces += [text[start : start + PROMPT] for start in starts]
    chance.shuffle(pieces)
    return pieces


def run(
    model: str, asked: list[str], *, memory: int, at_once: int, admit: str
) -> tuple[tuple[float, ...], list[list[int]]]:
    """Seconds and bytes per token, median and 99th percentile of seconds to the first token; and the tokens."""
    with LLM(
        model, memory=memory, learn="off", context=CONTEXT, max_sequences=at_once, lend_kv=False, admit=admit
    ) as llm:
        sampling = SamplingParams(max_tokens=NEW, ignore_eos=True)
        llm.generate(asked[0], sampling)  # the arena has something in it
        before, started = llm.stats().bytes_read, time.perf_counter()
        done = llm.generate(asked, sampling)
        seconds, read = time.perf_counter() - started, llm.stats().bytes_read - before
    tokens = sum(len(one.token_ids) for one in done)
    firsts = sorted(one.timings.ttft_s for one in done)
    figures = (seconds / tokens, read / tokens, statistics.median(firsts), firsts[int(0.99 * len(firsts))])
    return figures, [one.token_ids for one in done]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--shares", default="0.25,0.5,0.75")
    parser.add_argument("--at-once", default="4,8")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    asked = prompts(given.text)
    print(
        f"{len(asked)} prompts\n\n| experts in memory | at once | order | KiB read per token | tokens/s | first token |"
    )
    print("|---|---|---|---|---|---|")
    for share, at_once in product(map(float, given.shares.split(",")), map(int, given.at_once.split(","))):
        with LLM(given.model, memory=1 << 33, context=CONTEXT, max_sequences=at_once) as llm:
            memory = llm.plan.bytes_for_experts(share)
        found: dict[str, list[tuple[float, ...]]] = {order: [] for order in ORDERS}
        answers = []
        for order in ORDERS * given.rounds:
            figures, tokens = run(given.model, asked, memory=memory, at_once=at_once, admit=order)
            found[order].append(figures)
            answers.append(tokens)
        assert all(one == answers[0] for one in answers), "the tokens differ"
        for order, runs in found.items():
            second, read, first, last = (statistics.median(values) for values in zip(*runs, strict=True))
            rates = sorted(1 / one[0] for one in runs)
            print(
                f"| {share:.0%} | {at_once} | {order} | {read / 2**10:.1f} | {1 / second:.0f} ({rates[0]:.0f} to "
                f"{rates[-1]:.0f}) | {first:.2f} s, p99 {last:.2f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
