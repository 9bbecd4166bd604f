"""`posttrain drift`: a profile's last runs by their canaries, or the detectors over a series that stands in a file."""

import csv
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from profiles.schema import Drift
from tasks.errors import ProfileError
from tasks.monitoring import mlflow_runs
from tasks.monitoring.drift import Finding, Series, add_point, replay
from tasks.retrains import SIGNALS

BLOCKS = "▁▂▃▄▅▆▇█"


def history(profile: str, last: int) -> list[dict[str, Any]]:
    """Return a row per pipeline run of a profile, the oldest first: `{"run", "when", "verdict", "policy", <signal>: value}`."""
    runs = mlflow_runs.pipeline_runs(profile, f"tags.profile = '{profile}'", last)
    return [
        {
            "run": past["tags"].get("run_id", past["run_id"]),
            "when": f"{datetime.fromtimestamp(past['started'], UTC):%Y-%m-%d %H:%M}",
            "verdict": verdict(past),
            "policy": past["tags"].get("policy.fingerprint", ""),
            **{signal: past["metrics"].get(signal) for signal in SIGNALS},
        }
        for past in reversed(runs)
    ]


def verdict(past: dict[str, Any]) -> str:
    """Return accepted, or what stopped the run: the class of its error, or its status in MLflow."""
    if past["tags"].get("accepted"):
        return "accepted"
    return past["tags"].get("error") or past["status"].lower()


def sparkline(values: list[float | None]) -> str:
    """Return a series as blocks of eight heights, a space where there is no value."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = (high - low) or 1.0
    return "".join(" " if v is None else BLOCKS[min(7, int(8 * (v - low) / span))] for v in values)


def judge_file(path: Path, drift: Drift) -> list[Finding]:
    """Return what the detectors find in a file of series, as they would have live; raises ProfileError if it holds none."""
    return replay(read_series(path), drift.model_dump())


def read_series(path: Path) -> Series:
    """Return the series of a job's metrics.jsonl, of a CSV with a `step` column, or of a JSON mapping of names to values.

    Raises ProfileError naming the file, the line and what was expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            lines = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(text.splitlines())]
        elif path.suffix == ".json":
            mapping = json.loads(text).items()
            return {name: [_point(i, value) for i, value in enumerate(values, start=1)] for name, values in mapping}
        else:
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        series = _by_name(lines)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ProfileError(
            f"--series {path} cannot be read ({type(error).__name__}: {error}). Give a metrics.jsonl of a run, a CSV with a "
            'step column, or a JSON file {"kl": [0.1, 0.2], …}.'
        ) from None
    if not series:
        raise ProfileError(f"--series {path} holds no series: nothing would be judged. Give a metrics.jsonl of a run.")
    return series


def _by_name(lines: list[dict[str, Any]]) -> Series:
    series: Series = {}
    for line in lines:
        for name, value in line.get("metrics", line).items():
            if isinstance(value, int | float) and name not in ("step", "max_steps", "time"):
                add_point(series.setdefault(name, []), int(line["step"]), float(value))
    return series


def _point(number: int, value: Any) -> tuple[int, float]:
    return (int(value[0]), float(value[1])) if isinstance(value, list) else (number, float(value))
