"""What program.md's rule for keeping costs and brings, in simulated nights.

uv run dev/bench_rule.py        # 1500 nights of each kind, 10 s

A night starts with three seeds of a baseline and tries a hundred ideas. A run shows the truth plus
noise of standard deviation 1. The noise is estimated from what was run with several seeds, as
harness/record.py does it. Printed are false keeps and true gains.
"""

import math

import numpy as np

NOTHING = [0.0]  # effects of ideas, times the noise: lower is better
MIXED = [0, 0, 0, 0, 0, 0, 1, 2, 3, -0.5, -1, -2]  # one idea in four helps
IDEAS, NIGHTS = 100, 1500
RULES = {  # difference below which more seeds are run, how many, and below which their mean is kept
    "-1, one run": (-1, 0, -1),
    "-1, and so with one more seed": (-1, 1, -1),
    "0, and -1 with two more seeds": (0, 2, -1),
    "-0.5, and -1 with two more seeds": (-0.5, 2, -1),
    "-1, and so with two more seeds": (-1, 2, -1),
    "-1, and -2 with two more seeds": (-1, 2, -2),
    "-2, one run": (-2, 0, -2),
}


def night(
    rng: np.random.Generator, effects: list[float], first: float, more: int, limit: float
) -> tuple:
    """Return (kept ideas, runs, true gain) of one night."""
    baseline = rng.normal(size=3)
    best, seeds_best, truth, kept, runs = baseline.mean(), 3, 0.0, 0, 3
    squares, freedom = ((baseline - best) ** 2).sum(), 2
    for effect in rng.choice(effects, IDEAS):
        seen = rng.normal(truth + effect, size=1)
        difference = (seen.mean() - best) / math.sqrt(squares / freedom * (1 + 1 / seeds_best))
        if difference < first and more:
            seen = np.append(seen, rng.normal(truth + effect, size=more))
            squares, freedom = squares + ((seen - seen.mean()) ** 2).sum(), freedom + more
            difference = (seen.mean() - best) / math.sqrt(
                squares / freedom * (1 / len(seen) + 1 / seeds_best)
            )
        runs += len(seen)
        if difference < limit:
            best, seeds_best, truth, kept = seen.mean(), len(seen), truth + effect, kept + 1
    return kept, runs, -truth


def main() -> None:
    rng = np.random.default_rng(42)
    line = "{:<34}{:>12}{:>6}{:>6}{:>18}"
    columns = ("false keeps", "gain", "runs", "gain in 100 runs")
    print(line.format("keep if the difference is below", *columns))
    for name, rule in RULES.items():
        nothing, mixed = (
            np.mean([night(rng, e, *rule) for _ in range(NIGHTS)], axis=0) for e in (NOTHING, MIXED)
        )
        gain = f"{mixed[2]:.1f}", f"{mixed[1]:.0f}", f"{100 * mixed[2] / mixed[1]:.1f}"
        print(line.format(name, f"{nothing[0]:.2f}", *gain))


if __name__ == "__main__":
    main()
