"""What prefix reuse and lent KV memory are worth: conversations with one beginning, several at once, little memory.

    python benchmarks/serving_memory.py MODEL [--share 0.25] [--rounds 3]

Each run answers the same requests (a common beginning, an own end) with a model opened anew, under the memory that
gives `--share` of the experts a place when all KV blocks are in use. The four ways take turns, round after round.
Reported are medians of all rounds with their range: tokens of answers per second, bytes read per token, hits; tokens
must be the same whatever the way.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import product

from moestro import LLM, SamplingParams

CONTEXT, AT_ONCE, REQUESTS = 1024, 8, 24
BEGINNING, OWN, NEW = 256, 32, 48


def prompts(vocabulary: int) -> list[list[int]]:
    """A common beginning, and ends of their own."""
    beginning = [(7 * place + 3) % vocabulary for place in range(BEGINNING)]
    return [
        [*beginning, *((31 * number + 5 * place) % vocabulary for place in range(OWN))] for number in range(REQUESTS)
    ]


def run(model: str, memory: int, *, prefix_cache: bool, lend_kv: bool) -> tuple[float, float, float, list[list[int]]]:
    """Tokens per second, bytes read per token, share of hits, and the tokens."""
    options = {"context": CONTEXT, "max_sequences": AT_ONCE, "prefix_cache": prefix_cache, "lend_kv": lend_kv}
    with LLM(model, memory=memory, learn="off", **options) as llm:
        asked = prompts(llm.tokenizer.vocab_size)
        sampling = SamplingParams(max_tokens=NEW, ignore_eos=True)
        llm.generate(asked[0][-OWN:], sampling)  # the arena has something in it
        before = llm.stats()
        started = time.perf_counter()
        done = llm.generate(asked, sampling)
        seconds = time.perf_counter() - started
        after = llm.stats()
    tokens = sum(len(one.token_ids) for one in done)
    hits, misses = after.hits - before.hits, after.misses - before.misses
    read = (after.bytes_read - before.bytes_read) / tokens
    return tokens / seconds, read, hits / (hits + misses), [one.token_ids for one in done]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with LLM(asked.model, memory=1 << 40, context=CONTEXT, max_sequences=AT_ONCE) as llm:
        memory = llm.plan.bytes_for_experts(asked.share)
        print(f"{memory / 2**20:.0f} MiB, of which KV {llm.plan.kv_bytes / 2**20:.0f} MiB; context {CONTEXT}")
    found: dict[tuple[bool, bool], list[tuple[float, float, float]]] = {}
    answers: list[list[list[int]]] = []
    for _ in range(asked.rounds):
        for ways in product((False, True), repeat=2):
            *figures, tokens = run(asked.model, memory, prefix_cache=ways[0], lend_kv=ways[1])
            found.setdefault(ways, []).append((figures[0], figures[1], figures[2]))
            answers.append(tokens)
    assert all(one == answers[0] for one in answers), "the tokens differ"
    for (prefix_cache, lend_kv), runs in found.items():
        speed, read, hits = (sorted(values) for values in zip(*runs, strict=True))
        print(
            f"prefix_cache {prefix_cache!s:5} lend_kv {lend_kv!s:5}: {statistics.median(speed):7.1f} tokens/s "
            f"({speed[0]:.1f} to {speed[-1]:.1f}), {statistics.median(read) / 2**10:8.1f} KiB read per token, "
            f"hits {statistics.median(hits):.3f}"
        )


if __name__ == "__main__":
    main()
