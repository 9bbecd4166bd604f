"""The summary says of a run what its exit code, MLflow and Prefect say, and has a row for every stage."""

import json
import os
from pathlib import Path

import pytest

from flows.reporting import gate_candidate, read_scores, summarise
from profiles.load import load
from tasks import errors
from tasks.artifacts import Artifact
from tasks.errors import GateFailed, PipelineError, ProfileError, RunCancelled, RunDied
from tasks.monitoring import mlflow_runs
from tasks.pipeline_run import PipelineRun, StageRecord, open_pipeline_run

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
    left = [(stage, "skipped") for stage in ("grpo", "merge", "evaluate", "export", "promote")]
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


def write_samples(path: Path, scores: dict[str, dict[str, list[float]]]) -> Path:
    """Write each row's lines side by side, as no job does: the order must not matter."""
    lines = [
        {"metric": metric, "model": model, "row": row, "score": score}
        for metric, models in scores.items()
        for model, own in models.items()
        for row, score in enumerate(own)
    ]
    lines.sort(key=lambda line: -line["row"])
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path / "samples.jsonl"


def test_scores_of_each_metric_and_model_are_in_the_order_of_the_rows(tmp_path):
    """The gate's tests are paired: a row's scores must meet."""
    scores = {"accuracy": {"base": [0, 1, 0], "policy": [1, 1, 0]}, "win_rate/base": {"policy": [0.5, 1.0]}}
    assert read_scores(write_samples(tmp_path, scores)) == scores


def test_row_that_is_missing_or_there_twice_is_an_error(tmp_path):
    samples = write_samples(tmp_path, {"accuracy": {"base": [0, 1, 0], "policy": [1, 1, 0]}})
    lines = samples.read_text().splitlines(keepends=True)
    samples.write_text("".join(line for line in lines if '"model": "base", "row": 1' not in line))
    with pytest.raises(ValueError, match="accuracy of base has no row 1"):
        read_scores(samples)
    samples.write_text("".join([*lines, lines[0]]))
    with pytest.raises(ValueError, match="row 2 of base has accuracy twice"):
        read_scores(samples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One MLflow database for this file."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def gate(home, folder, monkeypatch, tmp_path):
    """Judge scores as a run of the quickstart does; return the run, and the error if it is refused."""
    monkeypatch.setenv("POSTTRAIN_HOME", str(folder))

    def judge(scores, settings=(), canaries=None, policy="p" * 12, rows="r" * 64):
        profile = load("quickstart", ["gates.better_than=[champion]", "gates.not_worse.accuracy=null", *settings])
        run = open_pipeline_run(profile, "flow-run")
        models = {model for own in scores.values() for model in own}
        asked = {name: {"chat_template": "t", "tasks": {}} for name in models}
        key = os.urandom(6).hex()
        with run.store.staging("evaluate", key) as staged:
            write_samples(staged, scores)
            artifact = Artifact("evaluate", "", key, "", {}, {"comparable": asked})
            evaluation = run.store.commit(staged, artifact, {"inputs": {"rows": rows}})
        trained = Artifact("grpo", str(tmp_path), policy, policy, canaries or {}, {"canaries": "key"})
        try:
            with mlflow_runs.closing(run.mlflow_run_id):
                gate_candidate(run, trained, evaluation)
        except GateFailed as error:
            return run, error
        mlflow_runs.set_tags(run.mlflow_run_id, {"accepted": "true"})
        return run, None

    return judge


def in_mlflow(run: PipelineRun) -> tuple[str, dict, dict]:
    from mlflow import MlflowClient

    found = MlflowClient(mlflow_runs.tracking_uri()).get_run(run.mlflow_run_id)
    return found.info.status, found.data.tags, found.data.metrics


BETTER = {"accuracy": {"base": [0] * 20 + [1] * 20, "champion": [0] * 20 + [1] * 20, "policy": [1] * 40}}
EQUAL = {"accuracy": {name: [0, 1] * 20 for name in ("base", "champion", "policy")}}
WORSE = {"accuracy": {"base": [1] * 40, "champion": [1] * 40, "policy": [0] * 40}}


@pytest.mark.parametrize(
    ("scores", "verdict", "tag"),
    [(BETTER, "PASS", "passed"), (EQUAL, "INCONCLUSIVE", "inconclusive"), (WORSE, "FAIL", "failed")],
    ids=["better", "equal", "worse"],
)
def test_gate_leaves_the_same_verdict_everywhere(gate, scores, verdict, tag):
    run, error = gate(scores, ["gates.floors={accuracy: 0.01}"], rows=verdict)
    left = json.loads((run.folder / "gate.json").read_text())
    assert (left["verdict"], len(left["claims"])) == (verdict, 2)
    status, tags, metrics = in_mlflow(run)
    assert (status, tags["gate"]) == ("FINISHED", tag)
    assert (metrics["gate/passed"], metrics["accuracy/policy"]) == (verdict == "PASS", sum(scores["accuracy"]["policy"]) / 40)
    estimates = json.loads((run.folder / "metrics.json").read_text())
    assert {name: own["n"] for name, own in estimates["accuracy"].items()} == dict.fromkeys(("base", "champion", "policy"), 40)
    if verdict == "PASS":
        assert error is None
    else:
        text, open_claims = str(error), [c["text"] for c in left["claims"] if c["verdict"] != "PASS"]
        assert text.startswith(verdict) and open_claims and all(claim in text for claim in open_claims)
        assert error.exit_code == 6


def test_drift_between_retrains_refuses_a_candidate_that_is_better(gate):
    assert gate(BETTER, canaries={"canary/reward": 0.9}, policy="a" * 12)[1] is None
    run, error = gate(BETTER, canaries={"canary/reward": 0.1}, policy="b" * 12)
    [found] = [claim for claim in json.loads((run.folder / "gate.json").read_text())["claims"] if claim["verdict"] != "PASS"]
    assert (found["verdict"], found["metric"]) == ("FAIL", "canary/reward")
    assert str(error).startswith("FAIL") and "drift.between_runs" in str(error)
    assert (found["estimate"], found["limit"]) == (pytest.approx(0.8), 0.15)


def test_gate_counts_the_candidates_that_were_judged_on_the_same_rows(gate):
    """The same candidate again is no further look; other rows have a count of their own."""
    counts = []
    for policy, rows in (("a", "x"), ("b", "x"), ("b", "x"), ("c", "y"), ("c", "x")):
        run, _ = gate(EQUAL, policy=policy * 12, rows=rows * 64)
        counts.append(json.loads((run.folder / "gate.json").read_text())["looks"])
    assert counts == [1, 2, 2, 1, 3]
    assert in_mlflow(run)[2]["gate/looks"] == 3


def test_gate_that_names_an_unmeasured_metric_is_a_wrong_setting(gate):
    with pytest.raises(ProfileError, match="gates.metric names 'reward/near_answer'.*accuracy"):
        gate(BETTER, ["recipe.evaluate.rewards=[near_answer]", "gates.metric=reward/near_answer"])
