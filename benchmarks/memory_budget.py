"""moestro and llama.cpp in the same memory: a cgroup of so many bytes around each process, page cache included.

    python benchmarks/memory_budget.py --store NAME=STORE[:QUALITY] ... --gguf FILE --bench LLAMA_BENCH
        [--shares 1,0.75,0.5,0.25] [--rounds 3] [--prompt 128] [--tokens 32] [--peer-tokens 16] [--text FILE]
        [--read-ahead 128] [--out docs/benchmarks/memory-budget.json]

A share is one of the GGUF file's bytes. moestro is told the share less what its process takes before any weight (its
floor, measured first) and a margin; llama.cpp maps its file and does not repack it (a repacked copy cannot be dropped
and read again: with it llama.cpp is killed where memory is less than the file). With `--read-ahead` it runs once more,
with its disk reading so many KiB ahead, for which one has to be root. Files are evicted from the page cache
before each run. Every round runs every contender once at every share; a process warms up first (moestro: one answer;
llama-bench: its own warm-up). Reported are medians over rounds and the ratio of medians; `roofline` is that of the
bytes that moestro moved, at the speeds of disk, memory and processor measured in the same process. Rounds can be run
one by one: those that the file of `--out` has are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cgroup import Cgroup, evict
from read_ahead import read_ahead

MARGIN = 24 << 20
"""Left for what the kernel charges to a process beside its own memory: stacks, page tables, files just read."""


@dataclass(frozen=True)
class Contender:
    """`quality` is empty for llama.cpp; `read_ahead` in KiB, None as it is."""

    name: str
    path: Path
    quality: str
    read_ahead: int | None = None


def main() -> None:
    arguments = _arguments()
    contenders = [_contender(one) for one in arguments.store]
    peer = Contender("llama.cpp", arguments.gguf, "")
    peers = [peer]
    if arguments.read_ahead is not None:
        name = f"llama.cpp, read-ahead of {arguments.read_ahead} KiB"
        peers.append(Contender(name, arguments.gguf, "", arguments.read_ahead))
    floor = process_floor(contenders[0].path)
    samples = _earlier(arguments.out)
    for number in range(arguments.rounds):
        for share in (float(text) for text in arguments.shares.split(",")):
            limit = int(share * arguments.gguf.stat().st_size)
            for one in [*contenders, *peers]:
                run = _moestro(one, limit, floor, arguments) if one.quality else _llama_bench(one, limit, arguments)
                samples.setdefault(f"{share:.0%}", {}).setdefault(one.name, []).append(run)
                print(f"round {number + 1}  {share:.0%}  {one.name}: {_words(run)}", file=sys.stderr, flush=True)
    summary = {share: {name: _median(runs) for name, runs in by_name.items()} for share, by_name in samples.items()}
    _print(summary, peer.name)
    if arguments.out:
        whole = {"bytes": arguments.gguf.stat().st_size, "floor": floor, "medians": summary, "samples": samples}
        arguments.out.write_text(json.dumps(whole, indent=1) + "\n")


def _earlier(out: Path | None) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Runs of the file that this one's are added to."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    if out and out.exists():
        found = json.loads(out.read_text())["samples"]
    return found


def _contender(text: str) -> Contender:
    name, path = text.split("=", 1)
    folder, _, quality = path.partition(":")
    return Contender(f"moestro {name}", Path(folder), quality or "exact")


def process_floor(store: Path) -> int:
    """What a moestro process takes before any weight."""
    command = [sys.executable, "-m", "moestro.cli", "plan", str(store), "--memory", "1TiB", "--json"]
    return int(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["floor_bytes"])


def _moestro(one: Contender, limit: int, floor: int, arguments: argparse.Namespace) -> dict[str, Any]:
    evict(*(file for file in one.path.iterdir() if file.is_file()))
    command = [sys.executable, "-m", "moestro.cli", "bench", str(one.path), "--memory", str(limit - floor - MARGIN)]
    command += ["--prompt-tokens", str(arguments.prompt), "--gen-tokens", str(arguments.tokens)]
    command += ["--repeat", "1", "--quality", one.quality, "--json"]
    if arguments.text:
        command += ["--text", str(arguments.text)]
    out, peak = _limited(command, limit)
    found = json.loads(out)
    return {
        "decode": found["decode_tokens_per_s"]["median"],
        "prompt": found["prefill_tokens_per_s"]["median"],
        "roofline": found["roofline_decode_tokens_per_s"],
        "bytes_per_token": found["decode"]["bytes_read_per_token"],
        "stall_share": found["decode"]["stall_share"],
        "peak": peak,
    }


def _llama_bench(one: Contender, limit: int, arguments: argparse.Namespace) -> dict[str, Any]:
    evict(one.path)
    command = [arguments.bench, "-m", str(one.path), "-p", str(arguments.prompt), "-n", str(arguments.peer_tokens)]
    with read_ahead(one.path, one.read_ahead):
        out, peak = _limited([*command, "-t", str(os.cpu_count()), "--repack", "0", "-r", "1", "-o", "json"], limit)
    runs = json.loads(out)
    rate = {"decode" if run["n_gen"] else "prompt": run["avg_ts"] for run in runs}
    return {**rate, "peak": peak}


def _limited(command: list[str], limit: int) -> tuple[bytes, int | None]:
    group = Cgroup(limit)
    with group as enter:
        done = subprocess.run(command, capture_output=True, preexec_fn=enter)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr.decode()[-2000:]}")
        return done.stdout, group.peak()


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: None
        if runs[0][key] is None
        else {
            "median": statistics.median(run[key] for run in runs),
            "min": min(run[key] for run in runs),
            "max": max(run[key] for run in runs),
        }
        for key in runs[0]
    }


def _words(run: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in run.items() if value is not None)


def _print(summary: dict[str, dict[str, dict[str, Any]]], peer: str) -> None:
    print(
        "| memory | engine | decode tokens/s | ratio | of the roofline | MB read per token | prompt tokens/s | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for share, by_name in summary.items():
        theirs = by_name[peer]
        for name, found in by_name.items():
            decode, prompt = found["decode"], found["prompt"]
            part = read = ""
            if "roofline" in found:
                part = f"1/{found['roofline']['median'] / decode['median']:.2f}"
                read = f"{found['bytes_per_token']['median'] / 1e6:.0f}"
            ratios = (found[key]["median"] / theirs[key]["median"] for key in ("decode", "prompt"))
            first, second = (f"{ratio:.1f}" for ratio in ratios)
            print(f"| {share} | {name} | {_span(decode)} | {first} | {part} | {read} | {_span(prompt)} | {second} |")


def _span(found: dict[str, float]) -> str:
    return f"{found['median']:.3g} ({found['min']:.3g} to {found['max']:.3g})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="append", required=True, metavar="NAME=STORE[:QUALITY]")
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--bench", required=True, help="path of llama-bench")
    parser.add_argument("--shares", default="1,0.75,0.5,0.25", help="of the GGUF file's bytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32, help="decoded by moestro")
    parser.add_argument("--peer-tokens", type=int, default=16, help="decoded by llama.cpp, which is slow when limited")
    parser.add_argument("--read-ahead", type=int, metavar="KIB", help="run llama.cpp with this read-ahead, too")
    parser.add_argument("--text", type=Path, help="prompts are cut from it (default: random tokens)")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
