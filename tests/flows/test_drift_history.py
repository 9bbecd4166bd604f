"""`posttrain drift`: what it reads, what it judges, what it shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.drift_history import history, judge_file, read_series, sparkline
from profiles.schema import Drift
from tasks.errors import ProfileError
from tasks.monitoring import mlflow_runs

RISING = [0.1, 0.2, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]  # beyond kl's halt limit of 2.0, once its average is


def written(path: Path) -> Path:
    """The same KL in each of the forms that are read."""
    if path.suffix == ".json":
        path.write_text(json.dumps({"kl": RISING}))
    elif path.suffix == ".csv":
        path.write_text("step,kl,reward\n" + "".join(f"{i},{v},\n" for i, v in enumerate(RISING, start=1)))
    else:
        lines = [{"step": i, "max_steps": 8, "time": 0.0, "metrics": {"kl": v}} for i, v in enumerate(RISING, start=1)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name", ["series.json", "series.csv", "metrics.jsonl"])
def test_series_of_any_form_are_read_and_judged_alike(tmp_path, name):
    """EWMA with weight 0.3 from 0.1: 0.13, 0.99, 1.59, 2.02, 2.31, 2.52: above 2.0 at steps 5, 6 and 7."""
    path = written(tmp_path / name)
    assert read_series(path) == {"kl": list(enumerate(RISING, start=1))}
    halts = [finding for finding in judge_file(path, Drift()) if finding.severity == "halt"]
    average = 0.1
    beyond = []
    for step, value in enumerate(RISING[1:], start=2):
        average = 0.3 * value + 0.7 * average
        beyond += [step] if average > 2.0 else []
    assert [(halt.signal, halt.step) for halt in halts] == [("kl", beyond[2])]


@pytest.mark.parametrize("content", ["", "kl: 1\n", '{"kl": [1]}\n{"loss"', "{}"])
def test_file_that_holds_no_series_is_refused_with_what_is_wanted(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(ProfileError, match=r"metrics\.jsonl"):
        read_series(path)


def test_command_exits_5_where_a_run_would_have_been_halted(tmp_path):
    path = written(tmp_path / "series.json")
    command = [sys.executable, "-P", "-m", "flows.cli", "drift", "--series", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"POSTTRAIN_HOME": str(tmp_path)})
    assert done.returncode == 5 and "halt kl averaged" in done.stdout, done.stderr
    path.write_text(json.dumps({"kl": [0.1] * 20}))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"POSTTRAIN_HOME": str(tmp_path)})
    assert done.returncode == 0 and "inside" in done.stdout, done.stderr


def test_sparkline_goes_from_the_lowest_block_to_the_highest():
    assert sparkline([0.0, 0.5, 1.0, None]) == "▁▅█ "
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""


def test_history_is_the_profiles_own_runs_the_oldest_first(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for number, tags in enumerate([{"accepted": "true"}, {"error": "DriftHalted"}]):
        own = {"profile": "mine", "run_id": f"run-{number}", "policy.fingerprint": "p"}
        run_id = mlflow_runs.open_run("mine", f"run-{number}", own | tags)
        mlflow_runs.log_scalars(run_id, {"canary/reward": float(number)})
        mlflow_runs.open_run("mine", "grpo", {"stage": "grpo"}, run_id)
    rows = history("mine", 10)
    assert [(row["run"], row["verdict"], row["canary/reward"]) for row in rows] == [
        ("run-0", "accepted", 0.0),
        ("run-1", "DriftHalted", 1.0),
    ]
    assert [row["run"] for row in history("mine", 1)] == ["run-1"]
    assert history("nobody's", 10) == []
    assert [past["tags"]["run_id"] for past in mlflow_runs.accepted_runs("mine", but="q")] == ["run-0"]
    assert mlflow_runs.accepted_runs("mine", but="p") == []
