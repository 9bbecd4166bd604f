"""From what is served back to rows and base, what differs between two runs, and what nothing needs any more."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from flows import cleaning
from flows.lineage import find, lineage, roots
from flows.plan import named
from flows.why import why
from profiles.load import load
from tasks.artifacts import Artifact
from tasks.environment import home
from tasks.errors import ProfileError
from tasks.fingerprints import fingerprint, tree_digest
from tasks.monitoring import mlflow_runs, registry
from tasks.pipeline_run import CLOSED, PipelineRun, StageRecord, store

LIBRARIES = {"trl": "1.12.0"}


def artifact(stage: str, beta: float = 0.1, made_of: dict[str, Artifact] | None = None, files: int = 1) -> Artifact:
    """Put an artifact in the store, made of others."""
    inputs = made_of or {}
    identity = {"stage": stage, "recipe": {"args": {"beta": beta}, "seed": 1}, "code": "c" * 64, "libraries": LIBRARIES}
    identity["inputs"] = {name: one.digest for name, one in inputs.items()}
    key = fingerprint(identity)
    with store().staging(stage, key) as staged:
        for number in range(files):
            (staged / f"weights-{number}").write_text(f"{stage} {beta}")
        details = {"made_of": {name: one.source for name, one in inputs.items()}}
        return store().commit(staged, Artifact(stage, str(staged), key, "", {"reward": beta}, details), identity)


@pytest.fixture
def base(tmp_path: Path) -> Artifact:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    digest = tree_digest(folder)
    return Artifact("base_model", str(folder), digest[:12], digest)


def chain(base: Artifact, beta: float = 0.1) -> dict[str, Artifact]:
    rows = artifact("dataset")
    policy = artifact("grpo", beta, {"base_model": base, "rows": rows})
    merged = artifact("merge", beta, {"base_model": base, "policy": policy})
    return {"dataset": rows, "grpo": policy, "merge": merged, "export": artifact("export", beta, {"merge": merged})}


def run_with(made: dict[str, Artifact], run_id: str, is_closed: bool = True) -> PipelineRun:
    profile = load("quickstart")
    run = PipelineRun(profile, run_id, home() / "quickstart" / run_id, "m", "f")
    run.folder.mkdir(parents=True)
    (run.folder / "profile.json").write_text(profile.model_dump_json())
    (run.folder / "process.json").write_text(json.dumps({"mlflow_run_id": "m", "flow_run_id": "f"}))
    for stage, one in made.items():
        run.record(StageRecord(stage, "ran", one.fingerprint, artifact=one.path, metrics=one.metrics))
    if is_closed:
        (run.folder / CLOSED).touch()
    return run


def names(what: str) -> dict[str, str]:
    """Return the state of each thing behind something, by the first part of its name."""
    return {node.what.split("/")[0]: node.state for node in roots(lineage(what))}


def test_lineage_of_a_run_reaches_rows_and_base_and_finds_them_whole(base):
    made = chain(base)
    run_with(made, "r1")
    top = lineage("r1")
    assert top.what == f"export/{made['export'].fingerprint}"
    assert top.facts["code"] == "c" * 12 and top.facts["libraries"] == LIBRARIES
    by_role = {node.role: node for node in roots(top)}
    assert by_role["rows"].what == f"dataset/{made['dataset'].fingerprint}"
    assert by_role["base_model"].what == base.path
    assert {node.state for node in roots(top)} == {"whole"}


def test_lineage_of_a_copied_export_goes_on_in_the_store(base, tmp_path):
    made = chain(base)
    shutil.copytree(made["export"].path, tmp_path / "served")
    assert names(str(tmp_path / "served"))["merge"] == "whole"
    (tmp_path / "served" / "weights-0").write_text("other weights")
    assert "weights-0 was altered" in names(str(tmp_path / "served"))["export"]


def test_lineage_says_what_is_damaged_gone_or_changed_since(base):
    made = chain(base)
    (Path(made["grpo"].path) / "weights-0").write_text("x")
    shutil.rmtree(made["dataset"].path)
    (Path(base.path) / "config.json").write_text("[]")
    found = {node.role: node.state for node in roots(lineage(made["export"].path))}
    assert "altered" in found["policy"]
    assert found["rows"] == "not here"
    assert found["base_model"] == "has other bytes now"


@pytest.mark.parametrize("what", ["r9", "nothing", "/tmp"])
def test_lineage_of_what_is_not_there_names_what_could_be_asked(what):
    with pytest.raises(ProfileError, match="run's id, a profile"):
        find(what)


def test_why_names_the_setting_by_the_profiles_own_path_and_what_came_of_it(base):
    run_with(chain(base, 0.1), "r1")
    run_with(chain(base, 0.2), "r2")
    found = why("grpo", "quickstart", None, None)
    assert (found.earlier[0], found.later[0]) == ("r1", "r2")
    assert found.fields == ["recipe.policy.args.beta 0.1 → 0.2"]
    assert found.metrics == {"reward": (0.1, 0.2)}
    merged = why("merge", "quickstart", "r1", "r2")
    assert any(line.startswith("inputs.policy ") for line in merged.fields)


def test_why_of_equal_builds_finds_nothing_and_of_one_run_says_so(base):
    run_with(chain(base), "r1")
    with pytest.raises(ProfileError, match="has 1 run that came to grpo.*dataset, grpo"):
        why("grpo", "quickstart", None, None)
    run_with(chain(base), "r2")
    assert why("grpo", "quickstart", None, None).fields == []
    with pytest.raises(ProfileError, match="r7 .*r2, r1"):
        why("grpo", "quickstart", None, "r7")


def test_why_of_a_build_that_failed_reads_what_its_run_kept(base):
    made = chain(base)
    first = run_with(made, "r1")
    (first.folder / "grpo").mkdir()
    later = run_with({}, "r2")
    later.record(StageRecord("grpo", "failed", "gone", reason="JobFailed: x"))
    (later.folder / "grpo").mkdir()
    identity = store().identity("grpo", made["grpo"].fingerprint)
    (later.folder / "grpo" / "identity.json").write_text(json.dumps(identity | {"code": "d" * 64}))
    assert [line.split()[0] for line in why("grpo", "quickstart", None, None).fields] == ["code"]


@pytest.mark.parametrize(
    ("line", "stage", "wanted"),
    [
        ("recipe.args.beta 0.1 → 0.2", "grpo", "recipe.policy.args.beta 0.1 → 0.2"),
        ("recipe.args.beta 0.1 → 0.2", "dpo", "recipe.policy.args.beta 0.1 → 0.2"),
        ("recipe.lora.r 8 → 16", "sft", "recipe.sft.lora.r 8 → 16"),
        ("recipe.dtype float32 → bfloat16", "merge", "recipe.export.dtype float32 → bfloat16"),
        ("recipe.seed 1 → 2", "sft", "recipe.seed 1 → 2"),
        ("recipe.kind eval → prompt_only", "validate-eval", "recipe.datasets.eval.kind eval → prompt_only"),
        ("inputs.rows a → b", "sft", "inputs.rows a → b"),
    ],
)
def test_field_of_a_stage_has_the_profiles_name(line, stage, wanted):
    assert named(line, stage) == wanted


@pytest.fixture
def five_runs(base):
    """Five runs, each with a policy of its own; the first one's export is the champion."""
    made = [chain(base, beta) for beta in (0.1, 0.2, 0.3, 0.4, 0.5)]
    for number, one in enumerate(made):
        run_with(one, f"r{number}")
    mlflow_run_id = mlflow_runs.open_run("quickstart", "r0", {})
    with mlflow_runs.closing(mlflow_run_id):
        version = registry.register("quickstart", made[0]["export"], mlflow_run_id, {"run_id": "r0"})
    registry.point(version, registry.CHAMPION)
    return made


def test_gc_keeps_releases_and_recent_runs_with_all_that_they_are_made_of(five_runs):
    found = {f"{item.path.parent.name}/{item.path.name}" for item in cleaning.unneeded(keep=2)}
    gone = {f"{stage}/{five_runs[n][stage].fingerprint}" for n in (1, 2) for stage in ("grpo", "merge", "export")}
    assert found == gone


def test_gc_removes_what_it_showed_and_nothing_else(five_runs):
    found = cleaning.unneeded(keep=2)
    assert all(item.size > 0 and item.path.exists() for item in found)
    cleaning.free(found)
    assert not any(item.path.exists() for item in found)
    for number in (0, 3, 4):
        assert set(names(five_runs[number]["export"].path).values()) == {"whole"}
    assert cleaning.unneeded(keep=2) == []


def test_gc_keeps_what_a_run_has_that_has_not_ended(five_runs, base):
    run_with(chain(base, 0.9), "a-running-one", is_closed=False)
    found = cleaning.unneeded(keep=1)
    kept = store().place("export", chain(base, 0.9)["export"].fingerprint)
    assert kept not in {item.path for item in found}


def test_gc_finds_what_dead_builds_left_and_spares_what_is_young(home):
    old = time.time() - 2 * cleaning.LEFTOVER_SECONDS
    for name, when in ((".abc.1234", old), (".abd.5678", time.time())):
        folder = home / ".store" / "sft" / name
        folder.mkdir(parents=True)
        (folder / "half").write_text("x")
        os.utime(folder, (when, when))
    assert [item.path.name for item in cleaning.unneeded(keep=1)] == [".abc.1234"]


def test_gc_frees_checkpoints_of_finished_and_of_abandoned_builds_unless_a_job_has_them(home, base):
    import fcntl

    made = artifact("sft")
    day = time.time() - 2 * 86400
    for key, when in ((made.fingerprint, time.time()), ("abandoned", day), ("young", time.time()), ("held", day)):
        folder = home / ".checkpoints" / "sft" / key / "checkpoint-4"
        folder.mkdir(parents=True)
        for path in (folder, folder.parent):
            os.utime(path, (when, when))
    with (home / ".checkpoints" / "sft" / "held.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = {item.path.name for item in cleaning.unneeded(keep=1)} - {"sft"}
    assert found == {"abandoned", made.fingerprint}
