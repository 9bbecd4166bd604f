"""What can change a stage's result is in its identity, and nothing else is."""

from dataclasses import replace

import pytest

from profiles.load import load
from profiles.schema import Profile, StagePlacement
from tasks.artifacts import Artifact
from tasks.build import Stage
from tasks.evaluate_policy import evaluate_stage
from tasks.export_vllm import export_stage
from tasks.fingerprints import fingerprint
from tasks.merge_lora import merge_stage
from tasks.train_policy import policy_stage
from tasks.train_reward_model import reward_model_stage
from tasks.train_sft import sft_stage


def artifact(stage: str, digest: str = "") -> Artifact:
    return Artifact(stage, f"/store/{stage}", stage, digest or f"bytes of {stage}")


BASE, SFT, REWARD, POLICY, ROWS, MERGED = (
    artifact(n) for n in ("base_model", "sft", "reward_model", "grpo", "dataset", "merge")
)
EVALUATION = artifact("evaluate")
HELD_OUT = artifact("dataset", "bytes of the held-out rows")
STAGES = {
    "sft": lambda p, base=BASE: sft_stage(p, base, ROWS),
    "reward_model": lambda p, base=BASE: reward_model_stage(p, base, ROWS),
    "policy": lambda p, base=BASE: policy_stage(p, base, SFT, ROWS, REWARD, HELD_OUT),
    "evaluate": lambda p, base=BASE: evaluate_stage(p, base, SFT, POLICY, MERGED, ROWS, None),
    "merge": lambda p, base=BASE: merge_stage(p, base, POLICY),
    "export": lambda p, base=BASE: export_stage(p, base, POLICY, MERGED, ROWS, EVALUATION),
}
JUDGED_OTHERWISE = [
    "drift.signals.kl.halt_max=9.0",
    "drift.signals.kl.patience=9",
    "drift.signals.entropy.halt_ratio_min=null",
    "drift.reward_hacking=null",
    "drift.canaries.num_prompts=5",
]
CHECKPOINTS = ["recipe.policy.args.save_strategy=steps", "recipe.policy.args.save_steps=1"]


@pytest.fixture
def key(job_environment_with):
    """Fingerprint a stage of the quickstart with overrides, where its own placement puts it."""
    python = job_environment_with(torch="2.0", trl="1.0")

    def of(stage: str, *overrides: str, base: Artifact = BASE, python: str = python) -> str:
        profile: Profile = load("quickstart", list(overrides))
        placement = profile.placement.of(stage).model_copy(update={"python": python})
        return fingerprint(STAGES[stage](profile, base).identity(placement))

    return of


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "overrides",
    [
        [
            "placement.default.tags=[gpu, h200]",
            "placement.default.accelerate=single_gpu",
            "placement.default.timeout_seconds=1",
        ],
        ["placement.default.env={OMP_NUM_THREADS: '2'}"],
        JUDGED_OTHERWISE,
        ["gates.floors={accuracy: 0.9}", "gates.better_than=[base]", "gates.p_max=0.01"],
    ],
    ids=["placement", "environment", "drift", "gates"],
)
def test_identity_does_not_hold_where_a_stage_runs_or_how_it_is_judged(stage, overrides, key):
    assert key(stage, *overrides) == key(stage)


def test_dtype_of_the_release_is_the_merges_and_the_exports_alone(key):
    asked = "recipe.export.dtype=bfloat16"
    assert load("quickstart").recipe.base_model.dtype == "float32"
    assert {stage for stage in STAGES if key(stage, asked) != key(stage)} == {"merge", "export"}
    assert key("merge", "recipe.export.dtype=float32") == key("merge")


def with_other_canaries(*overrides: str) -> tuple[Stage, Stage]:
    """The policy's stage, judged on some held-out rows and on others."""
    profile = load("quickstart", [*CHECKPOINTS, *overrides])
    others = (HELD_OUT, replace(HELD_OUT, digest="other held-out rows"))
    return tuple(policy_stage(profile, BASE, SFT, ROWS, REWARD, held_out) for held_out in others)


def test_identity_where_a_halt_leaves_no_result_holds_neither_the_drift_block_nor_the_canaries(key, job_environment_with):
    assert key("policy", *CHECKPOINTS, *JUDGED_OTHERWISE) == key("policy", *CHECKPOINTS)
    placement = StagePlacement(python=job_environment_with("own"))
    one, other = (stage.identity(placement) for stage in with_other_canaries())
    assert one == other
    assert "drift" not in one["recipe"] and HELD_OUT.digest not in one["inputs"].values()


@pytest.mark.parametrize("on_halt", ["rollback", "retry"])
def test_identity_where_a_halt_leaves_another_policy_holds_the_drift_block_and_the_canaries(on_halt, key, job_environment_with):
    goes_on = [*CHECKPOINTS, f"drift.on_halt={on_halt}"]
    assert key("policy", *goes_on) != key("policy", *CHECKPOINTS)
    for judged_otherwise in JUDGED_OTHERWISE:
        assert key("policy", *goes_on, judged_otherwise) != key("policy", *goes_on), judged_otherwise
    placement = StagePlacement(python=job_environment_with("own"))
    one, other = (stage.identity(placement) for stage in with_other_canaries(f"drift.on_halt={on_halt}"))
    assert {name for name in one if one[name] != other[name]} == {
        "inputs",
        "recipe",
    }  # the canaries themselves, and their key in the drift block
    assert HELD_OUT.digest in one["inputs"].values()
    assert one["recipe"]["drift"]["on_halt"] == on_halt


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "policy"])
def test_identity_of_a_stage_that_nothing_judges_holds_no_drift_block_whatever_a_halt_does(stage, key):
    assert key(stage, *CHECKPOINTS, "drift.on_halt=rollback", *JUDGED_OTHERWISE) == key(stage)


def test_identity_without_canaries_holds_no_held_out_rows(job_environment_with):
    placement = StagePlacement(python=job_environment_with("own"))
    without = with_other_canaries("drift.on_halt=rollback", "drift.canaries.num_prompts=0")
    one, other = (stage.identity(placement) for stage in without)
    assert one == other


@pytest.mark.parametrize("on_halt", ["stop", "rollback"])
def test_stage_is_judged_by_the_drift_block_on_the_canaries_whatever_a_halt_does(on_halt):
    """With the scorer and the length of the evaluation, unless the canaries have a length of their own."""
    given = [f"drift.on_halt={on_halt}", "recipe.evaluate.max_new_tokens=99"]
    stage, _ = with_other_canaries(*given)
    assert stage.judged_on == {"canaries": HELD_OUT}
    assert stage.judged_by["signals"]["kl"] == load("quickstart").drift.signals["kl"].model_dump()
    canaries = stage.judged_by["canaries"]
    assert (canaries["scorer"], canaries["max_new_tokens"]) == ("exact_answer", 99)
    own, _ = with_other_canaries(*given, "drift.canaries.max_new_tokens=7")
    assert own.judged_by["canaries"]["max_new_tokens"] == 7


@pytest.mark.parametrize("stage", STAGES)
def test_identity_of_more_processes_is_another_where_each_multiplies_the_batch(stage, key):
    eight = key(stage, "placement.default.accelerate=ddp_8")
    assert (eight != key(stage)) == (stage in ("sft", "reward_model", "policy"))


@pytest.mark.parametrize("stage", STAGES)
def test_identity_of_another_seed_is_another(stage, key):
    assert key(stage, "recipe.seed=99") != key(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_identity_of_a_base_model_with_other_bytes_is_another(stage, key):
    assert key(stage, base=replace(BASE, digest="other bytes")) != key(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_identity_of_a_base_model_elsewhere_is_the_same(stage, key):
    assert key(stage, base=replace(BASE, path="/elsewhere")) == key(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_identity_with_another_library_version_is_another(stage, key, job_environment_with):
    assert key(stage, python=job_environment_with("newer", torch="2.1", trl="1.0")) != key(stage)
    assert key(stage, python=job_environment_with("same", torch="2.0", trl="1.0")) == key(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_identity_in_another_dtype_is_another(stage, key):
    assert key(stage, "recipe.base_model.dtype=bfloat16") != key(stage)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("recipe.sft.args.learning_rate=1e-6", {"sft"}),
        ("recipe.sft.lora.r=4", {"sft"}),
        ("recipe.reward_model.eval_ratio=0.3", {"reward_model"}),
        ("recipe.reward_model.args.learning_rate=1e-6", {"reward_model"}),
        ("recipe.policy.args.beta=0.3", {"policy"}),
        ("recipe.policy.rollouts=transformers", {"policy"}),
        ("recipe.policy.reward_functions=[{name: exact_answer}, {name: reward_model}]", {"policy"}),
        ("recipe.evaluate.max_new_tokens=99", {"evaluate"}),
        ("recipe.evaluate.scorer=near_answer", {"evaluate"}),
        ("recipe.export.num_probes=3", {"export"}),
        ("recipe.base_model.licence=mit", {"export"}),
    ],
)
def test_setting_of_one_stage_changes_the_identity_of_that_stage_only(override, changed, key):
    """What follows is rebuilt through its inputs' digests, and only if the bytes did change."""
    assert {stage for stage in STAGES if key(stage, override) != key(stage)} == changed
