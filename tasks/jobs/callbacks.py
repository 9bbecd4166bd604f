"""What listens to a TRL trainer: the metrics file that the pipeline reads, and what keeps a base exact."""

import json
import time
from typing import Any

import torch
from transformers import TrainerCallback

from tasks.job_spec import JobSpec
from tasks.monitoring.drift import FINDINGS


class MetricsFile(TrainerCallback):
    """Appends every log line, unrenamed, to the job's metrics file; only rank 0 writes. Each step touches the heartbeat."""

    def __init__(self, spec: JobSpec):
        self.path, self.first_step, self.heartbeat = spec.metrics_file, spec.first_step, spec.heartbeat_file

    def on_train_begin(self, args, state, control, **kwargs):
        """Write the lines of the job that is gone on with: a curve has no gap, whichever run looks at it."""
        for logs in state.log_history:
            self._write(state, logs["step"], logs)

    def on_step_end(self, args, state, control, **kwargs):
        self.heartbeat.touch()

    def on_prediction_step(self, args, state, control, **kwargs):
        self.heartbeat.touch()

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


class FrozenWeights(TrainerCallback):
    """Puts the base back to its exact weights after each step that synced the policy to vLLM.

    TRL merges the adapter into the base for the sync and takes it out again, and each time leaves a rounding error. In bfloat16
    the errors of hundreds of steps add up; in float32 they are a reason why a resumed run, whose base is read anew, would not
    be the undisturbed one to the last digit.
    """

    def __init__(self, model: torch.nn.Module):
        frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
        self.kept = [(parameter, parameter.detach().cpu().clone()) for parameter in frozen]

    def on_step_end(self, args, state, control, **kwargs):
        with torch.no_grad():
            for parameter, kept in self.kept:
                parameter.copy_(kept)
