"""A job that halts on drift starts again from its last good checkpoint; a small program stands in for the job environment."""

import json
import os
import sys
import threading

import pytest

from profiles.load import load
from profiles.schema import StagePlacement
from tasks.errors import DriftHalted
from tasks.job_spec import JobSpec
from tasks.restart import run_governed

# Halts while the learning rate is above what it can bear; leaves what it was told.
JOB = """#!{python} -SE
import json, sys
from pathlib import Path
spec = json.loads(Path(sys.argv[-1]).read_text())
work, args = Path(spec["work"]), spec["config"]["args"]
with (work / "told.jsonl").open("a") as file:
    file.write(json.dumps(spec) + "\\n")
good = {{"checkpoint": "checkpoint-20", "step": spec["first_step"] + 20, "left": args["max_steps"] - 20}}
result = {{"status": "done", "metrics": {{}}, "details": {{"worst_signal": "kl"}}}}
if args["learning_rate"] > {bearable}:
    result = {{"status": "halted", "error": "kl averaged 3.", "details": {{"finding": {{}}, "last_good": {good}}}}}
(work / "result.json").write_text(json.dumps(result))
sys.exit(5 if result["status"] == "halted" else 0)
"""


@pytest.fixture
def governed(tmp_path):
    """Run a job that bears learning rates up to a limit; return the result, and what each of its jobs was told."""

    def run(bearable: float, retries: int = 2, good: str = "good", on_halt: str = "retry"):
        work = tmp_path / "work"
        for folder in (work, tmp_path / "output"):
            folder.mkdir()
        python = tmp_path / "python"
        python.write_text(JOB.format(python=sys.executable, bearable=bearable, good=good))
        python.chmod(0o755)
        drift = load("quickstart", []).drift.model_dump()
        drift |= {
            "on_halt": on_halt,
            "retry": {"max_retries": retries, "change": {"learning_rate": 0.5, "num_generations": 2.0}},
        }
        spec = JobSpec(
            stage="grpo", module="tasks.jobs.grpo", seed=7, inputs={}, drift=drift,
            config={"args": {"learning_rate": 0.8, "num_generations": 4, "max_steps": 100}},
            output=tmp_path / "output", work=work, checkpoints=tmp_path / "checkpoints",
        )  # fmt: skip
        lock = os.open(tmp_path / "lock", os.O_CREAT)
        try:
            result = run_governed(spec, StagePlacement(python=str(python)), lambda lines: None, threading.Event(), lock)
        finally:
            os.close(lock)
            run.told = [json.loads(line) for line in (work / "told.jsonl").read_text().splitlines()]
        return result, run.told

    return run


def test_restart_has_the_steps_that_are_left_and_the_stated_change_each_time_again(governed, tmp_path):
    """0.8 and 0.4 halt at 20 steps each, 0.2 is borne: 60 of 100 steps are left."""
    result, told = governed(bearable=0.25)
    assert [spec["config"]["args"] for spec in told] == [
        {"learning_rate": 0.8, "num_generations": 4, "max_steps": 100},
        {"learning_rate": 0.4, "num_generations": 8, "max_steps": 80},
        {"learning_rate": 0.2, "num_generations": 16, "max_steps": 60},
    ]
    assert [spec["first_step"] for spec in told] == [0, 20, 40] and [spec["seed"] for spec in told] == [7, 8, 9]
    first, second = tmp_path / "checkpoints" / "checkpoint-20", tmp_path / "checkpoints" / "retry-1-from-20" / "checkpoint-20"
    assert [spec["start_from"] for spec in told] == [None, str(first), str(second)]
    assert len({spec["checkpoints"] for spec in told}) == 3
    assert len(result.details["retried"]) == 2 and "from step 20 with learning_rate 0.4" in result.details["retried"][0]
    assert sorted(path.name for path in (tmp_path / "work").glob("result*")) == [
        "result.halted-1.json", "result.halted-2.json", "result.json",
    ]  # fmt: skip


def test_run_that_is_borne_at_once_is_not_restarted(governed):
    result, told = governed(bearable=1.0)
    assert len(told) == 1 and "retried" not in result.details


@pytest.mark.parametrize(
    ("settings", "num_jobs"), [({"retries": 1}, 2), ({"good": "None"}, 1), ({"on_halt": "stop"}, 1)],
    ids=["too often", "no good checkpoint", "not asked for"],
)  # fmt: skip
def test_halt_that_no_restart_mends_is_a_halt(governed, settings, num_jobs):
    with pytest.raises(DriftHalted, match="kl averaged 3"):
        governed(bearable=0.0, **settings)
    assert len(governed.told) == num_jobs
