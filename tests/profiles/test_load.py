"""A profile file is read whole or refused with each wrong setting named."""

from pathlib import Path

import pytest

from profiles.load import InvalidProfile, load
from profiles.schema import OWNED_ARGS, Placement, StagePlacement


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(InvalidProfile) as refused:
        load(name, list(overrides))
    return str(refused.value)


def test_smallest_profile_loads_with_defaults(smallest, write_profile):
    profile = load(write_profile(smallest))
    assert profile.name == "own"
    assert profile.placement.of("policy") == StagePlacement()


@pytest.mark.parametrize(("asked", "neighbour"), [("quikstart", "quickstart"), ("quickstart-dop", "quickstart-dpo")])
def test_profile_name_misspelt_is_refused_with_its_neighbour(asked, neighbour):
    text = refusal(asked)
    assert repr(asked) in text
    assert f"Did you mean {neighbour}" in text


def test_profile_path_that_is_missing_is_refused_by_its_name(tmp_path):
    path = str(tmp_path / "gone.yaml")
    assert path in refusal(path)


@pytest.mark.parametrize(
    ("block", "typo", "neighbour"),
    [
        ((), "recipes", "recipe"),
        (("recipe",), "polcy", "policy"),
        (("recipe", "base_model"), "dtpye", "dtype"),
        (("recipe", "policy"), "rollout", "rollouts"),
        (("recipe", "policy", "lora"), "lora_alhpa", "lora_alpha"),
        (("recipe", "datasets"), "prompt", "prompts"),
        (("recipe", "datasets", "eval"), "knd", "kind"),
        (("drift",), "on_hlat", "on_halt"),
        (("drift", "signals", "kl"), "halt_maximum", "halt_max"),
        (("drift", "signals", "reward"), "patence", "patience"),
        (("drift", "canaries"), "num_prompt", "num_prompts"),
        (("drift", "reward_hacking"), "halt_drp", "halt_drop"),
        (("drift", "retry"), "max_retrys", "max_retries"),
        (("drift", "between_runs"), "entropy_min", "entropy_ratio_min"),
        (("gates",), "better_then", "better_than"),
        (("placement", "policy"), "tag", "tags"),
    ],
)
def test_key_misspelt_is_refused_with_its_neighbour(block, typo, neighbour, smallest, write_profile):
    inner = smallest
    for part in block:
        inner = inner.setdefault(part, {})
    inner[typo] = 1
    text = refusal(write_profile(smallest))
    assert ".".join([*block, typo]) in text
    assert neighbour in text.split(typo, 1)[1]


def test_key_misspelt_in_a_list_is_refused_with_its_neighbour(smallest, write_profile):
    smallest["recipe"]["policy"]["reward_functions"] = [{"name": "exact_answer", "wieght": 2}]
    assert "weight" in refusal(write_profile(smallest)).split("wieght", 1)[1]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("recipe.seed", "many"),
        ("recipe.policy.lora.r", 0),
        ("recipe.policy.lora.lora_dropout", 1.0),
        ("recipe.policy.lora.rank_pattern.q_proj", 0),
        ("recipe.policy.lora.modules_to_save", []),
        ("recipe.base_model.dtype", "float16"),
        ("recipe.policy.method", "ppo"),
        ("recipe.datasets.eval.kind", "evals"),
        ("recipe.datasets.eval.stop", 0),
        ("recipe.policy.reward_functions", []),
        ("drift.on_halt", "abort"),
        ("drift.signals.kl.halt_max", "two"),
        ("drift.signals.kl.patience", 0),
        ("drift.signals.kl.smoothing", 0.0),
        ("drift.signals.kl.smoothing", 1.5),
        ("drift.signals.kl.window", 2),
        ("drift.signals.entropy.halt_ratio_min", 0.0),
        ("drift.canaries.num_prompts", -1),
        ("drift.kl_cusum.target", 0.0),
        ("drift.reward_hacking.warn_drop", -0.1),
        ("drift.retry.max_retries", 0),
        ("drift.between_runs.entropy_ratio_min", 1.0),
        ("gates.better_than", ["reward_model"]),
        ("gates.p_max", 0.5),
        ("gates.gain_min", -0.01),
        ("gates.not_worse.accuracy", 0),
        ("placement.default.tags", []),
        ("placement.policy.timeout_seconds", 0),
    ],
)
def test_value_of_a_wrong_type_or_range_is_refused_by_its_setting(path, value, smallest, write_profile):
    *blocks, last = path.split(".")
    inner = smallest
    for part in blocks:
        inner = inner.setdefault(part, {})
    inner[last] = value
    text = refusal(write_profile(smallest))
    assert last in text
    assert str(value).strip("[]'") in text


def test_pattern_that_is_no_regular_expression_is_refused(smallest, write_profile):
    smallest["recipe"]["policy"]["lora"] = {"alpha_pattern": {"(q_proj": 4}}
    text = refusal(write_profile(smallest))
    assert "alpha_pattern" in text and "'(q_proj'" in text


def test_two_wrong_settings_are_refused_together(smallest, write_profile):
    smallest["recipe"]["seed"], smallest["drift"] = "many", {"kl_maxx": 1}
    text = refusal(write_profile(smallest))
    assert "recipe.seed" in text and "drift.kl_maxx" in text


def test_setting_that_is_missing_is_refused_by_its_name(smallest, write_profile):
    del smallest["recipe"]["base_model"]
    assert "recipe.base_model" in refusal(write_profile(smallest))


@pytest.mark.parametrize("text", ["", "- a list", "just words", "a: [", "\x07: \x00", "a: b: c"])
def test_file_that_is_no_mapping_is_refused_by_its_path(text, write_profile):
    path = write_profile(text)
    assert path in refusal(path)


def test_file_that_is_not_utf8_is_refused_by_its_path(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("description: für\n".encode("latin-1"))
    assert str(path) in refusal(str(path))


@pytest.mark.parametrize("name", OWNED_ARGS)
def test_argument_that_the_pipeline_owns_is_refused_by_its_name(name, smallest, write_profile):
    smallest["recipe"]["policy"]["args"] = {name: "x", "beta": 0.1}
    assert f"args.{name}" in refusal(write_profile(smallest))


@pytest.mark.parametrize(
    ("origin", "named"),
    [
        ({"hub": "org/model"}, "revision"),
        ({"path": "here", "revision": "main"}, "hub"),
        ({"path": "here", "hub": "org/model", "revision": "main"}, "path, hub"),
        ({}, "path, hub, prepared"),
    ],
)
def test_origin_that_is_not_exactly_one_pinned_place_is_refused(origin, named, smallest, write_profile):
    smallest["recipe"]["base_model"] = origin
    text = refusal(write_profile(smallest))
    assert "recipe.base_model" in text and named in text


@pytest.fixture
def read_argument(smallest, write_profile):
    """Return what a value spelled so in an `args` block is read as."""

    def read(spelling: str):
        smallest["recipe"]["policy"]["args"] = {"beta": "SPELLING"}
        path = write_profile(smallest)
        Path(path).write_text(Path(path).read_text().replace("SPELLING", spelling))
        return load(path).recipe.policy.args["beta"]

    return read


@pytest.mark.parametrize("spelling", ["1e-4", "1E-4", "1.0e-4", ".1e-3", "+1e-4", "0.0001"])
def test_number_in_scientific_spelling_is_a_float(spelling, read_argument):
    """YAML 1.1, which PyYAML implements, wants a dot and a sign and reads 1e-4 as text."""
    value = read_argument(spelling)
    assert isinstance(value, float) and value == 1e-4


@pytest.mark.parametrize("spelling", ["e4", "1e", "1e-4x", "v1e4", '"1e-4"'])
def test_text_that_looks_like_a_number_stays_text(spelling, read_argument):
    assert read_argument(spelling) == spelling.strip('"')


def test_child_that_takes_a_dataset_from_elsewhere_drops_its_parents_origin(write_profile):
    """As README's example does: a block that names another of path, hub and prepared replaces the old origin."""
    own = {"recipe": {"datasets": {"eval": {"path": "eval.jsonl", "kind": "eval"}}}}
    assert load(write_profile({"extends": "quickstart"} | own)).recipe.datasets.eval.path == "eval.jsonl"


def test_child_takes_from_its_parent_what_it_does_not_say(smallest, write_profile):
    write_profile(smallest, "parent")
    child = load(write_profile({"extends": "parent", "description": "child", "recipe": {"seed": 7}}, "child"))
    parent = load(write_profile(smallest, "parent"))
    assert (child.name, child.description, child.recipe.seed) == ("child", "child", 7)
    assert child.recipe.policy == parent.recipe.policy


def test_child_of_another_method_takes_none_of_its_parents_policy(smallest, write_profile):
    smallest["recipe"]["policy"]["args"] = {"num_generations": 8}
    smallest["recipe"]["datasets"]["preference"] = {"path": "pairs.jsonl", "kind": "preference"}
    write_profile(smallest, "parent")
    policy = {"method": "dpo", "lora": {"r": 4}, "args": {"beta": 0.1}}
    child = load(write_profile({"extends": "parent", "recipe": {"policy": policy}}, "child"))
    assert child.recipe.policy.args == {"beta": 0.1}


def test_child_of_a_child_inherits_through_both(smallest, write_profile):
    write_profile(smallest, "a")
    write_profile({"extends": "a", "recipe": {"seed": 7}}, "b")
    third = load(write_profile({"extends": "b", "drift": {"signals": {"kl": {"patience": 9}}}}, "c"))
    assert (third.name, third.recipe.seed, third.drift.signals["kl"].patience) == ("c", 7, 9)


def test_parent_that_is_missing_is_refused_by_its_name(write_profile):
    assert "nobody" in refusal(write_profile({"extends": "nobody"}))


def test_parents_in_a_circle_are_refused(write_profile):
    write_profile({"extends": "b"}, "a")
    assert "extends" in refusal(write_profile({"extends": "a"}, "b"))


@pytest.mark.parametrize("parent", [3, ["quickstart"], {"name": "quickstart"}])
def test_parent_that_is_no_text_is_refused(parent, write_profile):
    assert "extends" in refusal(write_profile({"extends": parent}))


def test_placement_of_a_stage_lays_its_own_settings_over_the_default():
    placement = Placement.model_validate(
        {
            "default": {"tags": ["gpu"], "accelerate": "single_gpu", "timeout_seconds": 60},
            "policy": {"tags": ["gpu", "h200"]},
            "export": {"timeout_seconds": 6 * 3600},
        }
    )
    policy = placement.of("policy")
    assert (policy.tags, policy.accelerate, policy.timeout_seconds) == (["gpu", "h200"], "single_gpu", 60)
    assert placement.of("sft") == placement.default
    # a value that happens to be the schema's default still counts, because it was said
    assert placement.of("export").timeout_seconds == 6 * 3600
