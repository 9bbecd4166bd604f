"""A run that dies and is gone on with ends with the undisturbed run's weights and logged numbers, to the last digit."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import LORA
from transformers import TrainerCallback

from profiles.schema import METHODS as POLICIES
from tasks.job_spec import JobSpec
from tasks.jobs import without_vllm  # noqa: F401  (before any trainer is imported)
from tasks.jobs.checkpoints import SAVED, drop_older, is_boundary, last_saved

pytestmark = pytest.mark.job
PROJECT = Path(__file__).resolve().parents[2]
CLOCK = ("step_time", "runtime", "per_second")  # what a run measures of its own pace
SINCE_THE_RESUME = ("num_tokens", "train_loss")  # TRL counts and transformers averages anew (docs/resume.md)
COMMON = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 12, "gradient_checkpointing": False}
COMMON |= {"logging_steps": 2, "learning_rate": 1e-3}
DROPOUT = LORA | {"lora_dropout": 0.1}
ONLINE = {"num_generations": 4, "max_completion_length": 8, "beta": 0.05}
REWARDS = [{"name": "near_answer", "weight": 1.0}]
# 128 rows in steps of 16 are epochs of 8 steps
METHODS = {
    "sft": ("sft", {"lora": DROPOUT, "args": COMMON | {"max_length": 64}}),
    "sft packed": (
        "sft",
        {"lora": DROPOUT, "args": COMMON | {"max_length": 64, "packing": True, "packing_strategy": "wrapped"}},
    ),
    "reward_model": ("reward_model", {"lora": None, "eval_ratio": 0.25, "args": COMMON | {"max_length": 64}}),
    "dpo": ("dpo", {"lora": None, "args": COMMON | {"max_length": 64}}),
    "kto": ("kto", {"lora": None, "args": COMMON | {"max_length": 64}}),
    "rloo": ("rloo", {"lora": None, "reward_functions": REWARDS, "args": COMMON | ONLINE}),
    "grpo": ("grpo", {"lora": None, "rollouts": "transformers", "reward_functions": REWARDS, "args": COMMON | ONLINE}),
}
ROWS = {
    "sft": "sft",
    "reward_model": "preference",
    "dpo": "preference",
    "kto": "unpaired",
    "rloo": "prompts",
    "grpo": "prompts",
}


class Killed(Exception):
    """What ends a run here as SIGKILL does there: nothing after it runs."""


@pytest.fixture
def dies_at(monkeypatch):
    """A function that lets the next run die in the middle of a step."""
    from tasks.jobs import training

    listened = training.listened

    def arrange(step: int | None) -> None:
        class Death(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                if state.global_step == step:
                    raise Killed

        def with_death(trainer, spec):
            governor = listened(trainer, spec)
            trainer.add_callback(Death())
            return governor

        monkeypatch.setattr(training, "listened", with_death)

    return arrange


def run(spec: JobSpec):
    import importlib

    return importlib.import_module(spec.module).main(spec)


def numbers(spec: JobSpec) -> dict[int, dict[str, float]]:
    """Return what was logged last at each step, without the clock's."""
    lines = [json.loads(line) for line in spec.metrics_file.read_text().splitlines()]
    return {
        line["step"]: {
            name: value
            for name, value in line["metrics"].items()
            if not any(part in name for part in (*CLOCK, *SINCE_THE_RESUME)) and not math.isnan(value)
        }
        for line in lines
    }


def weights(spec: JobSpec) -> dict[str, torch.Tensor]:
    [file] = spec.output.glob("*.safetensors")
    return load_file(file)


def job(spec, folder: str, method: str, sft: str) -> JobSpec:
    stage, config = METHODS[method]
    inputs = {"sft": sft} if stage in POLICIES else {}
    made = spec(f"{folder}", ROWS[stage], inputs, **config)
    return made.model_copy(update={"stage": stage, "module": f"tasks.jobs.{stage}"})


@pytest.mark.parametrize("step", [5, 9], ids=["inside an epoch", "after its end"])
@pytest.mark.parametrize("method", METHODS)
def test_run_that_died_and_is_gone_on_with_is_the_undisturbed_run(method, step, spec, sft_adapter, dies_at):
    undisturbed = job(spec, "undisturbed", method, sft_adapter)
    run(undisturbed)
    killed = job(spec, "killed", method, sft_adapter).model_copy(update={"checkpoint_seconds": 0})
    dies_at(step)
    with pytest.raises(Killed):
        run(killed)
    assert last_saved(killed.checkpoints).name == f"checkpoint-{step - 1}"
    dies_at(None)
    run(killed)
    assert numbers(killed) == numbers(undisturbed)
    mine, theirs = weights(killed), weights(undisturbed)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


def process(spec: JobSpec) -> subprocess.Popen:
    """Start a job as the launcher does, in a process that can really be killed."""
    (spec.work / "job.json").write_text(spec.model_dump_json())
    env = os.environ | {"PYTHONPATH": str(PROJECT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    log = (spec.work / "log.txt").open("a")
    return subprocess.Popen([sys.executable, "-P", "-m", spec.module, spec.work / "job.json"], env=env, stdout=log, stderr=log)


def test_grpo_with_vllm_killed_by_the_kernel_is_the_undisturbed_run_when_gone_on_with(spec, sft_adapter):
    config = METHODS["grpo"][1] | {"rollouts": "vllm"}
    undisturbed = spec("undisturbed", "prompts", {"sft": sft_adapter}, **config)
    undisturbed = undisturbed.model_copy(update={"stage": "grpo", "module": "tasks.jobs.grpo"})
    assert process(undisturbed).wait(240) == 0, (undisturbed.work / "log.txt").read_text()[-2000:]
    killed = spec("killed", "prompts", {"sft": sft_adapter}, **config)
    killed = killed.model_copy(update={"stage": "grpo", "module": "tasks.jobs.grpo", "checkpoint_seconds": 0})
    first, end = process(killed), time.monotonic() + 240
    while not last_saved(killed.checkpoints):
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert process(killed).wait(240) == 0, (killed.work / "log.txt").read_text()[-2000:]
    assert "resume proven" in (killed.work / "log.txt").read_text()
    assert numbers(killed) == numbers(undisturbed)
    mine, theirs = weights(killed), weights(undisturbed)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_checkpoint_by_the_clock_waits_for_a_log_step_and_for_grpos_buffer_to_be_empty():
    from transformers import TrainingArguments

    plain = TrainingArguments(output_dir="x", logging_steps=4, use_cpu=True)
    assert [step for step in range(1, 13) if is_boundary(plain, step)] == [4, 8, 12]
    plain.steps_per_generation, plain.num_iterations, plain.gradient_accumulation_steps = 6, 2, 1
    assert [step for step in range(1, 25) if is_boundary(plain, step)] == [12, 24]
    plain.gradient_accumulation_steps = 3
    assert [step for step in range(1, 13) if is_boundary(plain, step)] == [4, 8, 12]


def test_half_written_checkpoint_is_not_gone_on_from(spec, dies_at, caplog):
    """The one before it is; and only the newest two are kept."""
    killed = job(spec, "killed", "sft", "").model_copy(update={"checkpoint_seconds": 0})
    dies_at(9)
    with pytest.raises(Killed):
        run(killed)
    assert sorted(path.name for path in killed.checkpoints.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    (killed.checkpoints / "checkpoint-8" / SAVED).unlink()
    dies_at(None)
    run(killed)
    assert set(numbers(killed)) == {2, 4, 6, 8, 10, 12}
    assert "goes on from" in caplog.text and "checkpoint-6" in caplog.text and "resume proven" in caplog.text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda where: where | {"step": 5}, "step"),
        (lambda where: where | {"rows": 64}, "rows"),
        (lambda where: where | {"global_batch": 32}, "global_batch"),
        (lambda where: where | {"seed": 7}, "seed"),
        (lambda where: where | {"learning_rate": 0.1}, "learning_rate"),
    ],
)
def test_resume_that_would_train_something_else_is_an_error(change, named, spec, dies_at):
    killed = job(spec, "killed", "sft", "").model_copy(update={"checkpoint_seconds": 0})
    dies_at(5)
    with pytest.raises(Killed):
        run(killed)
    marker = killed.checkpoints / "checkpoint-4" / SAVED
    marker.write_text(json.dumps(change(json.loads(marker.read_text()))))
    dies_at(None)
    with pytest.raises(RuntimeError, match=rf"{named} .*checkpoint-4|checkpoint-4.*{named} "):
        run(killed)


def test_resume_without_its_random_state_is_an_error(spec, dies_at):
    killed = job(spec, "killed", "sft", "").model_copy(update={"checkpoint_seconds": 0})
    dies_at(5)
    with pytest.raises(Killed):
        run(killed)
    file = killed.checkpoints / "checkpoint-4" / "rng_state.pth"
    file.unlink()
    dies_at(None)
    with pytest.raises(RuntimeError, match="random state"):
        run(killed)


def test_larger_accumulation_with_a_smaller_batch_goes_on_from_the_same_place(spec, dies_at):
    """As after running out of memory: the global batch, and so the place in the data, is the same."""
    killed = job(spec, "killed", "sft", "").model_copy(update={"checkpoint_seconds": 0})
    dies_at(5)
    with pytest.raises(Killed):
        run(killed)
    dies_at(None)
    args = killed.config["args"] | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    smaller = killed.model_copy(update={"config": killed.config | {"args": args}})
    result = run(smaller)
    undisturbed = job(spec, "undisturbed", "sft", "")
    assert result.metrics["loss"] == pytest.approx(run(undisturbed).metrics["loss"], rel=0.05)


def test_sigterm_saves_the_step_it_comes_in_and_stops(spec, monkeypatch):
    from tasks.jobs import training
    from tasks.jobs.job import Interrupted

    listened = training.listened

    class Term(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training, "listened", lambda t, s: (listened(t, s), t.add_callback(Term()))[0])
    told = job(spec, "told", "sft", "")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        run(told)
    assert last_saved(told.checkpoints).name == "checkpoint-3"
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr(training, "listened", listened)
    undisturbed = job(spec, "undisturbed", "sft", "")
    for spec_of in (told, undisturbed):
        run(spec_of)
    mine, theirs = weights(told), weights(undisturbed)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    # the line in which it was stopped averages only what came after: TRL's running sums are not in a checkpoint
    different = {step for step, logged in numbers(undisturbed).items() if numbers(told)[step] != logged}
    assert different <= {4}


def test_last_good_checkpoint_is_kept_however_old(tmp_path: Path):
    for step in (2, 4, 6, 8):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / SAVED).write_text("{}")
    (tmp_path / "last_good.json").write_text(json.dumps({"checkpoint": "checkpoint-2", "step": 2, "left": 10}))
    drop_older(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
