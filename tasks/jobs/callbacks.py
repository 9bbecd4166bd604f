"""What listens to a TRL trainer: the metrics file that the pipeline reads, and the halt on drift."""

import json
import math
import signal
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from tasks.job_spec import JobSpec
from tasks.jobs.job import Halted
from tasks.monitoring.drift import Breach, breach

SAVED = "saved"


class MetricsFile(TrainerCallback):
    """Appends every log line, unrenamed, to the job's metrics file; only rank 0 writes."""

    def __init__(self, spec: JobSpec):
        self.path = spec.metrics_file

    def on_train_begin(self, args, state, control, **kwargs):
        """Write the lines of the job that is gone on with: a curve has no gap, whichever run looks at it."""
        for logs in state.log_history:
            self._write(state, logs["step"], logs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._write(state, state.global_step, logs or {})

    def _write(self, state, step, logs):
        if not state.is_world_process_zero:
            return
        metrics = {key: value for key, value in logs.items() if isinstance(value, int | float) and key != "step"}
        line = {"step": step, "max_steps": state.max_steps, "time": time.time(), "metrics": metrics}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class StopOnTerm(TrainerCallback):
    """On SIGTERM, while it trains, saves a checkpoint at the end of the step and stops there: every rank at the same step.

    `saved` is written last, so a checkpoint that the final SIGKILL cut short is not believed.
    """

    def __init__(self, trainer: Trainer):
        self.accelerator = trainer.accelerator
        self.stopped = False
        self.handler = signal.signal(signal.SIGTERM, lambda *_: self.accelerator.set_trigger())

    def on_step_end(self, args, state, control, **kwargs):
        # after the last step there is nothing to stop: the job ends by itself, with its result
        if self.accelerator.check_trigger() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.handler)  # what is left, saving and measuring, is not gone on with: it ends at once

    def on_save(self, args, state, control, **kwargs):
        self.accelerator.wait_for_everyone()  # each rank writes files of its own into it
        if state.is_world_process_zero and state.global_step < state.max_steps:  # from the last step there is no going on
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / SAVED).touch()


def last_saved(checkpoints: Path) -> str | None:
    """Return the newest whole checkpoint, if there is one."""
    found = [path.parent for path in checkpoints.glob(f"checkpoint-*/{SAVED}")]
    return str(max(found, key=lambda path: int(path.name.split("-")[1]))) if found else None


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

    def on_train_begin(self, args, state, control, **kwargs):
        for logs in state.log_history:
            self._take(logs["step"], logs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._take(state.global_step, logs or {})
        if self.found is None and self.series:
            self.found = breach(self.series, self.limits)
        if self.found is not None:
            control.should_training_stop = True

    def _take(self, step, logs):
        for key in self.WATCHED:
            if key in logs:
                self.series[key].append((step, float(logs[key])))

    def on_save(self, args, state, control, **kwargs):
        if self.found is None and all(math.isfinite(points[-1][1]) for points in self.series.values()):
            self.good = f"{args.output_dir}/checkpoint-{state.global_step}"

    def verdict(self) -> None:
        """Raise Halted if training was stopped for drift."""
        if self.found is not None:
            raise Halted(self.found, self.good)
