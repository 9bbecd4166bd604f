"""What a run costs in CPU- and GPU-seconds, what of it was for nothing and why, and what the next run may cost."""

import json
import statistics
from pathlib import Path
from typing import Any

from profiles.schema import Budget
from tasks.environment import home
from tasks.errors import BudgetExceeded
from tasks.guard import USAGE
from tasks.pipeline_run import PipelineRun

Cost = dict[str, float]
UNITS = ("wall_seconds", "cpu_seconds", "gpu_seconds")
HOURS = {"cpu_hours": "cpu_seconds", "gpu_hours": "gpu_seconds"}
STOPS = {"DriftHalted": "halted", "RunCancelled": "cancelled", "BudgetExceeded": "over budget"}
ZERO_VARIANCE = "frac_reward_zero_std"
RUNS = 10  # the newest builds of a stage that an estimate is the median of


def spent(work: Path) -> Cost:
    """Return what the jobs in a work folder cost, from the lines that their guards left there."""
    path = work / USAGE
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {unit: round(sum(line[unit] for line in lines), 2) for unit in UNITS}


def total(costs: list[Cost]) -> Cost:
    return {unit: round(sum(cost.get(unit, 0.0) for cost in costs), 2) for unit in UNITS}


def ledger(run: PipelineRun) -> dict[str, Any]:
    """Return the run's `total` cost and its `waste` by cause, each `{"wall_seconds", "cpu_seconds", "gpu_seconds"}`.

    Waste is what failed, halted and cancelled attempts cost, and the share of the policy's training in which every completion
    of a group had the same reward: such a group has no gradient.
    """
    records = run.records()
    waste: dict[str, list[Cost]] = {}
    for record in records:
        if record.status == "failed":
            kind = str(record.reason).split(":", 1)[0]
            waste.setdefault(STOPS.get(kind) or record.cause or "failed", []).append(record.cost)
        elif share := _idle_share(run.folder / record.stage / "metrics.jsonl"):
            waste.setdefault("zero-variance groups", []).append({unit: share * record.cost.get(unit, 0.0) for unit in UNITS})
    return {
        "total": total([record.cost for record in records]),
        "waste": {cause: total(costs) for cause, costs in waste.items()},
    }


def _idle_share(metrics: Path) -> float:
    """Return the mean share of zero-variance groups over a policy's log steps; 0 where none is logged."""
    if not metrics.is_file():
        return 0.0
    lines = (json.loads(line)["metrics"] for line in metrics.read_text().splitlines() if line.endswith("}"))
    shares = [line[ZERO_VARIANCE] for line in lines if ZERO_VARIANCE in line]
    return statistics.mean(shares) if shares else 0.0


def estimate(profile: str, stage: str) -> Cost | None:
    """Return the median cost of the newest builds of a stage in this profile's runs; None if it was never built here."""
    found = []
    for path in sorted((home() / profile).glob(f"*/stages/*-{stage}.json"), reverse=True):
        record = json.loads(path.read_text())
        if record["stage"] == stage and record["status"] == "ran" and record.get("cost"):
            found.append(record["cost"])
        if len(found) == RUNS:
            break
    return {unit: statistics.median(cost[unit] for cost in found) for unit in UNITS} if found else None


def refuse_before(profile: str, budget: Budget, stages: list[str]) -> None:
    """Raise BudgetExceeded if the stages that would run are expected to cost more than the budget."""
    expected = total([cost for stage in stages if (cost := estimate(profile, stage))])
    for setting, unit in HOURS.items():
        limit = getattr(budget, setting)
        if limit is not None and expected[unit] > limit * 3600:
            raise BudgetExceeded(
                f"budget.{setting} is {limit:g}, but {', '.join(stages)} would cost about {expected[unit] / 3600:.3g} by the "
                f"median of their last builds. Nothing was started. Raise the budget, or make the recipe smaller."
            )


def refuse_next(run: PipelineRun, stage: str) -> None:
    """Raise BudgetExceeded if what the run has cost, and what the stage is expected to, is more than the budget."""
    used, expected = total([record.cost for record in run.records()]), estimate(run.profile.name, stage) or {}
    for setting, unit in HOURS.items():
        limit = getattr(run.profile.budget, setting)
        if limit is not None and used[unit] + expected.get(unit, 0.0) > limit * 3600:
            raise BudgetExceeded(
                f"budget.{setting} is {limit:g}; the run has used {used[unit] / 3600:.3g} and {stage} would cost about "
                f"{expected.get(unit, 0.0) / 3600:.3g}: it was not started. What is built is kept. Raise the budget to go on."
            )


def seconds_left(run: PipelineRun, num_gpus: int) -> float | None:
    """Return how long the next job may run on so many GPUs within the budget; None without a limit."""
    limit = run.profile.budget.gpu_hours
    if limit is None or num_gpus == 0:
        return None
    return (limit * 3600 - total([record.cost for record in run.records()])["gpu_seconds"]) / num_gpus
