"""Another attempt at a stage: after which failures, after how long, and with what changed. Prefect does the trying."""

import logging
import re
from collections.abc import Callable
from typing import Any

import httpx
from prefect import State

from profiles.schema import StagePlacement
from tasks.errors import JobFailed, RunCancelled
from tasks.failures import BUG, COLLECTIVE, DIED, HANG, HICCUP, OUT_OF_MEMORY, PREEMPTED
from tasks.pipeline_run import PipelineRun

WORTH_A_RETRY = (OUT_OF_MEMORY, HANG, PREEMPTED, DIED, COLLECTIVE, HICCUP)
MAX_DELAY_SECONDS = 600
DEFAULT_BATCH = 8  # transformers' per_device_train_batch_size
log = logging.getLogger("posttrain")


def retried(run: PipelineRun, placement: StagePlacement) -> dict[str, Any]:
    """Return the options by which Prefect tries a stage's task again: how often, and after which failures."""
    return {"retries": placement.retries, "retry_condition_fn": condition(run)}


def condition(run: PipelineRun) -> Callable[[Any, Any, State], bool]:
    """Return what Prefect asks whether a failed stage is tried again."""

    def is_worth_it(task: Any, task_run: Any, state: State) -> bool:
        return cause_of(state.result(raise_on_failure=False)) in WORTH_A_RETRY and not run.stop.is_set()

    return is_worth_it


def cause_of(error: Any) -> str:
    """Return the class of what a stage raised."""
    if isinstance(error, JobFailed):
        return error.cause
    if isinstance(error, httpx.TransportError | ConnectionError):
        return HICCUP
    # MLflow's client has tried for minutes by itself; SQLite's lock, where two runs write at once, clears too
    is_server_away = type(error).__name__ == "MlflowException" and re.search("API request|database is locked", str(error))
    return HICCUP if is_server_away else BUG


def failed_attempts(run: PipelineRun, stage: str) -> list[str]:
    """Return the classes of this run's attempts at a stage that failed, in their order."""
    return [record.cause for record in run.records() if record.stage == stage and record.cause]


def pause(run: PipelineRun, stage: str, failed: list[str], placement: StagePlacement) -> None:
    """Wait before another attempt, twice as long each time; raises RunCancelled as soon as the run is stopped."""
    if failed:
        seconds = min(placement.retry_delay_seconds * 2 ** (len(failed) - 1), MAX_DELAY_SECONDS)
        log.warning("%s: attempt %d of %d in %.0f s (%s)", stage, len(failed) + 1, placement.retries + 1, seconds, failed[-1])
        run.stop.wait(seconds)
    if run.stop.is_set():
        raise RunCancelled(f"{stage} was not started: the run was stopped before")


def smaller_batches(config: dict[str, Any], failed: list[str]) -> dict[str, Any]:
    """Return a stage's settings with a smaller per-device batch for each attempt that ran out of memory.

    The batch is halved, or divided by its smallest factor where it is odd, and the accumulation multiplied by as much: the
    global batch, and so the recipe, stays what it is.
    """
    times = failed.count(OUT_OF_MEMORY)
    if not times or "args" not in config:
        return config
    args = dict(config["args"])
    for _ in range(times):
        size = args.get("per_device_train_batch_size", DEFAULT_BATCH)
        factor = next((n for n in range(2, size + 1) if size % n == 0), 1)
        args["per_device_train_batch_size"] = size // factor
        args["gradient_accumulation_steps"] = args.get("gradient_accumulation_steps", 1) * factor
        if args.get("steps_per_generation"):
            args["steps_per_generation"] *= factor
    log.warning(
        "out of memory before: per_device_train_batch_size %d, gradient_accumulation_steps %d, the global batch stays",
        args["per_device_train_batch_size"], args["gradient_accumulation_steps"],
    )  # fmt: skip
    return config | {"args": args}
