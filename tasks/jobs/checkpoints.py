"""Checkpoints of a training job: when they are saved, when one counts, and the proof that a resumed run really goes on.

A checkpoint counts once `saved` is in it: it is written last, after everything else is on the disk. It says where the run was.
"""

import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from tasks.job_spec import JobSpec
from tasks.jobs.governor import last_good

SAVED = "saved"
KEPT = 2  # the newest checkpoint may be torn by what ended the machine
LOSSES = 5  # log steps that a resumed run's first loss is held against
log = logging.getLogger(__name__)


class Checkpoints(TrainerCallback):
    """Saves a checkpoint every `spec.checkpoint_seconds`, and at the end of the step in which SIGTERM comes, where it stops.

    Every rank saves at the same step. By the clock it saves where a resumed run is the undisturbed one to the last digit: after
    a log step, for TRL's running sums of metrics are not in a checkpoint, and where GRPO's buffered completions are used up,
    for they are not either. SIGTERM leaves no time to wait for such a step.
    """

    def __init__(self, trainer: Trainer, spec: JobSpec):
        self.trainer, self.folder, self.seconds = trainer, spec.checkpoints, spec.checkpoint_seconds
        self.saved_at = time.monotonic()
        self.asked = self.stopped = False
        self.handler = signal.signal(signal.SIGTERM, self._ask)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            return  # after the last step there is nothing to stop: the job ends by itself, with its result
        asked, due = self._agreed(self.asked, time.monotonic() - self.saved_at > self.seconds)
        if asked:
            self.stopped = control.should_save = control.should_training_stop = True
        elif due and is_boundary(args, state.global_step):
            control.should_save = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.handler)  # what is left, saving and measuring, is not gone on with: it ends at once

    def on_save(self, args, state, control, **kwargs):
        self.saved_at = time.monotonic()
        self.trainer.accelerator.wait_for_everyone()  # each rank writes files of its own into it
        if state.is_world_process_zero and state.global_step < state.max_steps:  # from the last step there is no going on
            folder = self.folder / f"checkpoint-{state.global_step}"
            mark(folder, position(self.trainer))
            drop_older(self.folder)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def _agreed(self, *flags: bool) -> list[bool]:
        """Return each flag as true if it is on any rank."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return list(flags)
        return accelerator.reduce(torch.tensor(flags, dtype=torch.int32, device=accelerator.device), "sum").bool().tolist()


def is_boundary(args: Any, step: int) -> bool:
    """Tell whether a run resumed after `step` logs and generates what the undisturbed one does."""
    buffered = (getattr(args, "steps_per_generation", None) or 1) * getattr(args, "num_iterations", 1)
    logged = max(1, int(args.logging_steps)) if args.logging_steps >= 1 else 1
    return step % logged == 0 and step * args.gradient_accumulation_steps % buffered == 0


def position(trainer: Trainer) -> dict[str, Any]:
    """Return where in its data and its schedule a trainer is, and what must be equal for that to mean the same."""
    args = trainer.args
    return {
        "step": trainer.state.global_step,
        "rows": len(trainer.train_dataset),
        "global_batch": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "seed": args.seed,
        "learning_rate": trainer.lr_scheduler.get_last_lr()[0],
    }


def mark(folder: Path, where: dict[str, Any]) -> None:
    """Let a checkpoint count, after all of it is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    beside = folder / f".{SAVED}"
    with beside.open("w") as file:
        json.dump(where, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / SAVED)


def saved(checkpoints: Path) -> list[Path]:
    """Return the checkpoints that count, the newest first."""
    found = [path.parent for path in checkpoints.glob(f"checkpoint-*/{SAVED}")]
    return sorted(found, key=lambda path: -int(path.name.split("-")[1]))


def drop_older(checkpoints: Path) -> None:
    """Keep the newest two and the governor's last good one; `saved` goes first, so that no half of one is believed."""
    good = last_good(checkpoints)
    for folder in saved(checkpoints)[KEPT:]:
        if good is None or folder.name != good["checkpoint"]:
            (folder / SAVED).unlink()
            shutil.rmtree(folder)


def last_saved(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint that counts, if there is one."""
    return next(iter(saved(checkpoints)), None)


class ResumeProof(TrainerCallback):
    """Holds the first step of a resumed run against what its checkpoint says: a resume that starts over is an error.

    Compared are step, learning rate, rows, global batch, seed, and, where the checkpoint is inside an epoch, the random state
    (after an epoch's end the next one's order is drawn first). A first loss far off is warned of.
    """

    def __init__(self, trainer: Trainer, checkpoint: Path):
        self.trainer, self.checkpoint = trainer, checkpoint
        self.proven = False
        self.losses: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if self.proven:
            return
        self.proven = True
        was, now = json.loads((self.checkpoint / SAVED).read_text()), position(self.trainer)
        other = [f"{name} {was[name]} → {now[name]}" for name in was if was[name] != now[name]]
        if inside_epoch(state) and not is_random_state(self.checkpoint, args):
            other.append("the random state")
        if other:
            raise RuntimeError(
                f"the run that goes on from {self.checkpoint} is not where that checkpoint was: {', '.join(other)}. It would "
                f"train something else than the undisturbed run. Remove {self.checkpoint.parent} to start again."
            )
        self.losses = [line["loss"] for line in state.log_history if "loss" in line][-LOSSES:]
        log.warning("resume proven: step, learning rate, rows, global batch, seed%s", ", random state" * inside_epoch(state))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if len(self.losses) == LOSSES and "loss" in (logs or {}):
            losses, self.losses = torch.tensor(self.losses), []
            limit = max(0.2 * losses.mean().abs().item(), 6 * losses.std().item())
            if abs(logs["loss"] - losses.mean().item()) > limit:
                log.warning(
                    "the first loss after the resume is %.4g, those before it were %.4g on average: look at the curve",
                    logs["loss"], losses.mean().item(),
                )  # fmt: skip


def inside_epoch(state: Any) -> bool:
    return abs(state.epoch - round(state.epoch)) > 1e-9


def is_random_state(checkpoint: Path, args: Any) -> bool:
    """Tell whether the CPU generator is in the state that this rank saved."""
    path = checkpoint / ("rng_state.pth" if args.world_size == 1 else f"rng_state_{args.process_index}.pth")
    # our own file; it holds NumPy's state too
    return path.is_file() and torch.equal(torch.get_rng_state(), torch.load(path, weights_only=False)["cpu"])
