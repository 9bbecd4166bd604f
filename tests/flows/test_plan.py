"""`posttrain plan` says what differs, and a stage in the store is a hit."""

from hypothesis import given
from hypothesis import strategies as st

from flows.plan import difference, plan
from profiles.load import load
from tasks.artifacts import Artifact
from tasks.fingerprints import fingerprint
from tasks.pipeline_run import store
from tasks.prepare_data import prepare_stage

LEAVES = st.integers() | st.text(max_size=4) | st.none()
IDENTITIES = st.dictionaries(
    st.text("abc", min_size=1, max_size=2), LEAVES | st.dictionaries(st.text("xyz", min_size=1), LEAVES, max_size=3), max_size=4
)


def fields(lines: list[str]) -> list[str]:
    return [line.split(" ")[0] for line in lines]


@given(IDENTITIES)
def test_difference_of_equal_identities_is_nothing(identity):
    assert difference(identity, identity) == []


@given(IDENTITIES, IDENTITIES)
def test_difference_names_each_field_that_differs_and_no_other(old, new):
    def differing(before: dict, after: dict, prefix: str = "") -> set[str]:
        """Fields with a value on one side only, or another on each; two mappings are compared field by field."""
        found = set()
        for key in before.keys() | after.keys():
            one, two = before.get(key, "absent"), after.get(key, "absent")
            if isinstance(one, dict) and isinstance(two, dict):
                found |= differing(one, two, f"{prefix}{key}.")
            elif one != two:
                found.add(prefix + key)
        return found

    lines = difference(old, new)
    assert set(fields(lines)) == differing(old, new)
    assert len(lines) == len(set(fields(lines)))


def test_difference_shows_both_values_of_a_nested_setting():
    old = {"stage": "sft", "recipe": {"args": {"learning_rate": 0.001, "epochs": 1}}}
    new = {"stage": "sft", "recipe": {"args": {"learning_rate": 0.002, "epochs": 1}}}
    [line] = difference(old, new)
    assert line.startswith("recipe.args.learning_rate ")
    assert line.index("0.001") < line.index("0.002")


def test_difference_says_what_came_and_what_went():
    came, went = difference({"libraries": {"trl": "1"}}, {"libraries": {"vllm": "2"}})
    assert came.startswith("libraries.trl 1") and "absent" in came
    assert went.startswith("libraries.vllm absent") and "2" in went


def test_difference_of_two_digests_is_told_by_their_beginnings():
    [line] = difference({"code": "a" * 64}, {"code": "b" * 64})
    assert "a" * 12 in line and "b" * 12 in line and "a" * 13 not in line


def test_difference_of_two_long_texts_shows_how_they_differ():
    [line] = difference({"description": "x" * 70 + "old"}, {"description": "x" * 70 + "new"})
    before, after = line.removeprefix("description ").split(" → ")
    assert before != after


def test_plan_of_a_stage_in_the_store_is_a_hit_and_the_next_one_is_planned_on_it(monkeypatch, job_python):
    monkeypatch.setenv("POSTTRAIN_JOB_PYTHON", job_python())
    profile = load("quickstart")
    identity = prepare_stage(profile, None).identity(profile.placement.of("prepare"))
    key = fingerprint(identity)
    with store().staging("prepare", key) as staged:
        for name in ("sft.jsonl", "preference.jsonl", "prompts.jsonl", "eval.jsonl"):
            (staged / name).write_text("{}\n")
        (staged / "base_model").mkdir()
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (staged / "base_model" / name).write_text("{}")
        store().commit(staged, Artifact("prepare", str(staged), key, ""), identity)
    rows = {row["stage"]: row for row in plan(profile)}
    assert rows["prepare"]["status"] == "cached" and key in rows["prepare"]["why"][0]
    assert rows["validate-eval"]["status"] == "run"
    assert rows["sft"]["status"] == "run"


def test_plan_of_a_profile_without_a_stage_does_not_list_it(monkeypatch, job_python):
    monkeypatch.setenv("POSTTRAIN_JOB_PYTHON", job_python())
    listed = [row["stage"] for row in plan(load("quickstart-dpo"))]
    assert "dpo" in listed and "grpo" not in listed
    assert "reward_model" not in listed and "validate-prompts" not in listed
