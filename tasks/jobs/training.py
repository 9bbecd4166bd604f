"""The frame around every TRL trainer: its arguments, its rows, its listeners, and the proof that something moved."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs.callbacks import MetricsFile
from tasks.jobs.canaries import add_canaries
from tasks.jobs.checkpoints import Checkpoints, ResumeProof, last_saved
from tasks.jobs.conversations import with_tool_calls
from tasks.jobs.governor import Governor, load_weights, settle
from tasks.jobs.job import Interrupted, done
from tasks.jobs.models import on_cpu, refuse_unmergeable

_IDS = ("input_ids", "prompt_ids", "completion_ids", "chosen_ids", "rejected_ids")
FROZEN_TOLERANCE = 1e-4  # of a tensor's largest value: float32 rounding of hundreds of merges and unmerges is below 1e-6


def trl_args(config_class: type, spec: JobSpec, **ours: Any) -> Any:
    """Return TRL's config from the profile's `args` and what the pipeline owns: seed, folder, no reporting."""
    # TRL turns bf16 autocast on wherever a GPU is: the recipe's dtype decides, so that a fingerprint means one computation.
    defaults = {"logging_steps": 1, "save_strategy": "no", "bf16": spec.config["dtype"] == "bfloat16"}
    defaults |= {"logging_nan_inf_filter": False}  # transformers would log a finite loss where there is none
    if on_cpu():
        defaults |= {"dataloader_pin_memory": False}
    set_seed(spec.seed)  # a fresh adapter's first values are drawn before the trainer sets the seed
    return config_class(
        **defaults | spec.config["args"] | ours,
        output_dir=str(spec.checkpoints), report_to="none", seed=spec.seed, use_cpu=on_cpu(), disable_tqdm=True,
    )  # fmt: skip


def rows(spec: JobSpec, name: str) -> Dataset:
    """Return a validated dataset's rows, without the bookkeeping column."""
    dataset = Dataset.from_parquet(str(Path(spec.inputs[name]) / "rows.parquet"), cache_dir=str(spec.work / "cache"))
    return with_tool_calls(dataset.remove_columns([c for c in ("row",) if c in dataset.column_names]))


def prove_rows(spec: JobSpec, *prepared: Dataset, packing: bool = False) -> None:
    """Raise RuntimeError unless the trainer's own datasets hold the rows and the tokens that the contract has judged.

    What the contract says of lengths, masks and truncation was computed apart from TRL; here the two must meet. Packing joins
    rows, so only their tokens are counted, and not where some are cut.
    """
    manifest = Path(spec.inputs["rows"]) / "manifest.json"
    details = json.loads(manifest.read_text())["artifact"]["details"] if manifest.is_file() else {}
    judged = details.get("tokens", {}).get(spec.stage)
    if judged is None or (packing and judged["truncated"]):
        return
    tokens = sum(len(ids) for data in prepared for name in _IDS if name in data.column_names for ids in data[name])
    num_rows = sum(map(len, prepared))
    if tokens != judged["tokens"] or (not packing and num_rows != judged["rows"]):
        raise RuntimeError(
            f"the trainer prepared {num_rows} rows of {tokens} tokens where the contract judged {judged['rows']} rows of "
            f"{judged['tokens']}: it would train on something else than what was validated"
        )


def train(trainer: Trainer, spec: JobSpec, num_rows: int | None = None) -> JobResult:
    """Train to the end and return the final value of every metric that was logged, and what became of a halt.

    `num_rows` is how many went in. TRL leaves out rows of which truncation leaves nothing to train on, and says so in the
    title of a progress bar: `data/dropped_rows` counts them (packing joins rows, so there it cannot be told).
    Told to end by SIGTERM it saves a checkpoint and raises Interrupted; the next job with the same `checkpoints` goes on there.
    Raises Halted on drift, and RuntimeError if a trainable tensor did not change or a frozen one did, if the adapter could not
    be merged, or if a resumed run is not where its checkpoint was.
    """
    refuse_unmergeable(trainer.model, spec)
    governor = listened(trainer, spec)
    if spec.start_from:
        load_weights(trainer.model, spec.start_from)
    before = {name: _sample(p) for name, p in trainer.model.named_parameters()}
    packed = getattr(trainer.args, "packing", False)
    dropped = 0 if num_rows is None or packed else num_rows - len(trainer.train_dataset)
    resumed = last_saved(spec.checkpoints)
    if resumed:
        logging.getLogger(__name__).warning("goes on from %s, which an interrupted run left", resumed)
        trainer.add_callback(ResumeProof(trainer, resumed))
    checkpoints = Checkpoints(trainer, spec)
    trainer.add_callback(checkpoints)
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    if checkpoints.stopped:
        raise Interrupted
    details = settle(governor, trainer, spec)
    _assert_moved(trainer.model, before)
    kept = details.get("rolled_back_to", math.inf) - spec.first_step  # what was rolled back is no part of the policy
    history = [line for line in trainer.state.log_history if line["step"] <= kept]
    metrics = final_metrics(history) | governor.metrics() | {"data/dropped_rows": float(dropped)}
    return done(metrics, **details)


def listened(trainer: Trainer, spec: JobSpec) -> Governor:
    """Add our listeners, each seeing what those before it added to a log line: canaries, governor, metrics file."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if "canaries" in spec.inputs:
        add_canaries(trainer, rows(spec, "canaries"), spec)
    governor = Governor(trainer, spec)
    trainer.add_callback(governor)
    trainer.add_callback(MetricsFile(spec))
    return governor


def final_metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    """Return each logged metric's mean over its last five log steps: one GRPO step's reward is mostly noise."""
    last: dict[str, list[float]] = {}
    for line in history:
        for key, value in line.items():
            if isinstance(value, int | float) and key not in ("step", "epoch") and not key.startswith("drift/"):
                last.setdefault(key, []).append(float(value))
    return {key: sum(values[-5:]) / len(values[-5:]) for key, values in last.items()}


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().flatten()[:4096].clone()


def _assert_moved(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Hold every parameter against its first 4,096 values from before: a run that trained nothing must not go on."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if all(torch.equal(_sample(parameter), before[name]) for name, parameter in trainable.items()):
        raise RuntimeError("training changed no tensor: learning_rate may be 0, or every advantage or gradient was 0")
    for name, parameter in model.named_parameters():
        old = before[name]
        drift = (_sample(parameter) - old).abs().max().item()
        if name not in trainable and drift > FROZEN_TOLERANCE * old.abs().max().item():
            raise RuntimeError(
                f"the frozen tensor {name} changed by {drift:.3g} in training: the adapter was trained on another base than "
                "the one it will be merged into"
            )
