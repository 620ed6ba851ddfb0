"""Levels chosen per token: perplexity, divergence from the exact level and bytes read, by policy and quality.

    python benchmarks/levels.py STORE TEXT... [--policies gate,ledger,learned] [--qualities high,balanced,fast]
        [--static 2,3] [--shares 0.25,0.5] [--tokens 2048] [--out FILE.json]

Tokens go through one at a time, as decoding does, in windows of 256 of the texts (never those of the calibration). Of
the experts' bytes at the exact level a share is in memory, all else that a policy needs is beside it. `learned` needs
a store with a bit router; `--static` levels are applied to every expert, in the same bytes of memory. For each share the exact level is measured first; "divergence" is the mean of KL(exact ||
chosen) per token, in nats. Nothing here is a time: bytes and divergences are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moestro.config import RuntimeOptions
from moestro.engine.tokenizer import load_tokenizer
from moestro.engine.windows import Text, Window, cut_windows
from moestro.policy.levels import EXACT, budget_of
from moestro.runtime.batch import PackedBatch, Segment
from moestro.runtime.kv import blocks_for
from moestro.runtime.open import open_model
from moestro.runtime.subject import Subject
from moestro.store.reader import Store

WINDOW = 256


def main() -> None:
    arguments = _arguments()
    store = Store.open(arguments.store)
    texts = [Text(path.name, path.read_text(encoding="utf-8")) for path in arguments.texts]
    windows = cut_windows(load_tokenizer(store), texts, window=WINDOW, max_tokens=arguments.tokens)
    exact_NV, results = None, []
    for share in _numbers(arguments.shares):
        static = [("fixed", EXACT, level) for level in map(int, filter(None, arguments.static.split(",")))]
        for policy, quality, level in [("fixed", EXACT, 0), *_cases(arguments), *static]:
            log_probs_NV, facts = measure(store, windows, share=share, policy=policy, quality=quality, level=level)
            exact_NV = log_probs_NV if exact_NV is None else exact_NV
            facts |= {"share": share, "policy": policy, "quality": f"level {level}" if level else quality}
            facts |= judge(log_probs_NV, exact_NV, windows)
            print(facts, flush=True)
            results.append(facts)
    if arguments.out:
        arguments.out.write_text(json.dumps({"store": store.path.name, "tokens": arguments.tokens, "runs": results}))


def measure(
    store: Store, windows: list[Window], *, share: float, policy: str, quality: str, level: int = 0
) -> tuple[np.ndarray, dict[str, Any]]:
    """Logarithms of next-token probabilities [N, V], and what was read for them."""
    options = RuntimeOptions(context=WINDOW, threads=1, quality=quality, level_policy=policy)
    subject = Subject.of_store(store)
    arena = int(share * subject.plan(options).expert_bytes)
    options = replace(options, level=level)
    plan = subject.plan(options)
    arena = min(plan.whole_arena_bytes, arena)
    memory = max(plan.least_bytes, plan.fixed_bytes + arena)
    rows = []
    with open_model(store, replace(options, memory=str(memory)), logit_rows=1) as opened:
        runner = opened.runner
        budget, blocks = budget_of(opened.level_policy, quality), runner.kv.allocate(blocks_for(WINDOW))
        for number, window in enumerate(windows):
            for position, token in enumerate(window.token_ids[:-1]):
                segment = Segment(number, [token], position, blocks, True, True, budget)
                logits_1V = runner.forward(PackedBatch([segment], every_row=True))
                rows.append(torch.log_softmax(logits_1V[0].double(), -1).float().numpy())
            runner.end_request(number)
        read = runner.planes.stats.bytes_read
        return np.stack(rows), {"bytes_per_token": round(read / len(rows)), "applied": runner.levels_applied}


def judge(found_NV: np.ndarray, exact_NV: np.ndarray, windows: list[Window]) -> dict[str, float]:
    """Perplexity, and divergence from the exact level."""
    next_N = np.concatenate([window.token_ids[1:] for window in windows])
    loss = -found_NV[np.arange(len(next_N)), next_N].mean()
    divergence = (np.exp(exact_NV) * (exact_NV - found_NV)).sum(-1).mean()
    return {"perplexity": round(math.exp(loss), 4), "divergence": round(float(divergence), 5)}


def _cases(arguments: argparse.Namespace) -> list[tuple[str, str, int]]:
    return [
        (policy, quality, 0) for policy in arguments.policies.split(",") for quality in arguments.qualities.split(",")
    ]


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--policies", default="gate,ledger,learned")
    parser.add_argument("--qualities", default="high,balanced,fast")
    parser.add_argument("--static", default="", help="levels applied throughout: 2,3")
    parser.add_argument("--shares", default="0.25,0.5")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
