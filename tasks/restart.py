"""Runs a job, and again from its last good checkpoint where the profile asks for that after a halt on drift."""

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from profiles.schema import StagePlacement
from tasks.errors import DriftHalted
from tasks.job_spec import JobResult, JobSpec
from tasks.local_job import Metrics, run_job

log = logging.getLogger("posttrain")


def run_governed(
    spec: JobSpec,
    placement: StagePlacement,
    on_metrics: Callable[[Metrics], None],
    stop: threading.Event,
    lock: int,
) -> JobResult:
    """Run the job; with `on_halt: retry` one that halts starts again from its last good checkpoint, with the stated change."""
    allowed = spec.drift["retry"]["max_retries"] if spec.drift.get("on_halt") == "retry" else 0
    halts: list[str] = []
    while True:
        try:
            result = run_job(spec, placement, on_metrics, stop, locks=[lock])
            return result.model_copy(update={"details": result.details | {"retried": halts}}) if halts else result
        except DriftHalted as halt:
            if len(halts) == allowed or halt.last_good is None:
                raise
            spec = restarted(spec, halt.last_good, len(halts) + 1)
            changed = ", ".join(f"{name} {spec.config['args'][name]:g}" for name in spec.drift["retry"]["change"])
            log.warning("%s\n%s: starts again from step %d with %s", halt, spec.stage, spec.first_step, changed)
            halts.append(f"{str(halt).splitlines()[0]} Started again from step {spec.first_step} with {changed}.")


def restarted(spec: JobSpec, last_good: dict[str, Any], number: int) -> JobSpec:
    """Return the spec of a restart: the steps that are left, from the last good weights, with other draws."""
    args = dict(spec.config["args"])
    for name, factor in spec.drift["retry"]["change"].items():
        scaled = args[name] * factor
        args[name] = int(scaled) if isinstance(args[name], int) and scaled.is_integer() else scaled
    args["max_steps"] = last_good["left"]
    os.replace(spec.result_file, spec.result_file.with_name(f"result.halted-{number}.json"))
    update = {"config": spec.config | {"args": args}, "seed": spec.seed + 1, "first_step": last_good["step"]}
    update |= {
        "start_from": spec.checkpoints / last_good["checkpoint"],
        "checkpoints": spec.checkpoints / f"retry-{number}-from-{last_good['step']}",
    }
    return spec.model_copy(update=update)
