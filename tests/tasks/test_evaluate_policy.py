"""What an evaluation is keyed on: what it asks, of whom, and the bytes of the tasks it asks."""

from pathlib import Path

import pytest

from profiles.load import InvalidProfile, load
from tasks.artifacts import Artifact
from tasks.build import Stage
from tasks.check_profile import check_paths, question
from tasks.errors import ProfileError
from tasks.evaluate_policy import evaluate_stage

BASE, SFT, POLICY, MERGED, ROWS, REWARD, CHAMPION = (
    Artifact(name, f"/store/{name}", name, f"bytes of {name}")
    for name in ("base_model", "sft", "grpo", "merge", "dataset", "reward_model", "export")
)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "mine.yaml").write_text("task: mine")
    (tmp_path / "evals" / "rows.jsonl").write_text("{}")
    return tmp_path / "evals"


def stage(*overrides: str, champion: Artifact | None = None) -> Stage:
    return evaluate_stage(load("quickstart", list(overrides)), BASE, SFT, POLICY, MERGED, ROWS, champion, REWARD)


def asking(folder: Path) -> list[str]:
    return ["recipe.evaluate.tasks=[mine]", f"recipe.evaluate.task_folder={folder}"]


def key(made: Stage) -> tuple[dict, dict[str, str]]:
    return made.config, {name: artifact.digest for name, artifact in made.inputs.items()}


@pytest.mark.parametrize("name", ["mine.yaml", "rows.jsonl"])
def test_evaluation_with_other_bytes_in_the_task_folder_is_another(folder, name):
    before = key(stage(*asking(folder)))
    assert key(stage(*asking(folder))) == before
    (folder / name).write_text("other bytes")
    assert key(stage(*asking(folder))) != before


def test_evaluation_with_the_same_task_folder_elsewhere_is_the_same(folder):
    before = key(stage(*asking(folder)))
    assert key(stage(*asking(folder.rename(folder.with_name("moved"))))) == before


@pytest.mark.parametrize(
    "override",
    ["tasks=[hellaswag]", "rewards=[near_answer]", "win_rate=true", "batch_size=7"],
)
def test_evaluation_that_asks_something_else_is_another(override):
    assert key(stage(f"recipe.evaluate.{override}")) != key(stage())


@pytest.mark.parametrize("override", ["num_fewshot=3", "limit=3"])
def test_evaluation_that_asks_a_task_otherwise_is_another(folder, override):
    assert key(stage(*asking(folder), f"recipe.evaluate.{override}")) != key(stage(*asking(folder)))


def test_reward_model_is_an_input_only_where_it_judges():
    assert "reward_model" not in stage().inputs
    assert stage("recipe.evaluate.win_rate=true").inputs["reward_model"] == REWARD


def test_champion_is_an_input_with_the_canaries_that_its_kl_is_measured_on():
    assert stage(champion=CHAMPION).inputs["champion"] == CHAMPION
    assert set(stage(champion=CHAMPION).config["canaries"]) == {"num_prompts", "max_new_tokens", "batch_size"}
    assert "champion" not in stage().inputs and "canaries" not in stage().config


def test_task_folder_that_is_not_there_is_refused_before_a_run_is_opened(folder):
    profile = load("quickstart", asking(folder / "missing"))
    with pytest.raises(ProfileError, match="recipe.evaluate.task_folder"):
        check_paths(profile.recipe)
    with pytest.raises(ProfileError, match="recipe.evaluate.task_folder"):
        stage(*asking(folder / "missing"))


def test_tasks_and_reward_functions_are_asked_about_before_a_run_and_again_after_a_change_in_the_folder(folder):
    asked = question(load("quickstart", [*asking(folder), "recipe.evaluate.rewards=[near_answer]"]))
    assert "near_answer" in asked["rewards"] and asked["tasks"]["names"] == ["mine"]
    (folder / "mine.yaml").write_text("task: other")
    assert question(load("quickstart", asking(folder)))["tasks"] != asked["tasks"]
    assert "tasks" not in question(load("quickstart"))  # lm-eval is not even imported


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["recipe.evaluate.limit=3"], ["limit", "tasks"]),
        (["recipe.evaluate.task_folder=evals"], ["task_folder", "tasks"]),
        (["recipe.evaluate.rewards=[near_answer, near_answer]"], ["rewards", "near_answer"]),
        (["recipe.evaluate.rewards=[reward_model]"], ["rewards", "win_rate"]),
    ],
)
def test_evaluate_block_that_contradicts_itself_is_refused(overrides, named):
    with pytest.raises(InvalidProfile) as refused:
        load("quickstart", overrides)
    assert all(name in str(refused.value) for name in named)
