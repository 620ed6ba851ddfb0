"""Speed with everything in memory, beside llama.cpp: prompt and decode tokens per second, alternating, in one run.

    python benchmarks/decode_speed.py --store dense8=STORE --store dense4=STORE --gguf q4_0=FILE --bench LLAMA_BENCH
        [--rounds 5] [--prompt 128] [--tokens 64] [--threads 2] [--level 4] [--out docs/benchmarks/decode-speed.json]

The models are random ones of the same shape, so that nobody's quality is compared:
    python benchmarks/random_checkpoint.py olmoe-1b-7b CONFIG --config-only
    moestro pack --random CONFIG STORE --dense-bits 8
    python benchmarks/peers/gguf_olmoe.py FILE
Each round runs every contender once, in a process of its own, the order turned by one from round to round; a process
warms up first (moestro: prompts that use all experts; llama-bench: its own warm-up). Reported are medians over rounds,
and of each round's ratio to the first GGUF file: a machine whose speed drifts hurts both sides of a ratio.
Prompts are random tokens; decoding starts from one token and picks random ones.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

KINDS = ("prompt", "decode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="append", default=[], metavar="NAME=STORE")
    parser.add_argument("--gguf", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--bench", help="path of llama-bench")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--level", type=int, default=0, help="level of the stores (0: the one they call exact)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        json.dump(_moestro(arguments.child, arguments), sys.stdout)
        return
    contenders = [("moestro", *one.split("=", 1)) for one in arguments.store]
    contenders += [("llama.cpp", *one.split("=", 1)) for one in arguments.gguf]
    if not contenders or (arguments.gguf and not arguments.bench):
        parser.error("give --store, and --bench with --gguf")
    samples: dict[str, list[dict[str, float]]] = {f"{engine} {name}": [] for engine, name, _ in contenders}
    for number in range(arguments.rounds):
        turn = number % len(contenders)
        for engine, name, path in contenders[turn:] + contenders[:turn]:
            rates = _llama_bench(path, arguments) if engine == "llama.cpp" else _child(path, arguments)
            samples[f"{engine} {name}"].append(rates)
            print(f"round {number + 1}  {engine} {name}: {_words(rates)}", file=sys.stderr, flush=True)
    whole = _summary(samples, arguments)
    _print(whole)
    if arguments.out:
        arguments.out.write_text(json.dumps(whole, indent=2) + "\n")


def _words(rates: dict[str, float]) -> str:
    return ", ".join(f"{kind} {rates[kind]:.2f}" for kind in KINDS)


def _child(store: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", store]
    for name in ("prompt", "tokens", "threads", "level"):
        command += [f"--{name}", str(getattr(arguments, name))]
    rates: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return rates


def _moestro(store: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Rates of one process with memory for all experts."""
    import numpy as np

    from moestro import LLM, RuntimeOptions, SamplingParams
    from moestro.runtime.subject import Subject

    subject = Subject.open(store)
    vocabulary = int(subject.skeleton.config.vocab_size)
    context = max(512, arguments.prompt + arguments.tokens + 1)
    options: dict[str, Any] = {"context": context, "threads": arguments.threads}
    if arguments.level:
        options["level"] = arguments.level
    plan = subject.plan(RuntimeOptions(memory="1TiB", **options))
    random = np.random.default_rng(0)
    with LLM(store, memory=str(plan.bytes_for_experts(1.0)), **options) as llm:

        def prompt(length: int) -> list[int]:
            return [int(token) for token in random.integers(2, vocabulary, length)]

        def sampling(tokens: int, seed: int) -> SamplingParams:
            return SamplingParams(max_tokens=tokens, temperature=1.0, seed=seed, ignore_eos=True)

        for seed in range(2):
            llm.generate(prompt(context - 9), sampling(8, seed))
        before = llm.stats()
        prompted = llm.generate(prompt(arguments.prompt), sampling(1, 3))[0]
        decoded = llm.generate(prompt(1), sampling(arguments.tokens + 1, 4))[0]
        after = llm.stats()
    return {
        "prompt": prompted.timings.prefill_tokens_per_s,
        "decode": decoded.timings.decode_tokens_per_s,
        "misses": after.misses - before.misses,
        "peak_rss_bytes": after.peak_rss_bytes,
    }


def _llama_bench(file: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [arguments.bench, "-m", file, "-p", str(arguments.prompt), "-n", str(arguments.tokens)]
    command += ["-t", str(arguments.threads), "-r", "1", "-o", "json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return {"decode" if one["n_gen"] else "prompt": one["avg_ts"] for one in json.loads(done.stdout)}


def _summary(samples: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> dict[str, Any]:
    base = next((name for name in samples if name.startswith("llama.cpp")), None)
    results = {}
    for name, rounds in samples.items():
        results[name] = {kind: _spread([one[kind] for one in rounds]) for kind in KINDS}
        if base is not None:
            pairs = list(zip(rounds, samples[base], strict=True))
            results[name]["ratio"] = {kind: _spread([a[kind] / b[kind] for a, b in pairs]) for kind in KINDS}
    versions = {name: importlib.metadata.version(name) for name in ("moestro", "torch", "transformers")}
    return {
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": versions,
        "setting": {name: getattr(arguments, name) for name in ("rounds", "prompt", "tokens", "threads", "level")},
        "ratios_to": base,
        "results": results,
        "rounds": samples,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _print(whole: dict[str, Any]) -> None:
    print("| engine | decode tokens/s | ratio | prompt tokens/s | ratio |")
    print("|---|---|---|---|---|")
    for name, one in whole["results"].items():
        cells = []
        for kind in ("decode", "prompt"):
            rate = one[kind]
            cells.append(f"{rate['median']:.2f} ({rate['least']:.2f} to {rate['most']:.2f})")
            cells.append(f"{one['ratio'][kind]['median']:.2f}" if "ratio" in one else "-")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
