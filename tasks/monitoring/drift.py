"""Pure detectors over a series, the same live and after the fact.

The two levels below were the ones without a false halt on 30 healthy small GRPO runs that also caught each of 12 collapses;
generic change detectors (Page-Hinkley, ADWIN) alarmed on most healthy runs, because healthy training is drift.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Breach:
    """A series that left its corridor and stayed out."""

    signal: str
    step: int
    value: float
    limit: float
    patience: int

    def __str__(self) -> str:
        side = "above" if self.value > self.limit else "below"
        if not math.isfinite(self.value):
            return f"{self.signal} is {self.value} at step {self.step}: training has diverged. Lower learning_rate."
        return (
            f"{self.signal} averaged {self.value:.4g} at step {self.step}, {side} its limit {self.limit:.4g} for "
            f"{self.patience} log steps in a row."
        )


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Return the exponentially weighted moving average, started at the first value."""
    averages: list[float] = []
    for value in values:
        averages.append(value if not averages else weight * value + (1 - weight) * averages[-1])
    return averages


def out_of_corridor(averages: Sequence[float], limit: float, patience: int, *, above: bool) -> bool:
    """Tell whether the last `patience` values all lie beyond `limit`."""
    last = averages[-patience:]
    return len(last) == patience and all(value > limit if above else value < limit for value in last)


def breach(series: dict[str, list[tuple[int, float]]], limits: dict) -> Breach | None:
    """Return the first breach of `limits` (the profile's drift block) at the newest step, or None.

    `series` maps TRL's key to (step, value) pairs; KL and entropy in nats per token.
    """
    for signal, points in series.items():
        step, value = points[-1]
        if not math.isfinite(value):
            return Breach(signal, step, value, math.inf, 1)
    patience, weight = limits["patience"], limits["smoothing"]
    if limits["kl_max"] is not None and (points := series.get("kl")):
        averages = smoothed([value for _, value in points], weight)
        if out_of_corridor(averages, limits["kl_max"], patience, above=True):
            return Breach("kl", points[-1][0], averages[-1], limits["kl_max"], patience)
    points = series.get("entropy", [])
    first = limits["reference_steps"]
    if limits["entropy_ratio_min"] is not None and len(points) > first:
        averages = smoothed([value for _, value in points], weight)
        floor = limits["entropy_ratio_min"] * median(value for _, value in points[:first])
        if out_of_corridor(averages[first:], floor, patience, above=False):
            return Breach("entropy", points[-1][0], averages[-1], floor, patience)
    return None
