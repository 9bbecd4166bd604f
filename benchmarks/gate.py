"""How often the gate lets a worse candidate through, and how often it stops a better one: the real judge on made-up scores.

    .venv/bin/python benchmarks/gate.py                      the tables of docs/gates.md, about seven minutes
    .venv/bin/python benchmarks/gate.py --runs 200 --n 500   a quick look at one n

A row is an item that champion and candidate answer rightly or not: two standard normals of the given correlation, each right
below the point that gives its model its share. Effects are true differences in points. Figures are percentages of the runs; of
2,000 the standard error is at most 1.1. Rows of real-valued scores are means of four such items.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from profiles.schema import Gates
from tasks.gates import judge

EFFECTS = (-0.05, -0.02, 0.0, 0.02, 0.05)
GUARD_EFFECTS = (-0.05, -0.03, -0.02, 0.0, 0.02)
MARGINS = (0.03, 0.05)
SCORE_RUNS, SCORE_ROWS = 200, 500  # the permutation test takes a second for two thousand rows
Pair = dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[100, 200, 500, 1000, 2000])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--champion", type=float, default=0.6, help="share of items that the champion answers rightly")
    parser.add_argument("--correlation", type=float, default=0.7, help="latent; 0.7 is 0.49 between the answers")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = np.random.default_rng(asked.seed)

    def items(n: int, effect: float, parts: int = 1) -> Pair:
        return pair(rng, n, asked.champion, effect, asked.correlation, parts)

    print(f"champion {asked.champion:g}, correlation {asked.correlation:g}, {asked.runs} runs, seed {asked.seed}")
    table("Primary, 0/1: PASS / FAIL in %", asked.n, EFFECTS, lambda n, e: share(primary(items, n, e, 1, asked.runs)))
    for margin in MARGINS:
        head = f"Guard, 0/1, margin {margin:g}: PASS / FAIL in %"
        table(head, asked.n, GUARD_EFFECTS, lambda n, e, m=margin: share(guard(items, n, e, m, 1, asked.runs)))
    for forgets in (0.0, -0.05):
        head = f"Whole gate, 0/1: and two guards of margin 0.05, truly {100 * forgets:+g}: PASS / FAIL in %"
        table(head, asked.n, EFFECTS, lambda n, e, f=forgets: share(whole(items, n, e, f, asked.runs)))
    head = "Guard, real-valued, margin 0.05: PASS / FAIL in %"
    table(head, asked.n, GUARD_EFFECTS, lambda n, e: share(guard(items, n, e, 0.05, 4, asked.runs)))
    head, runs = f"Primary, real-valued, {SCORE_RUNS} runs: PASS / FAIL in %", min(asked.runs, SCORE_RUNS)
    sizes = [n for n in asked.n if n <= SCORE_ROWS]
    table(head, sizes, EFFECTS, lambda n, e: share(primary(items, n, e, 4, runs)))


def pair(rng: np.random.Generator, n: int, champion: float, effect: float, correlation: float, parts: int) -> Pair:
    """Return champion's and policy's scores on `n` rows, whose true means differ by `effect`."""
    common, own = rng.standard_normal((n, parts)), rng.standard_normal((n, parts))
    other = correlation * common + np.sqrt(1 - correlation**2) * own
    right = common < norm.ppf(champion), other < norm.ppf(champion + effect)
    return dict(zip(("champion", "policy"), (scores.mean(axis=1) for scores in right), strict=True))


def primary(items, n: int, effect: float, parts: int, runs: int) -> Iterator[str]:
    gates = Gates(better_than=["champion"])
    for _ in range(runs):
        yield judge({"m": items(n, effect, parts)}, gates, "m", None).verdict


def guard(items, n: int, effect: float, margin: float, parts: int, runs: int) -> Iterator[str]:
    gates = Gates(better_than=[], not_worse={"m": margin})
    for _ in range(runs):
        yield judge({"m": items(n, effect, parts)}, gates, "m", None).verdict


def whole(items, n: int, effect: float, forgets: float, runs: int) -> Iterator[str]:
    gates = Gates(better_than=["champion"], not_worse={"g1": 0.05, "g2": 0.05})
    for _ in range(runs):
        scores = {"m": items(n, effect), "g1": items(n, forgets), "g2": items(n, forgets)}
        yield judge(scores, gates, "m", None).verdict


def share(verdicts: Iterator[str]) -> str:
    """Return e.g. `37.5 / 0.0`; what is left of a hundred is inconclusive."""
    counts = Counter(verdicts)
    return " / ".join(f"{100 * counts[verdict] / counts.total():.1f}" for verdict in ("PASS", "FAIL"))


def table(head: str, sizes: list[int], effects: tuple[float, ...], cell) -> None:
    print(f"\n{head}\n\n| n |" + "".join(f" {100 * effect:+g} |" for effect in effects) + "\n|" + "---|" * (len(effects) + 1))
    for n in sizes:
        print(f"| {n:,} |" + "".join(f" {cell(n, effect)} |" for effect in effects), flush=True)


if __name__ == "__main__":
    main()
