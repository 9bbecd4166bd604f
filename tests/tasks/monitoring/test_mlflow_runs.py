"""MLflow says of a run what really happened to it, and keeps TRL's names. On a real SQLite database."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks import errors
from tasks.errors import DriftHalted, GateFailed, JobFailed, PipelineError, RunCancelled
from tasks.monitoring import mlflow_runs

HALF = ".mlflow.db.*"
PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One database for this file: making one takes some seconds."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture
def client(home, folder, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("POSTTRAIN_HOME", str(folder))
    return MlflowClient(mlflow_runs.tracking_uri())


def every_error() -> list[type[PipelineError]]:
    """Every deliberate stop that there is, found by its class."""
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, PipelineError)]
    assert len(found) >= 8
    return found


def closed_by(error: BaseException | None) -> str:
    run_id = mlflow_runs.open_run("closing", "a run", {})
    if error is None:
        with mlflow_runs.closing(run_id):
            pass
    else:
        with pytest.raises(type(error)), mlflow_runs.closing(run_id):
            raise error
    return run_id


def test_run_that_is_open_says_running(client):
    assert client.get_run(mlflow_runs.open_run("closing", "open", {})).info.status == "RUNNING"


def test_run_whose_block_ends_is_finished_without_an_error(client):
    run = client.get_run(closed_by(None))
    assert run.info.status == "FINISHED"
    assert "error" not in run.data.tags and "bug" not in run.data.tags


@pytest.mark.parametrize("error_class", every_error(), ids=lambda c: c.__name__)
def test_run_stopped_on_purpose_says_why_and_is_no_bug(error_class, client):
    """architecture.md §4: a failed gate is a finished run, a cancelled one was killed, all else failed."""
    run = client.get_run(closed_by(error_class("kl_max is 0.5")))
    expected = {GateFailed: "FINISHED", RunCancelled: "KILLED"}.get(error_class, "FAILED")
    assert run.info.status == expected
    assert run.data.tags["error"] == error_class.__name__
    assert "kl_max is 0.5" in run.data.tags["error.message"]
    assert "bug" not in run.data.tags


def test_run_halted_on_drift_is_tagged_so(client):
    assert client.get_run(closed_by(DriftHalted("kl"))).data.tags["drift.halted"] == "true"
    assert "drift.halted" not in client.get_run(closed_by(JobFailed("x"))).data.tags


def test_run_whose_gate_failed_is_tagged_so(client):
    assert client.get_run(closed_by(GateFailed("p=0.4"))).data.tags["gate"] == "failed"
    assert client.get_run(closed_by(GateFailed("p=0.4", inconclusive=True))).data.tags["gate"] == "inconclusive"
    assert "gate" not in client.get_run(closed_by(JobFailed("x"))).data.tags


@pytest.mark.parametrize("bug", [KeyError("answer"), RuntimeError("boom"), SystemExit(1)], ids=lambda e: type(e).__name__)
def test_run_that_ended_by_a_bug_has_failed_and_is_tagged_so(bug, client):
    run = client.get_run(closed_by(bug))
    assert run.info.status == "FAILED"
    assert (run.data.tags["error"], run.data.tags["bug"]) == (type(bug).__name__, "true")


def test_run_ended_by_ctrl_c_was_killed(client):
    assert client.get_run(closed_by(KeyboardInterrupt())).info.status == "KILLED"


@pytest.mark.parametrize(
    "text", ["nul \x00 byte", "half a pair \ud800", "x" * 20_000, ""], ids=["nul", "surrogate", "long", "empty"]
)
def test_run_closes_whatever_the_errors_text_is(text, client):
    assert client.get_run(closed_by(JobFailed(text))).info.status == "FAILED"


def test_stage_run_is_a_child_of_its_pipeline_run_with_its_tags(client):
    parent = mlflow_runs.open_run("nested", "pipeline", {"profile": "quickstart"})
    with mlflow_runs.stage_run("nested", "sft", {"stage": "sft", "fingerprint": "0123"}, parent) as child:
        assert client.get_run(child).info.status == "RUNNING"
    run = client.get_run(child)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert (run.data.tags["stage"], run.data.tags["fingerprint"], run.info.run_name) == ("sft", "0123", "sft")
    assert run.info.experiment_id == client.get_run(parent).info.experiment_id
    assert client.get_run(parent).info.status == "RUNNING"


GRPO_KEYS = [
    "loss", "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "grad_norm", "completions/mean_length",
    "completions/clipped_ratio", "clip_ratio/region_mean", "rewards/near_answer/mean", "rewards/accuracies",
    "sampling/sampling_logp_difference/mean", "eval_accuracy",
]  # fmt: skip


def test_points_keep_trls_keys_steps_and_times(client):
    run_id = mlflow_runs.open_run("points", "grpo", {})
    lines = [
        {"step": s, "time": 100.0 + s, "metrics": {key: s + i / 100 for i, key in enumerate(GRPO_KEYS)}} for s in (1, 2, 3)
    ]
    mlflow_runs.log_points(run_id, lines[:1])
    mlflow_runs.log_points(run_id, lines[1:])
    assert sorted(client.get_run(run_id).data.metrics) == sorted(GRPO_KEYS)
    for i, key in enumerate(GRPO_KEYS):
        assert mlflow_runs.history(run_id, key) == [(s, s + i / 100) for s in (1, 2, 3)]
    assert [m.timestamp for m in client.get_metric_history(run_id, "kl")] == [101_000, 102_000, 103_000]


def test_points_more_than_one_call_takes_all_arrive(client):
    """MLflow takes at most 1,000 metrics a call."""
    run_id = mlflow_runs.open_run("points", "long", {})
    mlflow_runs.log_points(run_id, [{"step": s, "time": 1.0, "metrics": {"a": s, "b": -s}} for s in range(1100)])
    assert mlflow_runs.history(run_id, "a") == [(s, float(s)) for s in range(1100)]
    assert len(mlflow_runs.history(run_id, "b")) == 1100


def test_points_that_are_no_finite_numbers_do_not_stop_the_others(client):
    run_id = mlflow_runs.open_run("points", "odd", {})
    odd = {"nan": math.nan, "inf": math.inf, "text": "x", "none": None, "fine": 1}
    mlflow_runs.log_points(run_id, [{"step": 1, "time": 1.0, "metrics": odd}])
    kept = client.get_run(run_id).data.metrics
    assert kept["fine"] == 1.0 and math.isnan(kept["nan"])
    assert set(kept) == {"fine", "nan"}


def test_points_of_nothing_are_nothing(client):
    run_id = mlflow_runs.open_run("points", "none", {})
    mlflow_runs.log_points(run_id, [])
    assert client.get_run(run_id).data.metrics == {}


def test_params_more_than_one_call_takes_all_arrive_and_long_ones_are_cut(client):
    run_id = mlflow_runs.open_run("params", "many", {})
    mlflow_runs.log_params(run_id, {f"args.p{n}": n for n in range(250)} | {"long": "x" * 9000})
    kept = client.get_run(run_id).data.params
    assert kept["args.p249"] == "249" and len(kept) == 251
    assert kept["long"] == "x" * 6000


def test_dataset_is_linked_under_our_own_digest(client):
    run_id = mlflow_runs.open_run("datasets", "sft", {})
    mlflow_runs.log_dataset(run_id, "rows", "/store/dataset/0123", "ab" * 32, "sft")
    [entry] = client.get_run(run_id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("rows", ("ab" * 32)[:36])
    assert "/store/dataset/0123" in entry.dataset.source


def test_run_url_names_the_run_where_the_ui_serves_it(client):
    run_id = mlflow_runs.open_run("urls", "x", {})
    experiment = client.get_run(run_id).info.experiment_id
    assert mlflow_runs.run_url(run_id) == f"{mlflow_runs.LOCAL_UI}/#/experiments/{experiment}/runs/{run_id}"


def test_tracking_uri_of_the_user_is_taken_over_the_local_one(monkeypatch, home):
    assert mlflow_runs.tracking_uri() == f"sqlite:///{home}/.mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert mlflow_runs.tracking_uri() == "http://tracker:5000"


def test_errors_each_have_the_exit_code_of_the_table():
    """architecture.md §4."""
    table = {"ProfileError": 2, "ContractBroken": 3, "JobFailed": 4, "DriftHalted": 5, "GateFailed": 6, "RunCancelled": 130}
    found = {e.__name__: e.exit_code for e in every_error()}
    assert table.items() <= found.items()
    assert found["MachineUnfit"] == 4


def test_database_whose_making_was_killed_is_made_anew(tmp_path):
    """A kill among MLflow's migrations would leave tables that the next ones cannot create again."""
    code = "from tasks.monitoring import mlflow_runs; print('now', flush=True); mlflow_runs.client(); print('made', flush=True)"
    env = os.environ | {"POSTTRAIN_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": ""}
    database = tmp_path / ".mlflow" / "mlflow.db"
    died = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-P", "-c", code], cwd=PROJECT, env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "now\n"
        while process.poll() is None and not any(half.stat().st_size > 50_000 for half in database.parent.glob(HALF)):
            time.sleep(0.01)
        process.kill()
        process.communicate()
        died += not database.exists()
    assert died == 2
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=PROJECT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["now", "made"], done.stderr
    assert not list(database.parent.glob(HALF))
