"""A new policy's canaries against those of the last accepted runs."""

import pytest

from profiles.drift import BetweenRuns
from profiles.load import load
from tasks.artifacts import Artifact
from tasks.retrains import compare
from tasks.train_policy import judge

LIMITS = BetweenRuns()  # drops of 0.05 and 0.15, ratios of 0.5 and 0.25, KL of 0.5 and 2.0
PAST = [{"canary/reward": 0.6, "canary/entropy": 1.0}, {"canary/reward": 0.8, "canary/entropy": 0.8}, {"canary/reward": 0.7}]


@pytest.mark.parametrize(
    ("new", "verdicts"),
    [
        ({"canary/reward": 0.7}, []),  # the median of 0.6, 0.7, 0.8
        ({"canary/reward": 0.66}, []),
        ({"canary/reward": 0.64}, [False]),  # a drop of 0.06
        ({"canary/reward": 0.5}, [True]),  # a drop of 0.2
        ({"canary/reward": 1.0}, []),
        ({"canary/entropy": 0.5}, []),  # the median of 1.0 and 0.8 is 0.9: a ratio of 0.56
        ({"canary/entropy": 0.4}, [False]),  # 0.44
        ({"canary/entropy": 0.2}, [True]),  # 0.22
        ({"canary/kl_to_champion": 0.4}, []),
        ({"canary/kl_to_champion": 0.6}, [False]),
        ({"canary/kl_to_champion": 2.5}, [True]),
        ({"canary/reward": 0.5, "canary/kl_to_champion": 0.6}, [True, False]),
    ],
)
def test_policy_is_warned_of_or_refused_by_how_far_its_canaries_are(new, verdicts):
    found = compare(new, PAST, LIMITS)
    assert [drifted.fails for drifted in found] == verdicts
    assert all("drift.between_runs" in drifted.text for drifted in found)


def test_first_policy_of_a_profile_has_nothing_to_drift_from():
    assert compare({"canary/reward": 0.0, "canary/entropy": 0.0, "canary/kl": 9.0}, [], LIMITS) == []


def test_limit_of_null_never_refuses():
    limits = BetweenRuns(reward_drop_max=None)
    assert [drifted.fails for drifted in compare({"canary/reward": 0.0}, PAST, limits)] == [False]


def test_canaries_of_other_rows_scorer_or_length_are_not_comparable():
    def key(rows: str, *overrides: str) -> str:
        return judge(load("quickstart", list(overrides)), Artifact("dataset", "/rows", "a" * 12, rows))["canaries"]["key"]

    assert key("rows") == key("rows", "recipe.seed=7", "drift.canaries.every=3")
    changed = ["drift.canaries.num_prompts=8", "drift.canaries.max_new_tokens=5", "recipe.evaluate.scorer=near_answer"]
    assert len({key("rows"), key("other rows"), *(key("rows", change) for change in changed)}) == 5
