"""What only the job environment knows is asked of it once, and its answer is kept by what was asked."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profiles.load import load
from tasks.artifacts import Artifact
from tasks.check_profile import check_columns, check_profile, load_profile, question
from tasks.errors import MachineUnfit, ProfileError

WELL = '{"problems": [], "columns": {"near_answer": ["answer"], "exact_answer": ["answer"], "number_answer": ["answer"]}}'


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job environment that writes down each question and gives a fixed answer."""

    def answering(answer: str, code: int = 0) -> Path:
        python, asked = tmp_path / "bin" / "python", tmp_path / "asked"
        python.parent.mkdir(exist_ok=True)
        python.write_text(
            f"#!/bin/sh\ncat >> {asked}; echo >> {asked}\necho '{answer}'\necho broken library >&2\nexit {code}\n"
        )
        python.chmod(0o755)
        monkeypatch.setenv("POSTTRAIN_JOB_PYTHON", str(python))
        return asked

    return answering


def questions(asked: Path) -> list[dict]:
    return [json.loads(line) for line in asked.read_text().splitlines()]


def test_check_asks_for_each_stages_arguments_by_its_trl_class(job):
    profile = load("quickstart")
    asked = job(WELL)
    check_profile(profile)
    [question_asked] = questions(asked)
    classes = {where: name for where, (name, _) in question_asked["args"].items()}
    assert classes == {"recipe.sft": "SFTConfig", "recipe.reward_model": "RewardConfig", "recipe.policy": "GRPOConfig"}
    assert question_asked["args"]["recipe.policy"][1] == profile.recipe.policy.args
    assert question_asked["rewards"] == ["near_answer", "reward_model", "exact_answer"]


def test_check_of_dpo_asks_for_no_reward_but_the_scorer():
    asked = question(load("quickstart-dpo"))
    assert asked["args"]["recipe.policy"][0] == "DPOConfig"
    assert "recipe.reward_model" not in asked["args"]
    assert asked["rewards"] == ["exact_answer"]


def test_check_of_the_same_arguments_is_asked_once(job):
    asked = job(WELL)
    check_profile(load("quickstart"))
    check_profile(load("quickstart", ["gates.p_max=0.01", "recipe.seed=9"]))
    assert len(questions(asked)) == 1
    check_profile(load("quickstart", ["recipe.sft.args.max_length=65"]))
    assert len(questions(asked)) == 2


def test_check_with_problems_names_each_and_again_the_next_time(job):
    job('{"problems": ["recipe.sft.args.lr is no argument", "there is no reward function x"], "columns": {}}')
    for _ in range(2):
        with pytest.raises(ProfileError) as refused:
            check_profile(load("quickstart"))
        assert "recipe.sft.args.lr" in str(refused.value) and "reward function x" in str(refused.value)


def test_check_in_an_environment_that_breaks_is_refused_with_its_error_and_not_kept(job):
    job("", code=1)
    with pytest.raises(MachineUnfit) as refused:
        check_profile(load("quickstart"))
    assert "broken library" in str(refused.value) and "posttrain doctor" in str(refused.value)
    job(WELL)
    check_profile(load("quickstart"))


def test_check_in_an_environment_whose_libraries_talk_still_gets_its_answer(job):
    job(f"Using CPU build of libfoo\n{WELL}")
    check_profile(load("quickstart"))


def rows(folder: Path, *columns: str) -> Artifact:
    folder.mkdir()
    pq.write_table(pa.table({"row": [0], **{column: ["x"] for column in columns}}), folder / "rows.parquet")
    return Artifact("dataset", str(folder), "", "")


@pytest.mark.parametrize(
    ("overrides", "held_out", "prompts", "said"),
    [
        ([], ["prompt", "answer"], ["prompt", "answer"], None),
        (
            [],
            ["prompt", "answer"],
            ["prompt", "solution"],
            ["recipe.policy.reward_functions", "datasets.prompts"],
        ),
        ([], ["prompt", "solution"], ["prompt", "answer"], ["recipe.evaluate.scorer", "'exact_answer'", "datasets.eval"]),
        (["recipe.evaluate.rewards=[number_answer]"], ["prompt"], ["prompt", "answer"], ["recipe.evaluate.rewards"]),
    ],
    ids=["all there", "policy", "scorer", "rewards of the evaluation"],
)
def test_rows_that_lack_a_column_of_a_reward_function_are_refused_before_anything_trains(
    overrides, held_out, prompts, said, job, tmp_path
):
    job(WELL)
    both = rows(tmp_path / "held_out", *held_out), rows(tmp_path / "prompts", *prompts)
    if said is None:
        return check_columns(load("quickstart", overrides), *both)
    with pytest.raises(ProfileError) as refused:
        check_columns(load("quickstart", overrides), *both)
    assert all(part in str(refused.value) for part in [*said, "the column 'answer'"])


@pytest.mark.parametrize("stage", ["default", "policy", "export"])
def test_profile_that_names_an_accelerate_file_that_is_not_there_is_refused_with_its_neighbour(stage):
    with pytest.raises(ProfileError) as refused:
        load_profile("quickstart", [f"placement.{stage}.accelerate=ddp_9"])
    assert "'ddp_9'" in str(refused.value) and "ddp_8" in str(refused.value)
