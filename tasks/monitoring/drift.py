"""Pure detectors over series, the same live and after the fact.

Levels of a moving average with patience were the ones without a false halt on 30 healthy small GRPO runs that also caught each
of 12 collapses; CUSUM on log(KL) came a little earlier with 1 false alarm, so it warns. Generic change detectors (Page-Hinkley,
ADWIN) alarmed on most healthy runs, because healthy training is drift. `benchmarks/drift.py` measures this again.

A series is a list of (step, value); `drift` is the profile's drift block as a dict.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import median
from typing import Any

Series = dict[str, list[tuple[int, float]]]
ALWAYS = ("loss", "reward", "kl", "entropy", "grad_norm", "canary/kl")  # must be finite, whatever corridors there are
HALT, WARN = "halt", "warn"
FAR = 100.0  # how many times a limit a signal below it is said to be away, at most
FINDINGS = "findings"  # beside the metrics of a log line


@dataclass(frozen=True)
class Finding:
    """A signal that left its corridor and stayed out; `severity` is warn or halt, `detector` what saw it."""

    signal: str
    detector: str
    severity: str
    step: int
    value: float
    limit: float
    patience: int

    def __str__(self) -> str:
        if self.detector == "not_finite":
            return f"{self.signal} is {self.value} at step {self.step}: training has diverged. Lower learning_rate."
        side = "above" if self.value > self.limit else "below"
        what = {"slope": "grew per log step by", "cusum": "has a CUSUM of", "reward_hacking": "fell from its best by"}
        while_what = " while the training reward did not fall" if self.detector == "reward_hacking" else ""
        lasting = f" for {self.patience} measurements in a row" if self.patience > 1 else ""
        return (
            f"{self.signal} {what.get(self.detector, 'averaged')} {self.value:.4g} at step {self.step}, {side} its "
            f"{self.severity} limit {self.limit:.4g}{lasting}{while_what}."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the finding for a JSON file, which has no NaN or infinity."""
        finite = {name: v for name, v in asdict(self).items() if not isinstance(v, float) or math.isfinite(v)}
        return finite | {"text": str(self)}


def add_point(points: list[tuple[int, float]], step: int, value: float) -> None:
    """Append a point; a step that goes back is a restart's, and takes the place of what came after it before."""
    while points and points[-1][0] >= step:
        points.pop()
    points.append((step, value))


def series_of(lines: Iterable[dict[str, Any]]) -> Series:
    """Return the series of a metrics file's lines, `{"step", "metrics"}` each."""
    series: Series = {}
    for line in lines:
        for name, value in line["metrics"].items():
            add_point(series.setdefault(name, []), line["step"], value)
    return series


def watched(name: str, drift: dict[str, Any]) -> bool:
    """Tell whether a metric's series is judged."""
    corridors = drift.get("signals") or {}
    return name in ALWAYS or corridors.get(name) is not None or name == "canary/reward"


def judge(series: Series, drift: dict[str, Any]) -> list[Finding]:
    """Return what is out of bounds at the newest step: at most one finding per signal and detector, halts first."""
    newest = max((points[-1][0] for points in series.values() if points), default=None)
    # by name: a resumed run reads its series in another order than the undisturbed one wrote them
    fresh = {n: points for n, points in sorted(series.items()) if points and points[-1][0] == newest and watched(n, drift)}
    if lost := [_not_finite(name, points[-1]) for name, points in fresh.items() if not math.isfinite(points[-1][1])]:
        return lost
    found = [finding for name, points in fresh.items() for finding in _judge_one(name, points, drift)]
    if "canary/reward" in fresh and drift.get("reward_hacking"):
        found += _reward_hacking(series, drift["reward_hacking"])
    return sorted(found, key=lambda finding: finding.severity != HALT)


def replay(series: Series, drift: dict[str, Any], stop_at_halt: bool = True) -> list[Finding]:
    """Return every finding of a whole run as it would have come live, each signal, detector and severity once."""
    found: dict[tuple[str, str, str], Finding] = {}
    for step in sorted({step for points in series.values() for step, _ in points}):
        past = {name: [point for point in points if point[0] <= step] for name, points in series.items()}
        for finding in judge({name: points for name, points in past.items() if points}, drift):
            found.setdefault((finding.signal, finding.detector, finding.severity), finding)
        if stop_at_halt and any(finding.severity == HALT for finding in found.values()):
            break
    return sorted(found.values(), key=lambda finding: finding.step)


def is_inside(series: Series, drift: dict[str, Any]) -> bool:
    """Tell whether nothing is beyond a halt limit right now, without any patience: a checkpoint of this step is good."""
    impatient = {name: corridor and corridor | {"patience": 1} for name, corridor in (drift.get("signals") or {}).items()}
    hacking = drift.get("reward_hacking")
    strict = drift | {"signals": impatient, "reward_hacking": hacking and hacking | {"patience": 1}}
    return not any(finding.severity == HALT for finding in judge(_aligned(series), strict))


def corridors(series: Series, drift: dict[str, Any]) -> dict[str, float]:
    """Return each fresh signal's moving average as `drift/<signal>`, and its limits in force as `drift/<signal>_<limit>`."""
    newest = max((points[-1][0] for points in series.values() if points), default=None)
    shown: dict[str, float] = {}
    for name, corridor in (drift.get("signals") or {}).items():
        points = series.get(name)
        if corridor is not None and points and points[-1][0] == newest:
            values = [value for _, value in points]
            shown[f"drift/{name}"] = smoothed(values, corridor["smoothing"])[-1]
            shown |= {f"drift/{name}_{level}": limit for level, limit in limits(values, corridor).items()}
    return shown


def closeness(series: Series, drift: dict[str, Any]) -> dict[str, float]:
    """Return for each signal with a halt limit how near to it its average is now: 1.0 is on the limit."""
    near: dict[str, float] = {}
    for name, corridor in (drift.get("signals") or {}).items():
        if corridor is None or not series.get(name):
            continue
        values = [value for _, value in series[name]]
        average = smoothed(values, corridor["smoothing"])[-1]
        for level, limit in limits(values, corridor).items():
            if level == "halt_max" and limit > 0:
                near[name] = max(near.get(name, 0.0), average / limit)
            if level == "halt_min" and limit > 0:
                near[name] = max(near.get(name, 0.0), limit / max(average, limit / FAR))
    return near


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Return the exponentially weighted moving average, started at the first value."""
    averages: list[float] = []
    for value in values:
        averages.append(value if not averages else weight * value + (1 - weight) * averages[-1])
    return averages


def limits(values: Sequence[float], corridor: dict[str, Any]) -> dict[str, float]:
    """Return the limits in force at the newest value; of a level and a ratio's limit the narrower."""
    found: dict[str, float] = {}
    for severity in (HALT, WARN):
        for side, narrower in (("min", max), ("max", min)):
            if given := [limit for limit in _limits(values, corridor, severity, side) if limit is not None]:
                found[f"{severity}_{side}"] = narrower(given)
    return found


def stays_beyond(averages: Sequence[float], limit: float, patience: int, *, above: bool) -> bool:
    """Tell whether the last `patience` values all lie beyond `limit`."""
    last = averages[-patience:]
    return len(last) == patience and all(value > limit if above else value < limit for value in last)


def slope(points: Sequence[tuple[int, float]]) -> float:
    """Return the Theil-Sen slope, the median of all pairs' slopes, per point: outliers do not move it."""
    values = [value for _, value in points]
    return median((values[j] - values[i]) / (j - i) for i, j in combinations(range(len(values)), 2))


def cusum(values: Sequence[float], target: float, slack: float) -> float:
    """Return the one-sided CUSUM of log(value / target) (Page 1954, doi:10.1093/biomet/41.1-2.100) after the last value."""
    total = 0.0
    for value in values:
        total = max(0.0, total + (math.log(value / target) if value > 0 else -math.inf) - slack)
    return total


def _not_finite(name: str, point: tuple[int, float]) -> Finding:
    return Finding(name, "not_finite", HALT, point[0], point[1], math.inf, 1)


def _judge_one(name: str, points: list[tuple[int, float]], drift: dict[str, Any]) -> Iterator[Finding]:
    corridor = (drift.get("signals") or {}).get(name)
    if corridor is None:
        return
    yield from _level(name, points, corridor)
    yield from _slope(name, points, corridor)
    settings = drift.get("kl_cusum")
    if name == "kl" and settings:
        total = cusum([value for _, value in points], settings["target"], settings["slack"])
        if total > settings["warn_sum"]:
            yield Finding(name, "cusum", WARN, points[-1][0], total, settings["warn_sum"], 1)


def _level(name: str, points: list[tuple[int, float]], corridor: dict[str, Any]) -> Iterator[Finding]:
    values = [value for _, value in points]
    averages, first, patience = smoothed(values, corridor["smoothing"]), corridor["reference_steps"], corridor["patience"]
    for severity in (HALT, WARN):
        for side in ("min", "max"):
            absolute, relative = _limits(values, corridor, severity, side)
            # a limit that came from the reference steps does not judge them
            for limit, judged in ((absolute, averages), (relative, averages[first:])):
                if limit is not None and stays_beyond(judged, limit, patience, above=side == "max"):
                    yield Finding(name, "level", severity, points[-1][0], averages[-1], limit, patience)
                    return


def _limits(values: Sequence[float], corridor: dict[str, Any], severity: str, side: str) -> tuple[float | None, float | None]:
    """Return the level and the ratio's limit in force at the newest value."""
    first, ratio = corridor["reference_steps"], corridor.get(f"{severity}_ratio_{side}")
    reference = median(values[:first]) if ratio is not None and len(values) > first else 0.0
    return corridor.get(f"{severity}_{side}"), ratio * reference if reference > 0 else None


def _slope(name: str, points: list[tuple[int, float]], corridor: dict[str, Any]) -> Iterator[Finding]:
    window, first = corridor["window"], corridor["reference_steps"]
    asked = [(s, corridor[f"{s}_slope_max"]) for s in (HALT, WARN) if corridor.get(f"{s}_slope_max") is not None]
    if not asked or len(points) < first + window:
        return
    reference = median(value for _, value in points[:first])
    growth = slope(points[-window:]) / abs(reference) if reference else 0.0
    for severity, limit in asked:
        if growth > limit:
            yield Finding(name, "slope", severity, points[-1][0], growth, limit, 1)
            return


def _reward_hacking(series: Series, settings: dict[str, Any]) -> Iterator[Finding]:
    """Judge the held-out reward against its best so far, and the training reward since then."""
    held_out, training = series["canary/reward"], series.get("reward", [])
    averages = smoothed([value for _, value in held_out], settings["smoothing"])
    best = max(range(len(averages)), key=averages.__getitem__)
    rewards = smoothed([value for _, value in training], settings["smoothing"])
    then = [reward for (step, _), reward in zip(training, rewards, strict=True) if step <= held_out[best][0]]
    if not then or rewards[-1] < then[-1]:
        return
    drops = [averages[best] - average for average in averages[best:]]
    for severity, limit in ((HALT, settings["halt_drop"]), (WARN, settings["warn_drop"])):
        if limit is not None and stays_beyond(drops, limit, settings["patience"], above=True):
            step = held_out[-1][0]
            yield Finding("canary/reward", "reward_hacking", severity, step, drops[-1], limit, settings["patience"])
            return


def _aligned(series: Series) -> Series:
    """Return the series as if each had its newest value at the same step."""
    newest = max((points[-1][0] for points in series.values() if points), default=0)
    return {name: [*points[:-1], (newest, points[-1][1])] for name, points in series.items() if points}
