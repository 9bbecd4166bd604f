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
WHOLE = {"sft": {"lora": {"modules_to_save": ["lm_head"]}}, "policy.lora": None, "datasets.sft": DEMOS}
LEARNED = [{"name": "exact_answer"}, {"name": "reward_model", "weight": 0.1}]
DPO = {"method": "dpo", "lora": {"r": 8}}
MADE = {"prepared": "made"}
NO_CANARIES = {"num_prompts": 0}
LEARNS = {"reward_model": {}, "policy.reward_functions": LEARNED, "datasets.preference": PAIRS}
JUDGED = {"reward_model": {}, "datasets.preference": PAIRS, "evaluate": {"win_rate": True}}
SAVED = {"learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 1}

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
    "win rate without a judge": ({"evaluate": {"win_rate": True}}, ["recipe.evaluate.win_rate", "recipe.reward_model"]),
    "margin in percent of a task's share": (
        {"evaluate": {"tasks": ["arc_easy"]}, "gates.not_worse": {"arc_easy/acc": 3}},
        ["gates.not_worse.arc_easy/acc", "any loss passes"],
    ),
    "floor in percent of a task's share": (
        {"evaluate": {"tasks": ["gsm8k"]}, "gates.floors": {"gsm8k/exact_match:strict-match": 30}},
        ["gates.floors.gsm8k/exact_match:strict-match", "share"],
    ),
    "reward model as scorer": ({"evaluate": {"scorer": "reward_model"}}, ["recipe.evaluate.scorer", "win_rate"]),
    "prompts rendered otherwise in training": (
        {"policy.args": {"chat_template_kwargs": {"enable_thinking": False}}},
        ["recipe.policy.args.chat_template_kwargs", "chat_template_path"],
    ),
    "answer longer than the model": (
        {"export": {"max_model_len": 64, "max_new_tokens": 64}},
        ["recipe.export.max_new_tokens", "max_model_len is 64"],
    ),
    "default answer longer than the model": (
        {"export": {"max_model_len": 64, "generation": {"max_new_tokens": 4096}}},
        ["recipe.export.generation.max_new_tokens is 4096", "max_model_len"],
    ),
    "sampling that greedy decoding ignores": (
        {"export": {"generation": {"top_p": 0.9}}},
        ["recipe.export.generation.top_p", "temperature is 0"],
    ),
    "metric of a gain that nobody asks for": (
        {"gates.better_than": [], "gates.metric": "accuracy"},
        ["gates.metric", "gates.better_than"],
    ),
    "level of a gain that nobody asks for": ({"gates.better_than": [], "gates.p_max": 0.01}, ["gates.p_max"]),
    "time for an answer that nobody gives": (
        {"gates.approval_timeout_seconds": 60},
        ["gates.approval_timeout_seconds", "gates.approval"],
    ),
    "only rewards of weight 0": (
        {"policy.reward_functions": [{"name": "exact_answer", "weight": 0}]},
        ["recipe.policy.reward_functions"],
    ),
    "whole modules in bfloat16, where small steps are lost": (
        {"policy.lora": {"modules_to_save": ["lm_head"]}, "base_model.dtype": "bfloat16"},
        ["recipe.policy.lora.modules_to_save", "recipe.base_model.dtype", "bfloat16", "float32"],
    ),
    "whole modules of a frozen reference sent to vLLM": (
        WHOLE | {"policy.args": {"beta": 0.04}},
        ["recipe.sft.lora.modules_to_save", "recipe.policy.rollouts", "'auto'", "beta", "transformers"],
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
    "KTO without labelled answers": (
        {"policy": {"method": "kto", "lora": {"r": 8}}},
        ["recipe.datasets.unpaired", "recipe.policy.method", "kto", "unpaired_preference"],
    ),
    "KTO of pairs": (
        {
            "policy": {"method": "kto", "lora": {"r": 8}},
            "datasets.unpaired": {"path": "pairs.jsonl", "kind": "preference"},
        },
        ["recipe.datasets.unpaired.kind", "'preference'", "unpaired_preference"],
    ),
    "KTO without canaries, whose kl alone is per token": (
        {
            "policy": {"method": "kto", "lora": {"r": 8}},
            "datasets.unpaired": {"path": "rows.jsonl", "kind": "unpaired_preference"},
            "drift.canaries": {"num_prompts": 0},
        },
        ["drift.canaries.num_prompts", "'kto'", "per token", "drift.signals.kl"],
    ),
    "RLOO at beta 0, without canaries": (
        {
            "policy": {
                "method": "rloo",
                "lora": {"r": 8},
                "reward_functions": [{"name": "exact_answer"}],
                "args": {"beta": 0.0},
            },
            "drift.canaries": {"num_prompts": 0},
        },
        ["drift.canaries.num_prompts", "'rloo'", "beta 0.0", "drift.signals.kl"],
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
    "corridor around what GRPO never logs": (
        {"drift.signals": {"rewrd": {"halt_min": 0.0}}},
        ["drift.signals", "'rewrd'", "recipe.policy.method", "grpo", "reward", "reward_std"],
    ),
    "corridor around what DPO never logs": (
        {"policy": DPO, "datasets.preference": PAIRS, "drift.signals": {"rewards/margin": {"halt_min": 0.0}}},
        ["drift.signals", "'rewards/margin'", "dpo", "rewards/margins"],
    ),
    "corridor around a GRPO reward for DPO": (
        {"policy": DPO, "datasets.preference": PAIRS, "drift.signals": {"rewards/exact_answer/mean": {"halt_min": 0.0}}},
        ["drift.signals", "'rewards/exact_answer/mean'", "dpo"],
    ),
    "corridor that was never there taken away": (
        {"drift.signals": {"entropi": None}},
        ["drift.signals", "'entropi'", "entropy"],
    ),
    "KL that nothing measures for DPO": (
        {"policy": DPO, "datasets.preference": PAIRS, "drift.canaries": NO_CANARIES},
        ["drift.canaries.num_prompts", "dpo", "drift.signals.kl"],
    ),
    "KL that nothing measures at beta 0": (
        {"policy.args": {"beta": 0.0}, "drift.canaries": NO_CANARIES},
        ["drift.canaries.num_prompts", "beta 0.0", "drift.signals.kl"],
    ),
    "KL that nothing measures at TRL's own beta, which is 0": (
        {"drift.canaries": NO_CANARIES},
        ["drift.canaries.num_prompts", "beta 0.0", "drift.signals.kl"],
    ),
    "reward hacking asked for without canaries": (
        {"policy.args": {"beta": 0.04}, "drift.canaries": NO_CANARIES, "drift.reward_hacking": {"halt_drop": 0.3}},
        ["drift.reward_hacking", "drift.canaries.num_prompts is 0"],
    ),
    "reward hacking asked for on pairs": (
        {"evaluate": {"metric": "preference_accuracy"}, "datasets.eval": PAIRS, "drift.reward_hacking": {"halt_drop": 0.3}},
        ["drift.reward_hacking", "recipe.evaluate.metric", "preference_accuracy"],
    ),
    "rollback without checkpoints": (
        {"policy.args": {"learning_rate": 1e-4}, "drift.on_halt": "rollback"},
        ["drift.on_halt", "rollback", "recipe.policy.args.save_strategy"],
    ),
    "retry without checkpoints": (
        {"policy.args": {"learning_rate": 1e-4, "save_strategy": "no"}, "drift.on_halt": "retry"},
        ["drift.on_halt", "retry", "recipe.policy.args.save_strategy"],
    ),
    "rollback with few checkpoints kept": (
        {"policy.args": SAVED | {"save_total_limit": 2}, "drift.on_halt": "rollback"},
        ["drift.on_halt", "rollback", "recipe.policy.args.save_total_limit is 2"],
    ),
    "retry that changes an argument that is absent": (
        {"policy.args": {"save_strategy": "steps"}, "drift.on_halt": "retry"},
        ["drift.retry.change.learning_rate", "recipe.policy.args.learning_rate", "None"],
    ),
    "retry that changes an argument that is 0": (
        {"policy.args": SAVED | {"beta": 0.0}, "drift.on_halt": "retry", "drift.retry": {"change": {"beta": 2.0}}},
        ["drift.retry.change.beta", "recipe.policy.args.beta", "0.0"],
    ),
    "retry that changes a truth value": (
        {"policy.args": SAVED | {"bf16": True}, "drift.on_halt": "retry", "drift.retry": {"change": {"bf16": 2.0}}},
        ["drift.retry.change.bf16", "recipe.policy.args.bf16", "True"],
    ),
    "retry that changes a text": (
        {
            "policy.args": SAVED | {"loss_type": "grpo"},
            "drift.on_halt": "retry",
            "drift.retry": {"change": {"loss_type": 2.0}},
        },
        ["drift.retry.change.loss_type", "recipe.policy.args.loss_type", "'grpo'"],
    ),
    "retry asked for where a halt stops": (
        {"policy.args": SAVED, "drift.retry": {"max_retries": 2}},
        ["drift.retry", "drift.on_halt", "stop"],
    ),
    "better than an SFT that is not there": ({"gates.better_than": ["base", "sft"]}, ["gates.better_than", "recipe.sft"]),
    "gain over nobody": ({"gates.better_than": [], "gates.gain_min": 0.02}, ["gates.gain_min is 0.02", "gates.better_than"]),
    "gate by a metric that is not measured": (
        {"gates.metric": "reward/near_answer", "evaluate": {"rewards": ["exact_answer"], "tasks": ["mmlu"]}},
        ["gates.metric", "'reward/near_answer'", "recipe.evaluate", "accuracy, reward/exact_answer, mmlu/…"],
    ),
    "floor under a task where there is none": ({"gates.floors": {"arc/acc": 0.3}}, ["gates.floors", "'arc/acc'"]),
    "floor under the other metric": ({"gates.floors": {"preference_accuracy": 0.3}}, ["gates.floors", "accuracy"]),
    "guard on a win rate that is not measured": (
        {"gates.not_worse": {"win_rate/champion": 0.05}},
        ["gates.not_worse", "'win_rate/champion'", "recipe.evaluate"],
    ),
    "gate by a length-controlled win rate": (
        JUDGED | {"gates.floors": {"win_rate_lc/base": 0.5}},
        ["gates.floors", "'win_rate_lc/base'", "'win_rate/base'"],
    ),
    "judged by the reward model that it was trained on": (
        LEARNS | {"evaluate": {"win_rate": True}, "gates.metric": "win_rate/champion"},
        ["gates.metric", "'win_rate/champion'", "recipe.policy.reward_functions"],
    ),
    "floor that no interval reaches": ({"gates.floors": {"accuracy": 1.0}}, ["gates.floors.accuracy is 1", "no interval"]),
    "floor that everyone reaches": ({"gates.floors": {"accuracy": 0.0}}, ["gates.floors.accuracy is 0", "every policy"]),
    "margin that everyone keeps": ({"gates.not_worse": {"accuracy": 1.0}}, ["gates.not_worse.accuracy is 1", "any loss"]),
    "gain that nobody makes": ({"gates.gain_min": 1.0}, ["gates.gain_min is 1", "accuracy", "no policy passes"]),
    "gain that no win rate makes": (
        JUDGED | {"gates.gain_min": 0.5, "gates.metric": "win_rate/champion"},
        ["gates.gain_min is 0.5", "win_rate/champion", "no policy passes"],
    ),
    "better than one model by the win rate over another": (
        JUDGED | {"gates.metric": "win_rate/base"},
        ["gates.metric is 'win_rate/base'", "gates.better_than is [champion]", "[base]"],
    ),
    "not worse than the champion by the win rate over the base": (
        JUDGED | {"gates.not_worse": {"win_rate/base": 0.05}},
        ["gates.not_worse", "'win_rate/base'", "gates.floors.win_rate/base"],
    ),
}

FINE = {
    "gate by each kind of metric that is measured": JUDGED
    | {
        "evaluate": {"rewards": ["near_answer"], "tasks": ["mmlu"], "win_rate": True},
        "gates.floors": {"accuracy": 0.5, "reward/near_answer": -1.0, "mmlu_anatomy/acc": 0.3, "win_rate/base": 0.5},
        "gates.not_worse": {"mmlu_virology/acc": 0.05, "reward/near_answer": 2.0, "win_rate/champion": 0.05},
    },
    "better than a champion by the win rate over it": JUDGED | {"gates.metric": "win_rate/champion"},
    "win rate by a reward model of weight 0": JUDGED
    | {
        "gates.floors": {"win_rate/base": 0.5},
        "policy.reward_functions": [{"name": "exact_answer"}, {"name": "reward_model", "weight": 0}],
    },
    "gate that asks nothing": {"gates.better_than": []},
    "SFT goes on in the policy": {"sft": SFT, "policy.lora": None, "datasets.sft": DEMOS, "gates.better_than": ["sft"]},
    "whole modules without a reference": WHOLE | {"policy.args": {"beta": 0.0}, "drift.signals": {"kl": None}},
    "whole modules without vLLM": WHOLE | {"policy.args": {"beta": 0.04}, "policy.rollouts": "transformers"},
    "whole modules of a fresh policy": {"policy.lora": {"modules_to_save": ["lm_head"]}, "policy.args": {"beta": 0.04}},
    "SFT on plain texts": {"sft": SFT, "policy.lora": None, "datasets.sft": TEXTS},
    "reward model that is read": {"reward_model": {}, "policy.reward_functions": LEARNED, "datasets.preference": PAIRS},
    "reward model that only judges": {
        "policy": DPO,
        "datasets.preference": PAIRS,
        "reward_model": {},
        "evaluate": {"win_rate": True},
    },
    "DPO on pairs": {"policy": DPO, "datasets.preference": PAIRS},
    "pairs held out": {"evaluate": {"metric": "preference_accuracy"}, "datasets.eval": PAIRS},
    "KL limit with beta": {"policy.args": {"beta": 0.04}, "drift.signals": {"kl": {"halt_max": 3.0}}},
    # the canaries measure it
    "KL limit at TRL's own beta, which is 0": {"drift.signals": {"kl": {"halt_max": 3.0}}},
    "KL limit for DPO": {"policy": DPO, "datasets.preference": PAIRS, "drift.signals": {"kl": {"halt_max": 3.0}}},
    "no canaries but a trainer that logs KL": {"policy.args": {"beta": 0.04}, "drift.canaries": NO_CANARIES},
    "no canaries and no corridor around KL": {"drift.signals": {"kl": None}, "drift.canaries": NO_CANARIES},
    "corridor around a reward of GRPO": {"drift.signals": {"rewards/exact_answer/mean": {"halt_min": 0.0}}},
    "corridor around a margin of DPO": {
        "policy": DPO,
        "datasets.preference": PAIRS,
        "drift.signals": {"rewards/margins": {"warn_min": 0.0}},
    },
    "reward hacking asked for with canaries": {"drift.reward_hacking": {"halt_drop": 0.3}},
    "reward hacking by default on pairs": {"evaluate": {"metric": "preference_accuracy"}, "datasets.eval": PAIRS},
    "reward hacking switched off without canaries": {
        "policy.args": {"beta": 0.04},
        "drift": {"canaries": NO_CANARIES, "reward_hacking": None},
    },
    "rollback to checkpoints": {"policy.args": SAVED, "drift.on_halt": "rollback"},
    "rollback without anything that a retry could change": {
        "policy.args": {"save_strategy": "steps"},
        "drift.on_halt": "rollback",
    },
    "retry that changes numbers": {
        "policy.args": SAVED | {"max_grad_norm": 1},
        "drift.on_halt": "retry",
        "drift.retry": {"change": {"learning_rate": 0.5, "max_grad_norm": 0.5}},
    },
    "few checkpoints kept where a halt stops": {"policy.args": SAVED | {"save_total_limit": 2}},
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
    changes = {"drift.canaries": NO_CANARIES, "gates.better_than": ["sft"], "datasets.prompts": DEMOS}
    with pytest.raises(InvalidProfile) as refused:
        load(write_profile(changed(smallest, changes)))
    assert len(str(refused.value).splitlines()) == 3
