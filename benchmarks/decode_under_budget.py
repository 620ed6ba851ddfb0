"""Decode speed of one model under several budgets, each in a process (and memory cgroup) of its own.

    python benchmarks/decode_under_budget.py MODEL [--shares 0.25,0.5,1] [--runs 3] [--tokens 32] [--peer CHECKPOINT]

MODEL is a store or checkpoint. Tokens are sampled at temperature 1 (a random model that decodes greedily repeats
itself, and with it its experts). A first answer fills the cache and faults the memory in; the runs after it are
measured, and medians reported. As root on a machine with version 1 memory cgroups, each process is held to floor +
budget, page cache included. `--peer` decodes the same checkpoint with transformers and accelerate's disk offload, given
as much memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from cgroup import Cgroup

PROMPT_IDS = [17, 905, 33, 2048, 411, 7, 1500, 88, 3021, 256, 640, 19, 2777, 1203, 54, 3999]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--shares", default="0.25,0.5,0.75,1", help="shares of the experts that the arena holds")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--peer", help="checkpoint folder to decode with accelerate too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task = json.loads(arguments.child)
        json.dump(CHILDREN[task.pop("kind")](**task), sys.stdout)
        return
    _compare(arguments)


def _compare(arguments: argparse.Namespace) -> None:
    common = {"runs": arguments.runs, "tokens": arguments.tokens}
    print(
        "| experts in memory | memory | decode tokens/s | ms per token | waiting for disk | GB read per token | hits |"
    )
    print("|---|---|---|---|---|---|---|")
    for share in (float(text) for text in arguments.shares.split(",")):
        plan = _child({"kind": "plan", "model": arguments.model, "context": arguments.context, "share": share})
        task = {"kind": "moestro", "model": arguments.model, "context": arguments.context, "memory": plan["memory"]}
        result = _child(task | common, limit=plan["floor"] + plan["memory"])
        print(
            f"| {share:.0%} | {plan['memory'] / 2**30:.2f} GiB | {result['rate']:.2f} | {1000 / result['rate']:.0f} "
            f"| {result['stall_share']:.0%} | {result['bytes_per_token'] / 1e9:.2f} | {result['hit_rate']:.0%} |",
            flush=True,
        )
        if arguments.peer:
            task = {"kind": "accelerate", "model": arguments.peer, "memory": plan["memory"]}
            peer = _child(task | common, limit=plan["floor"] + plan["memory"])
            print(f"| accelerate | the same | {peer['rate']:.3f} | {1000 / peer['rate']:.0f} | | | |", flush=True)


def _child(task: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    command = [sys.executable, __file__, "-", "--child", json.dumps(task)]
    with Cgroup(limit) as enter:
        done = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=enter, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _plan(model: str, context: int, share: float) -> dict[str, int]:
    from moestro import LLM

    with LLM(model, memory=str(1 << 50), context=context) as llm:
        return {"memory": llm.plan.bytes_for_experts(share), "floor": llm.plan.floor_bytes}


def _moestro(model: str, context: int, memory: int, runs: int, tokens: int) -> dict[str, float]:
    from moestro import LLM, SamplingParams

    with LLM(model, memory=str(memory), context=context) as llm:

        def sampling(seed: int, count: int) -> SamplingParams:
            return SamplingParams(max_tokens=count, temperature=1.0, seed=seed, ignore_eos=True)

        llm.generate(PROMPT_IDS, sampling(99, max(tokens, 64)))
        before, started = llm.stats(), time.perf_counter()
        rates = [
            llm.generate(PROMPT_IDS, sampling(seed, tokens))[0].timings.decode_tokens_per_s for seed in range(runs)
        ]
        after, wall = llm.stats(), time.perf_counter() - started
        asked = after.hits + after.misses - before.hits - before.misses
        return {
            "rate": statistics.median(rates),
            "stall_share": (after.stall_s - before.stall_s) / wall,
            "bytes_per_token": (after.bytes_read - before.bytes_read) / (runs * (tokens + len(PROMPT_IDS))),
            "hit_rate": (after.hits - before.hits) / asked,
        }


def _accelerate(model: str, memory: int, runs: int, tokens: int) -> dict[str, float]:
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, device_map="auto", max_memory={"cpu": memory}, offload_folder=folder
        )
        rates = []
        for seed in range(runs):
            torch.manual_seed(seed)
            marks: list[float] = []
            loaded.generate(
                torch.tensor([PROMPT_IDS]),
                max_new_tokens=min(tokens, 4),
                do_sample=True,
                eos_token_id=None,
                streamer=_Marks(marks),
            )
            rates.append((len(marks) - 2) / (marks[-1] - marks[1]))
    return {"rate": statistics.median(rates)}


class _Marks:
    """Notes when each token comes; transformers puts the prompt first."""

    def __init__(self, marks: list[float]) -> None:
        self._marks = marks

    def put(self, _: object) -> None:
        """A token, or the prompt, is there."""
        self._marks.append(time.perf_counter())

    def end(self) -> None:
        """The answer is whole."""


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {"plan": _plan, "moestro": _moestro, "accelerate": _accelerate}

if __name__ == "__main__":
    main()
