"""What listens to a TRL trainer: the metrics file that the pipeline reads, and the stop on SIGTERM."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from tasks.job_spec import JobSpec
from tasks.monitoring.drift import FINDINGS

SAVED = "saved"


class MetricsFile(TrainerCallback):
    """Appends every log line, unrenamed, to the job's metrics file; only rank 0 writes."""

    def __init__(self, spec: JobSpec):
        self.path, self.first_step = spec.metrics_file, spec.first_step

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
        steps = {"step": self.first_step + step, "max_steps": self.first_step + state.max_steps}
        line = steps | {"time": time.time(), "metrics": metrics, FINDINGS: logs.get(FINDINGS, [])}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def of_training(logs: dict[str, Any] | None) -> bool:
    """Tell whether a log line is a training step's, not an evaluation's or the summary at the end."""
    return bool(logs) and "train_runtime" not in logs and not any(name.startswith("eval_") for name in logs)


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
