"""`posttrain champion | promote | rollback` as a person types them, on a real registry."""

import json
from pathlib import Path

import pytest

from flows import releases
from profiles.load import load
from tasks.artifacts import Artifact
from tasks.errors import ReleaseFailed
from tasks.monitoring import mlflow_runs, registry
from tasks.pipeline_run import CLOSED, PipelineRun, StageRecord, store


def artifact(stage: str, key: str) -> Artifact:
    with store().staging(stage, key) as staged:
        (staged / "model.safetensors").write_text(f"{stage} {key}")
        return store().commit(staged, Artifact(stage, "", key, "", details={"serve": ""}), {})


def ran(home: Path, run_id: str, key: str, exit_code: int = 0, stages: tuple[str, ...] = ("grpo", "export")) -> PipelineRun:
    """A finished run that came to these stages, compared with no champion, and registered as a candidate."""
    profile, folder = load("quickstart"), home / "quickstart" / run_id
    folder.mkdir(parents=True)
    mlflow_run_id = mlflow_runs.open_run("quickstart", run_id, {})
    run = PipelineRun(profile, run_id, folder, mlflow_run_id, "f")
    (folder / "profile.json").write_text(profile.model_dump_json())
    (folder / "process.json").write_text(json.dumps({"mlflow_run_id": mlflow_run_id, "flow_run_id": "f"}))
    (folder / "champion.json").write_text(json.dumps({"version": None, "compared_with": None}))
    error = None if exit_code == 0 else "GateFailed: FAIL: the candidate is not good enough\nand more"
    (folder / "summary.json").write_text(json.dumps({"exit_code": exit_code, "error": error}))
    for stage in stages:
        made = artifact(stage, key)
        run.record(StageRecord(stage, "ran", key, artifact=made.path))
    (folder / CLOSED).touch()
    return run


def test_promote_rollback_and_champion_say_what_is_in_force(home, posttrain):
    ran(home, "20260101", "a")
    done = posttrain("promote", "20260101")
    assert done.returncode == 0 and "version 1 of quickstart" in done.stdout and "is the champion" in done.stdout
    shown = posttrain("champion", "quickstart", "--json")
    assert {row["alias"]: row["export"] for row in json.loads(shown.stdout)} == {"champion": "a", "candidate": "a"}
    refused = posttrain("rollback", "quickstart", "--reason", "why")
    assert refused.returncode == 7 and "no previous release" in refused.stderr


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (("champion", "typo"), 7, "no release of typo"),
        (("champion", "it's"), 2, "no profile's name"),
        (("rollback", "profiles/quickstart.yaml", "--reason", "x"), 2, "no profile's name"),
        (("promote", "20990101-typo"), 7, "has no run"),
    ],
)
def test_names_that_are_none_are_told_apart_from_what_is_not_released(command, code, said, posttrain):
    done = posttrain(*command)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr


def test_run_that_its_gate_stopped_has_nothing_to_release_and_says_why(home):
    ran(home, "20260101", "a", exit_code=6, stages=("grpo",))
    with pytest.raises(ReleaseFailed, match="20260101 did not come to an export.*FAIL: the candidate is not good enough"):
        releases.promote("20260101", "I know better")
    assert registry.at("quickstart", registry.CHAMPION) is None


@pytest.mark.parametrize("command", [("champion", "quickstart"), ("serve", "quickstart@champion")])
def test_registry_that_is_away_is_no_traceback(command, posttrain):
    done = posttrain(*command, MLFLOW_TRACKING_URI="http://127.0.0.1:9", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 4 and "does not answer" in done.stderr and "Traceback" not in done.stderr
