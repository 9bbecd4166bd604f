"""What listens to a TRL trainer: the metrics file that the pipeline reads, and the halt on drift."""

import json
import math
import time
from collections import defaultdict

import torch
from transformers import TrainerCallback

from tasks.job_spec import JobSpec
from tasks.jobs.job import Halted
from tasks.monitoring.drift import Breach, breach


class MetricsFile(TrainerCallback):
    """Appends every log line, unrenamed, to the job's metrics file; only rank 0 writes."""

    def __init__(self, spec: JobSpec):
        self.path = spec.metrics_file

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        metrics = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
        line = {"step": state.global_step, "max_steps": state.max_steps, "time": time.time(), "metrics": metrics}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class FrozenWeights(TrainerCallback):
    """Puts a half-precision base back to its exact weights after each step that synced the policy to vLLM.

    TRL merges the adapter into the base for the sync and takes it out again; in bfloat16 each time leaves a rounding error, and
    the errors of hundreds of steps add up. float32 loses nothing that matters, and pays nothing here.
    """

    def __init__(self, model: torch.nn.Module):
        half = (torch.bfloat16, torch.float16)
        frozen = (p for p in model.parameters() if not p.requires_grad and p.dtype in half)
        self.kept = [(parameter, parameter.detach().cpu().clone()) for parameter in frozen]

    def on_step_end(self, args, state, control, **kwargs):
        with torch.no_grad():
            for parameter, kept in self.kept:
                parameter.copy_(kept)


class DriftHalt(TrainerCallback):
    """Stops training at the log step at which a series has left its corridor for good.

    TRL gathers its metrics over ranks before it logs them, so every rank comes to the same verdict at the same step.
    """

    WATCHED = ("loss", "reward", "kl", "entropy", "grad_norm")

    def __init__(self, spec: JobSpec):
        self.limits = spec.drift
        self.series: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self.found: Breach | None = None
        self.good: str | None = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key in self.WATCHED:
            if key in (logs or {}):
                self.series[key].append((state.global_step, float(logs[key])))
        if self.found is None and self.series:
            self.found = breach(self.series, self.limits)
        if self.found is not None:
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if self.found is None and all(math.isfinite(points[-1][1]) for points in self.series.values()):
            self.good = f"{args.output_dir}/checkpoint-{state.global_step}"

    def verdict(self) -> None:
        """Raise Halted if training was stopped for drift."""
        if self.found is not None:
            raise Halted(self.found, self.good)
