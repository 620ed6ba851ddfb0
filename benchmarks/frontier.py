"""Quality against speed, in the same bytes: exact, what `--quality` gives up, and lower levels throughout.

    python benchmarks/levels.py STORE TEXT... --policies ledger --static 2,3 --out levels.json
    python benchmarks/frontier.py INFLATED levels.json --text FILE [--repeat 3] [--tokens 64] [--plot FILE.svg]

The first command measures quality on the trained model, the second one speed on the same model with its experts made
large (`benchmarks/inflate.py`: the same logits and routing), each at the same shares of the experts' bytes in memory.
A lower level throughout is what a user would quantise to otherwise: the same kernels and calibration, fewer bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from moestro.config import RuntimeOptions
from moestro.runtime.subject import Subject

NAMES = {"exact": "exact (level 4)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("levels", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    subject = Subject.open(str(asked.store))
    plan = subject.plan(RuntimeOptions(context=256))
    points: list[dict[str, Any]] = []
    print("| experts in memory | setting | perplexity | divergence | MB read per token | decode tokens/s |")
    print("|---|---|---|---|---|---|")
    for run in json.loads(asked.levels.read_text())["runs"]:
        points.append({**run, **_speed(asked, run["quality"], plan.bytes_for_experts(run["share"]))})
        print(_row(points[-1]), flush=True)
    if asked.plot:
        _draw(points, asked.plot)


def _speed(asked: argparse.Namespace, setting: str, memory: int) -> dict[str, Any]:
    how = ["--level", setting.split()[1]] if setting.startswith("level") else ["--quality", setting]
    command = [sys.executable, "-m", "moestro.cli", "bench", str(asked.store), "--memory", str(memory), *how]
    command += ["--context", "256", "--prompt-tokens", "64", "--gen-tokens", str(asked.tokens)]
    command += ["--repeat", str(asked.repeat), "--text", str(asked.text), "--json"]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return {"speed": found["decode_tokens_per_s"], "read": found["decode"]["bytes_read_per_token"]}


def _row(point: dict[str, Any]) -> str:
    speed = point["speed"]
    return (
        f"| {point['share']:.0%} | {NAMES.get(point['quality'], point['quality'])} | {point['perplexity']:.3f} "
        f"| {point['divergence']:.4f} | {point['read'] / 1e6:.0f} "
        f"| {speed['median']:.1f} ({speed['min']:.1f} to {speed['max']:.1f}) |"
    )


def _draw(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for share, colour in zip(sorted({point["share"] for point in points}), ("tab:blue", "tab:orange"), strict=False):
        for static, style in ((False, "o-"), (True, "s--")):
            ours = [one for one in points if one["share"] == share and one["quality"].startswith("level") == static]
            kind = "lower levels throughout" if static else "exact to fast"
            speeds = [one["speed"]["median"] for one in ours]
            axes.plot(speeds, [one["perplexity"] for one in ours], style, color=colour, label=f"{share:.0%}, {kind}")
            for one, speed in zip(ours, speeds, strict=True):
                axes.annotate(
                    one["quality"], (speed, one["perplexity"]), (4, 4), textcoords="offset points", fontsize=8
                )
    axes.set_xlabel("decoded tokens per second")
    axes.set_ylabel("perplexity")
    axes.set_title("Less is better below, more to the right")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
