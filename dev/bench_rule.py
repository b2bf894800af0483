"""What program.md's rule for keeping costs and brings, in simulated nights.

uv run dev/bench_rule.py                 # 300 nights of each kind
uv run dev/bench_rule.py --bad 0.05      # with bad runs

A night starts with three seeds of a baseline and tries a hundred ideas. A run shows the truth plus
noise of standard deviation 1; a part --bad of the runs is worse by 20, as if other work had gone
unnoticed. The noise is estimated from what was run with several seeds: as harness/record.py does
it, from the median difference, or pooled, from all squares. Printed are false keeps and true gains.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness.record import estimate_deviation

NOTHING = [0.0]  # effects of ideas, times the noise: lower is better
MIXED = [0, 0, 0, 0, 0, 0, 1, 2, 3, -0.5, -1, -2]  # one idea in four helps
IDEAS, NIGHTS = 100, 300
RULES = {  # difference below which more seeds are run, how many, and below which their mean is kept
    "-1, one run": (-1, 0, -1),
    "-1, and so with one more seed": (-1, 1, -1),
    "0, and -1 with two more seeds": (0, 2, -1),
    "-0.5, and -1 with two more seeds": (-0.5, 2, -1),
    "-1, and so with two more seeds": (-1, 2, -1),
    "-1, and -2 with two more seeds": (-1, 2, -2),
    "-2, one run": (-2, 0, -2),
}


def pooled(groups: list[np.ndarray]) -> float:
    """Return the noise from all squares: sensitive to a single bad run."""
    squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups))


def night(
    rng: np.random.Generator,
    effects: list[float],
    rule: tuple[float, int, float],
    estimate: Callable,
    bad: float,
) -> tuple:
    """Return (kept ideas, runs, true gain) of one night."""
    first, more, limit = rule

    def run(truth: float, size: int) -> np.ndarray:
        return rng.normal(truth, size=size) + 20 * (rng.random(size) < bad)

    groups = [run(0.0, 3)]
    best, seeds_best, truth, kept, runs = groups[0].mean(), 3, 0.0, 0, 3
    noise = estimate(groups)
    for effect in rng.choice(effects, IDEAS):
        seen = run(truth + effect, 1)
        difference = (seen.mean() - best) / (noise * math.sqrt(1 + 1 / seeds_best))
        if difference < first and more:
            seen = np.append(seen, run(truth + effect, more))
            groups.append(seen)
            noise = estimate(groups)
            difference = seen.mean() - best
            difference /= noise * math.sqrt(1 / len(seen) + 1 / seeds_best)
        runs += len(seen)
        if difference < limit:
            best, seeds_best, truth, kept = seen.mean(), len(seen), truth + effect, kept + 1
    return kept, runs, -truth


def main() -> None:
    """Print a table for each estimate of the noise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bad", type=float, default=0.0, help="part of the runs; default 0")
    parser.add_argument("--nights", type=int, default=NIGHTS, help=f"default {NIGHTS}")
    arguments = parser.parse_args()
    rng = np.random.default_rng(42)
    line = "{:<34}{:>12}{:>6}{:>6}{:>18}"
    columns = ("false keeps", "gain", "runs", "gain in 100 runs")
    for kind, estimate in {"median difference": estimate_deviation, "pooled": pooled}.items():
        print(f"\nnoise: {kind}")
        print(line.format("keep if the difference is below", *columns))
        for name, rule in RULES.items():
            nothing, mixed = (
                np.mean(
                    [
                        night(rng, effects, rule, estimate, arguments.bad)
                        for _ in range(arguments.nights)
                    ],
                    axis=0,
                )
                for effects in (NOTHING, MIXED)
            )
            gain = f"{mixed[2]:.1f}", f"{mixed[1]:.0f}", f"{100 * mixed[2] / mixed[1]:.1f}"
            print(line.format(name, f"{nothing[0]:.2f}", *gain))


if __name__ == "__main__":
    main()
