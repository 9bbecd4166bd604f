"""`--set key.path=value`: only settings that exist, with YAML's values."""

import pytest

from profiles.load import InvalidProfile, load
from profiles.schema import Dpo, Grpo

CLIPPED = "completions/clipped_ratio"
TO_DPO = ["recipe.policy.method=dpo", "recipe.reward_model=null"]


def refusal(*overrides: str) -> str:
    with pytest.raises(InvalidProfile) as refused:
        load("quickstart", list(overrides))
    return str(refused.value)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("recipe.seed=7", lambda p: p.recipe.seed == 7),
        ("recipe.sft.lora.lora_dropout=0.1", lambda p: p.recipe.sft.lora.lora_dropout == 0.1),
        ("drift.signals.kl.halt_max=9e-1", lambda p: p.drift.signals["kl"].halt_max == 0.9),
        ("drift.signals.entropy.halt_ratio_min=null", lambda p: p.drift.signals["entropy"].halt_ratio_min is None),
        ("drift.signals.entropy.halt_ratio_min=", lambda p: p.drift.signals["entropy"].halt_ratio_min is None),
        ("drift.signals.completions/clipped_ratio.patience=7", lambda p: p.drift.signals[CLIPPED].patience == 7),
        ("drift.signals.completions/clipped_ratio=null", lambda p: p.drift.signals[CLIPPED] is None),
        ("drift.signals={reward: {halt_min: 0.1}}", lambda p: p.drift.signals["reward"].halt_min == 0.1),
        ("drift.reward_hacking=null", lambda p: p.drift.reward_hacking is None),
        ("gates.better_than=[base]", lambda p: p.gates.better_than == ["base"]),
        ("gates.better_than=[]", lambda p: p.gates.better_than == []),
        ("placement.policy.tags=[gpu, h200]", lambda p: p.placement.of("policy").tags == ["gpu", "h200"]),
        ("placement.default.env={A: b=c}", lambda p: p.placement.of("sft").env["A"] == "b=c"),
        ("recipe.base_model.licence=a=b", lambda p: p.recipe.base_model.licence == "a=b"),
        ("description=[unclosed", lambda p: p.description == "[unclosed"),
    ],
)
def test_override_of_a_setting_that_exists_is_read_as_yaml(override, read):
    assert read(load("quickstart", [override]))


def test_override_leaves_every_other_setting_as_it_was():
    before, after = load("quickstart").model_dump(), load("quickstart", ["recipe.sft.args.num_train_epochs=9"]).model_dump()
    assert after["recipe"]["sft"]["args"].pop("num_train_epochs") == 9
    assert before["recipe"]["sft"]["args"].pop("num_train_epochs") != 9
    assert before == after


@pytest.mark.parametrize("spelling", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_override_in_scientific_spelling_is_a_float(spelling):
    value = load("quickstart", [f"recipe.policy.args.learning_rate={spelling}"]).recipe.policy.args["learning_rate"]
    assert isinstance(value, float) and value == 1e-4


def test_override_given_twice_takes_the_last():
    assert load("quickstart", ["recipe.seed=7", "recipe.seed=8"]).recipe.seed == 8


def test_override_may_add_an_argument_that_the_profile_does_not_have():
    assert load("quickstart", ["recipe.policy.args.top_p=0.9"]).recipe.policy.args["top_p"] == 0.9


@pytest.mark.parametrize(
    ("key", "neighbour"),
    [
        ("recipe.polcy.method", "policy"),
        ("recipe.sft.lora.aplha", "lora_alpha"),
        ("drift.kl_cusm", "kl_cusum"),
        ("drift.canaries.num_prompt", "num_prompts"),
        ("drift.signals.kl.halt_mx", "halt_max"),
        ("placement.polcy.tags", "policy"),
        ("placement.default.tag", "tags"),
        ("recipes.seed", "recipe"),
        ("recipe.policy.arg.beta", "args"),
    ],
)
def test_override_of_a_misspelt_key_is_refused_with_its_neighbour(key, neighbour):
    text = refusal(f"{key}=1")
    assert key in text
    assert neighbour in text.replace(key, "")


@pytest.mark.parametrize("key", ["recipe.seed.x", "description.x", "", ".", "recipe.", "recipe..seed", "extends"])
def test_override_of_a_path_that_no_profile_has_is_refused(key):
    assert key in refusal(f"{key}=1")


def test_override_without_an_equals_sign_is_refused_by_its_text():
    text = refusal("recipe.seed")
    assert "'recipe.seed'" in text and "=" in text


def test_override_of_a_wrong_type_is_refused_by_its_setting():
    text = refusal("recipe.seed=many")
    assert "recipe.seed" in text and "many" in text


def test_override_of_the_method_chooses_dpo():
    assert isinstance(load("quickstart").recipe.policy, Grpo)
    policy = load("quickstart", TO_DPO).recipe.policy
    assert isinstance(policy, Dpo)
    assert policy.args == {}  # GRPO's arguments are none of DPO's


def test_override_of_the_method_keeps_the_arguments_given_after_it():
    assert load("quickstart", [*TO_DPO, "recipe.policy.args.beta=0.1"]).recipe.policy.args == {"beta": 0.1}


def test_override_of_the_method_keeps_the_arguments_given_before_it():
    assert load("quickstart", ["recipe.policy.args.beta=0.1", *TO_DPO]).recipe.policy.args == {"beta": 0.1}


def test_override_of_the_method_with_the_one_it_has_changes_nothing():
    assert load("quickstart", ["recipe.policy.method=grpo"]) == load("quickstart")


def test_override_of_the_method_alone_is_refused_with_what_else_must_change():
    assert "recipe.reward_model=null" in refusal("recipe.policy.method=dpo")


@pytest.mark.parametrize("value", ["true", "yes", "'7'"])
def test_override_of_a_number_with_a_truth_value_or_text_is_refused(value):
    assert "recipe.seed" in refusal(f"recipe.seed={value}")
