"""Judges a run's signals at every log step, and stops it, on every rank at the same step, before it ruins the model."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import Trainer, TrainerCallback

from tasks.job_spec import JobSpec
from tasks.jobs.callbacks import of_training
from tasks.jobs.job import Halted
from tasks.monitoring.drift import (
    FINDINGS,
    HALT,
    Finding,
    Series,
    add_point,
    closeness,
    corridors,
    is_inside,
    judge,
    watched,
)

WORST = "worst_signal"
LAST_GOOD = "last_good.json"  # in the checkpoints' folder: the newest one inside all corridors


class Governor(TrainerCallback):
    """Adds `drift/<signal>`, its limits and what it finds to the log line; halts when a signal has left its corridor for good.

    Rank 0 judges and every rank does as it says: what ranks log may differ in the last digit. What was logged before a resume
    is judged again, so an interrupted run halts where the undisturbed one would have.
    """

    def __init__(self, trainer: Trainer, spec: JobSpec):
        self.drift, self.first_step = spec.drift, spec.first_step
        self.is_main = trainer.accelerator.is_main_process
        self.num_processes = trainer.accelerator.num_processes
        self.series: Series = defaultdict(list)
        self.warned: set[tuple[str, str]] = set()
        self.halt: Finding | None = None
        self.worst: tuple[float, str] = (0.0, "")
        self.findings: list[dict[str, Any]] = []
        if spec.start_from:  # a restart is judged as the rest of the run that it goes on from
            before = [json.loads(line) for line in spec.metrics_file.read_text().splitlines()]
            for line in before:
                if line["step"] <= self.first_step:
                    self._take(line["step"] - self.first_step, line["metrics"])

    def on_train_begin(self, args, state, control, **kwargs):
        for logs in state.log_history:
            self._take(logs["step"], logs)
            self.findings += logs.get(FINDINGS, [])
            self.worst = max(self.worst, (logs.get("drift/worst", 0.0), logs.get(WORST, "")))
        self.warned = {(finding["signal"], finding["detector"]) for finding in self.findings}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.halt is not None or not of_training(logs):
            return
        self._take(state.global_step, logs)
        findings = self._agreed(judge(self.series, self.drift) if self.series else [])
        self.halt = next((finding for finding in findings if finding.severity == HALT), None)
        fresh = [f for f in findings if f.severity == HALT or (f.signal, f.detector) not in self.warned]
        self.warned |= {(finding.signal, finding.detector) for finding in findings}
        self._note(state, logs, fresh)
        if self.halt is not None:
            control.should_training_stop = True
            control.should_save = False  # nobody must go on from here as if nothing had been

    def on_save(self, args, state, control, **kwargs):
        """Mark the checkpoint that was just written as the last good one, if nothing is beyond a halt limit."""
        if self.is_main and self.halt is None and is_inside(self.series, self.drift):
            good = {"checkpoint": f"checkpoint-{state.global_step}", "step": self.first_step + state.global_step}
            good |= {"left": state.max_steps - state.global_step}
            beside = Path(args.output_dir, f".{LAST_GOOD}")
            beside.write_text(json.dumps(good))
            beside.replace(Path(args.output_dir, LAST_GOOD))

    def metrics(self) -> dict[str, float]:
        """Return how near the run came to a halt limit: `drift/worst` is 1.0 on the limit."""
        return {"drift/worst": self.worst[0]}

    def _take(self, step: int, logs: dict) -> None:
        for name, value in logs.items():
            if isinstance(value, int | float) and watched(name, self.drift):
                add_point(self.series[name], self.first_step + step, float(value))

    def _agreed(self, findings: list[Finding]) -> list[Finding]:
        if self.num_processes == 1:
            return findings
        return broadcast_object_list([findings])[0]

    def _note(self, state, logs: dict, fresh: list[Finding]) -> None:
        """Put the corridors and the findings where the metrics file and the next resume find them."""
        for name, ratio in closeness(self.series, self.drift).items():
            self.worst = max(self.worst, (ratio, name))
        told = [finding.as_dict() for finding in fresh]
        self.findings += told
        noted = corridors(self.series, self.drift) | {FINDINGS: told, "drift/worst": self.worst[0], WORST: self.worst[1]}
        logs.update(noted)
        if state.log_history:
            state.log_history[-1].update(noted)


def settle(governor: Governor, trainer: Trainer, spec: JobSpec) -> dict[str, Any]:
    """Return what was found, and what became of a halt, for the result's details.

    With `on_halt: rollback` the policy is put back to its last good checkpoint; otherwise, or without one, raises Halted.
    """
    told = {FINDINGS: governor.findings, WORST: governor.worst[1]} if spec.drift else {}
    if governor.halt is None:
        return told
    good = last_good(spec.checkpoints)
    if spec.drift.get("on_halt") != "rollback" or good is None:
        raise Halted(governor.halt.as_dict(), good)
    load_weights(trainer.model, spec.checkpoints / good["checkpoint"])
    return told | {"halted": str(governor.halt), "rolled_back_to": good["step"]}


def last_good(checkpoints: Path) -> dict[str, Any] | None:
    """Return `{"checkpoint", "step", "left"}` of the last checkpoint inside the corridors, if one was kept."""
    marker = checkpoints / LAST_GOOD
    good = json.loads(marker.read_text()) if marker.is_file() else None
    return good if good and (checkpoints / good["checkpoint"]).is_dir() else None


def load_weights(model: PeftModel, checkpoint: Path) -> None:
    """Give the trained adapter the weights of a checkpoint; the frozen reference stays what it is."""
    weights = load_peft_weights(str(checkpoint), device=str(model.device))
    set_peft_model_state_dict(model, weights, adapter_name="default")
