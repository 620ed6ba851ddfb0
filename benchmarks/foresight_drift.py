"""How quickly policies find their way in another domain: hit rates, request by request, after a switch.

    python benchmarks/foresight_drift.py LEARN.npz JUDGE.npz --before python,perl --after german,french [--plot d.svg]

`--before` and `--after` are parts of the names of requests' datasets: two domains. Each policy has seen the requests of
LEARN before the switch alone, or also those of the domain after it ("at home"); nets are trained on what it has seen.
It then replays ten requests of before and, in random order, the requests of JUDGE after it, of which hit rates are
told: equal slots, no prefetch, one request at a time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from judging import COLOURS, new_figure, save_figure, tidy

from moestro.foresight import train
from moestro.policy.choice import make_choice, needs_nets
from moestro.policy.observation import Shape
from moestro.simulate.fit import fit
from moestro.simulate.passes import passes
from moestro.simulate.slots import SlotReplay
from moestro.trace import Trace
from moestro.trace.join import join

WARM = 10
WINDOW = 10
SPANS = ((0, 10), (10, 30), (30, 50))


def main() -> None:
    options = arguments()
    learn, judge = Trace.load(options.learn), Trace.load(options.judge)
    before, home, after = (
        domain(trace, names)
        for trace, names in ((learn, options.before), (learn, options.after), (judge, options.after))
    )
    replayed = join([before.select(range(before.requests)[-WARM:]), after])
    replay = SlotReplay(replayed)
    requests_P = np.array([one.requests[0].request for one in passes(replayed)]) - WARM
    shape = Shape(after.layers, after.num_experts, after.picks)
    nets = {"before": train(before), "home": train(join([before, home]))}
    rates: dict[str, Any] = {}
    print(f"hit rates at {options.slots} slots in requests {SPANS} after the switch: strange, at home, difference")
    for name in options.policies.split(","):
        policy, _, predictor = name.partition("/")
        known = needs_nets(policy, predictor, prefetch=False)
        found = {}
        for place, seen in (("before", before), ("home", join([before, home]))):
            choice = make_choice(
                policy, predictor or "ensemble", shape, prefetch=False, nets=nets[place] if known else None
            )
            fit(choice, seen)
            (result,) = replay.run(choice.policy, [options.slots])
            found[place] = by_request(result.hits_P, replay.accesses(), requests_P)
        rates[name] = {place: one.tolist() for place, one in found.items()}
        spans = [(found["before"][span].mean(), found["home"][span].mean()) for span in (slice(*one) for one in SPANS)]
        print(
            f"{name:20s}", "   ".join(f"{one:.4f} {other:.4f} {one - other:+.4f}" for one, other in spans), flush=True
        )
    if options.out is not None:
        options.out.write_text(json.dumps({"slots": options.slots, "rates": rates}) + "\n")
    if options.plot is not None:
        draw(rates, options.plot)


def domain(trace: Trace, names: str) -> Trace:
    """Its requests of these datasets, in random order."""
    wanted = [
        request
        for request, meta in enumerate(trace.meta)
        if any(name in Path(str(meta.get("dataset", ""))).name for name in names.split(","))
    ]
    return trace.select(np.random.default_rng(0).permutation(wanted))


def by_request(hits_P: np.ndarray, accesses_P: np.ndarray, requests_P: np.ndarray) -> np.ndarray:
    """Hit rates of the requests after the switch."""
    after = requests_P >= 0
    hits_R, accesses_R = (np.bincount(requests_P[after], counts_P[after]) for counts_P in (hits_P, accesses_P))
    return np.asarray(hits_R / accesses_R)


def draw(rates: dict[str, Any], path: Path) -> None:
    """Means over the last ten requests of what was lost to the policy at home."""
    figure = new_figure(8, 3.8)
    axes = figure.add_subplot()
    axes.axhline(0, color="#8a8a92", linewidth=1)
    for colour, (name, one) in zip(COLOURS, rates.items(), strict=False):
        lost_R = np.array(one["before"]) - np.array(one["home"])
        mean_R = np.convolve(lost_R, np.ones(WINDOW) / WINDOW, mode="valid")
        axes.plot(np.arange(len(mean_R)) + WINDOW, 100 * mean_R, color=colour, label=name)
    across = f"requests since the switch (means of {WINDOW})"
    tidy(axes, "Hit rate after a switch of domain", across, "points below a policy that knows the domain")
    save_figure(figure, path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("learn", type=Path)
    parser.add_argument("judge", type=Path)
    parser.add_argument("--before", required=True)
    parser.add_argument("--after", required=True)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--policies", default="lrfu,moe_infinity,value/ensemble,value/learned")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
