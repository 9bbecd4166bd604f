"""Settings that are each fine alone and wrong together are refused, both named, with the way out."""

from typing import Any

import pytest

from profiles.load import InvalidProfile, load

PAIRS = {"path": "pairs.jsonl", "kind": "preference"}
DEMOS = {"path": "demos.jsonl", "kind": "prompt_completion"}
TEXTS = {"path": "texts.jsonl", "kind": "language_modeling"}
PROMPTS = {"path": "prompts.jsonl", "kind": "prompt_only"}
HELD_OUT = {"path": "eval.jsonl", "kind": "eval"}
SFT = {"lora": {"r": 8}}
LEARNED = [{"name": "exact_answer"}, {"name": "reward_model", "weight": 0.1}]
DPO = {"method": "dpo", "lora": {"r": 8}}
MADE = {"prepared": "made"}

# what is changed in the smallest profile (a dotted path to its new value, None to remove it), and what the refusal names
CONTRADICTIONS = {
    "no adapter at all": ({"policy.lora": None}, ["recipe.sft", "recipe.policy.lora"]),
    "two adapters": ({"sft": SFT, "datasets.sft": DEMOS}, ["recipe.policy.lora", "recipe.sft"]),
    "reward model that nobody trains": (
        {"policy.reward_functions": LEARNED},
        ["recipe.policy.reward_functions", "recipe.reward_model"],
    ),
    "reward model that GRPO does not read": (
        {"reward_model": {}, "datasets.preference": PAIRS},
        ["recipe.reward_model", "recipe.policy.reward_functions"],
    ),
    "reward model of weight 0": (
        {
            "reward_model": {},
            "datasets.preference": PAIRS,
            "policy.reward_functions": [{"name": "exact_answer"}, {"name": "reward_model", "weight": 0}],
        },
        ["recipe.reward_model", "recipe.policy.reward_functions"],
    ),
    "reward model for DPO": (
        {"policy": DPO, "reward_model": {}, "datasets.preference": PAIRS},
        ["recipe.reward_model", "recipe.policy.method", "dpo"],
    ),
    "only rewards of weight 0": (
        {"policy.reward_functions": [{"name": "exact_answer", "weight": 0}]},
        ["recipe.policy.reward_functions"],
    ),
    "SFT without rows": ({"sft": SFT, "policy.lora": None}, ["recipe.datasets.sft", "prompt_completion"]),
    "SFT on pairs": (
        {"sft": SFT, "policy.lora": None, "datasets.sft": PAIRS},
        ["recipe.datasets.sft.kind", "preference", "prompt_completion"],
    ),
    "reward model without rows": (
        {"reward_model": {}, "policy.reward_functions": LEARNED},
        ["recipe.datasets.preference", "reward-model"],
    ),
    "reward model on demonstrations": (
        {"reward_model": {}, "policy.reward_functions": LEARNED, "datasets.preference": DEMOS},
        ["recipe.datasets.preference.kind", "prompt_completion", "preference"],
    ),
    "GRPO without prompts": ({"datasets.prompts": None}, ["recipe.datasets.prompts", "recipe.policy.method", "grpo"]),
    "GRPO on demonstrations": (
        {"datasets.prompts": DEMOS},
        ["recipe.datasets.prompts.kind", "prompt_completion", "prompt_only", "recipe.policy.method"],
    ),
    "DPO without pairs": ({"policy": DPO}, ["recipe.datasets.preference", "recipe.policy.method", "dpo"]),
    "DPO on prompts": (
        {"policy": DPO, "datasets.preference": PROMPTS},
        ["recipe.datasets.preference.kind", "prompt_only", "recipe.policy.method"],
    ),
    "accuracy of pairs": (
        {"datasets.eval": PAIRS},
        ["recipe.datasets.eval.kind", "preference", "recipe.evaluate.metric", "accuracy"],
    ),
    "preference accuracy of answers": (
        {"evaluate": {"metric": "preference_accuracy"}},
        ["recipe.datasets.eval.kind", "eval", "recipe.evaluate.metric", "preference_accuracy"],
    ),
    "base model that nobody makes": ({"base_model": MADE}, ["recipe.base_model.prepared", "recipe.prepare"]),
    "rows that nobody makes": (
        {"datasets.eval": MADE | {"kind": "eval"}},
        ["recipe.datasets.eval.prepared", "recipe.prepare"],
    ),
    "base model needed to make itself": (
        {"base_model": MADE, "prepare": {"maker": "x", "base_model": True}},
        ["recipe.prepare.base_model", "recipe.base_model"],
    ),
    "KL limit for DPO": (
        {"policy": DPO, "datasets.preference": PAIRS, "drift.kl_max": 2.0},
        ["drift.kl_max", "2.0", "recipe.policy.method", "dpo"],
    ),
    "KL limit at beta 0": (
        {"policy.args": {"beta": 0.0}, "drift.kl_max": 2.0},
        ["drift.kl_max", "2.0", "recipe.policy.args.beta", "0.0"],
    ),
    "KL limit at TRL's own beta, which is 0": ({"drift.kl_max": 2.0}, ["drift.kl_max", "recipe.policy.args.beta", "0.0"]),
    "better than an SFT that is not there": ({"gates.better_than": ["base", "sft"]}, ["gates.better_than", "recipe.sft"]),
}

FINE = {
    "SFT goes on in the policy": {"sft": SFT, "policy.lora": None, "datasets.sft": DEMOS, "gates.better_than": ["sft"]},
    "SFT on plain texts": {"sft": SFT, "policy.lora": None, "datasets.sft": TEXTS},
    "reward model that is read": {"reward_model": {}, "policy.reward_functions": LEARNED, "datasets.preference": PAIRS},
    "DPO on pairs": {"policy": DPO, "datasets.preference": PAIRS},
    "pairs held out": {"evaluate": {"metric": "preference_accuracy"}, "datasets.eval": PAIRS},
    "KL limit with beta": {"policy.args": {"beta": 0.04}, "drift.kl_max": 2.0},
    "everything made": {"prepare": {"maker": "x"}, "base_model": MADE, "datasets.eval": MADE | {"kind": "eval"}},
    "sampled from a base model that is there": {"prepare": {"maker": "x", "base_model": True}},
}


def changed(profile: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Set dotted paths; those outside `drift` and `gates` are below `recipe`."""
    for path, value in changes.items():
        *blocks, last = path.split(".") if path.startswith(("drift", "gates")) else ["recipe", *path.split(".")]
        inner = profile
        for block in blocks:
            inner = inner.setdefault(block, {})
        inner[last] = value
        if value is None:
            del inner[last]
    return profile


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradiction_is_refused_with_each_setting_named(name, smallest, write_profile):
    changes, named = CONTRADICTIONS[name]
    with pytest.raises(InvalidProfile) as refused:
        load(write_profile(changed(smallest, changes)))
    [sentence] = str(refused.value).splitlines()  # one contradiction, one sentence
    assert [setting for setting in named if setting not in sentence] == []


@pytest.mark.parametrize("name", FINE)
def test_neighbour_of_a_contradiction_that_is_none_loads(name, smallest, write_profile):
    load(write_profile(changed(smallest, FINE[name])))


def test_contradictions_are_refused_together(smallest, write_profile):
    changes = {"drift.kl_max": 2.0, "gates.better_than": ["sft"], "datasets.prompts": DEMOS}
    with pytest.raises(InvalidProfile) as refused:
        load(write_profile(changed(smallest, changes)))
    assert len(str(refused.value).splitlines()) == 3
