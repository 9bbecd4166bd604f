"""The summary says of a run what its exit code, MLflow and Prefect say, and has a row for every stage."""

import json

import pytest

from flows.reporting import read_scores, summarise
from profiles.load import load
from tasks import errors
from tasks.errors import PipelineError, RunCancelled, RunDied
from tasks.pipeline_run import PipelineRun, StageRecord

DELIBERATE = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, PipelineError)]
PROMISED = {"profile", "run_id", "status", "exit_code", "stages", "metrics", "gate", "export", "mlflow_run_id"}
PROMISED_OF_A_STAGE = {"stage", "status", "fingerprint", "seconds", "artifact", "mlflow_run_id"}


@pytest.fixture
def run(tmp_path):
    def of(profile: str = "quickstart") -> PipelineRun:
        return PipelineRun(load(profile), "20261122-120000-abcd", tmp_path, "mlflow-run", "flow-run")

    return of


def statuses(summary: dict) -> list[tuple[str, str]]:
    return [(stage["stage"], stage["status"]) for stage in summary["stages"]]


def test_summary_has_what_was_promised_and_is_json(run):
    quickstart = run()
    quickstart.record(StageRecord("sft", "ran", "0123456789ab", 1.5, "/store/sft", "child"))
    summary = json.loads(json.dumps(summarise(quickstart, None)))
    assert set(summary) >= PROMISED
    assert all(set(stage) >= PROMISED_OF_A_STAGE for stage in summary["stages"])
    assert (summary["status"], summary["exit_code"], summary["profile"]) == ("completed", 0, "quickstart")


@pytest.mark.parametrize("error_class", DELIBERATE, ids=lambda c: c.__name__)
def test_summary_of_a_run_stopped_on_purpose_has_its_exit_code_and_text(error_class, run):
    summary = summarise(run(), error_class("what stopped it"))
    assert summary["exit_code"] == error_class.exit_code
    assert summary["status"] == {RunCancelled: "cancelled", RunDied: "crashed"}.get(error_class, "failed")
    assert "what stopped it" in summary["error"]


def test_summary_of_a_run_that_ended_by_a_bug_has_failed(run):
    summary = summarise(run(), KeyError("answer"))
    assert (summary["status"], summary["exit_code"]) == ("failed", 1)


def test_summary_of_a_run_ended_by_ctrl_c_was_cancelled(run):
    summary = summarise(run(), KeyboardInterrupt())
    assert (summary["status"], summary["exit_code"]) == ("cancelled", 130)


def test_summary_lists_stages_as_they_ended_and_then_those_not_come_to(run):
    quickstart = run()
    for stage, status in (("prepare", "cached"), ("validate-eval", "ran"), ("sft", "ran"), ("reward_model", "failed")):
        quickstart.record(StageRecord(stage, status))
    ended = [("prepare", "cached"), ("validate-eval", "ran"), ("sft", "ran"), ("reward_model", "failed")]
    left = [(stage, "skipped") for stage in ("grpo", "evaluate", "merge", "export")]
    assert statuses(summarise(quickstart, None)) == ended + left


def test_summary_of_dpo_says_why_there_is_no_reward_model(run):
    stages = {stage["stage"]: stage for stage in summarise(run("quickstart-dpo"), None)["stages"]}
    assert "dpo" in stages and "grpo" not in stages
    assert "recipe" in stages["reward_model"]["reason"] and "recipe" not in stages["export"]["reason"]


def test_summary_names_the_export_once_there_is_one(run):
    quickstart = run()
    assert summarise(quickstart, None)["export"] is None
    export = quickstart.store.place("export", "0123456789ab")
    export.mkdir(parents=True)
    (export / "manifest.json").write_text(json.dumps({"artifact": {"details": {"serve": "--dtype float32"}}}))
    quickstart.record(StageRecord("export", "ran", export.name, artifact=str(export)))
    summary = summarise(quickstart, None)
    assert (summary["export"], summary["serve"]) == (str(export), f"vllm serve {export} --dtype float32")


def test_scores_of_each_model_keep_the_order_of_the_rows(tmp_path):
    """The gate's test is paired: a row's scores must meet."""
    lines = [{"metric": metric, "model": model, "row": row, "score": score}
             for metric in ("accuracy", "reward/near_answer") for row, scores in enumerate([(0, 1), (1, 1), (0, 0)])
             for model, score in zip(("base", "policy"), scores, strict=True)]  # fmt: skip
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_scores(tmp_path / "samples.jsonl", "accuracy") == {"base": [0, 1, 0], "policy": [1, 1, 0]}
