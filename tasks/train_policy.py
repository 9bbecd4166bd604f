"""Train the policy from the SFT adapter with the profile's method (GRPO, RLOO, DPO, KTO)."""

from typing import Any

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from profiles.schema import Profile
from tasks.artifacts import Artifact
from tasks.build import Stage, build
from tasks.fingerprints import fingerprint
from tasks.pipeline_run import PipelineRun
from tasks.stage_config import with_model


@task(task_run_name="{run.profile.recipe.policy.method}", cache_policy=NO_CACHE, persist_result=False)
def train_policy(
    run: PipelineRun,
    base: Artifact,
    sft: Artifact | None,
    rows: Artifact,
    reward_model: Artifact | None,
    held_out: Artifact,
) -> Artifact | State:
    """Return the adapter that the method leaves, with `sft` as its start and its frozen reference.

    Raises JobFailed with the log's path, or DriftHalted if a corridor of `profile.drift` was left.
    """
    stage = policy_stage(run.profile, base, sft, rows, reward_model, held_out)
    return build(run, stage, run.profile.placement.of("policy"))


def policy_stage(
    profile: Profile,
    base: Artifact,
    sft: Artifact | None,
    rows: Artifact,
    reward_model: Artifact | None,
    held_out: Artifact,
) -> Stage:
    """Return the stage; `held_out` are the canaries that judge it while it trains and that it never trains on."""
    recipe = profile.recipe
    policy = recipe.policy
    given = {"base_model": base, "sft": sft, "rows": rows, "reward_model": reward_model}
    inputs = {name: artifact for name, artifact in given.items() if artifact is not None}
    config = with_model(recipe, base, **policy.model_dump(exclude={"method"}))
    return Stage(
        policy.method, f"tasks.jobs.{policy.method}", config, inputs, recipe.seed, judged_by=judge(profile, held_out),
        judged_on={"canaries": held_out} if profile.drift.canaries.num_prompts else {},
        judge_changes=profile.drift.on_halt != "stop",
    )  # fmt: skip


def judge(profile: Profile, held_out: Artifact) -> dict[str, Any]:
    """Return the drift block as a job reads it: with the canaries' scorer and length from the evaluation, if not their own."""
    evaluate, drift = profile.recipe.evaluate, profile.drift.model_dump(exclude={"between_runs"})
    if profile.recipe.policy.method == "kto":  # its own `kl` is nats per answer, of answers to other prompts
        drift["signals"]["canary/kl"] = drift["signals"].pop("kl")
    canaries = drift["canaries"]
    canaries["max_new_tokens"] = canaries["max_new_tokens"] or evaluate.max_new_tokens
    canaries["scorer"] = evaluate.scorer if evaluate.metric == "accuracy" else None
    what = {name: canaries[name] for name in ("num_prompts", "max_new_tokens", "scorer")}
    # canaries of one key can be compared
    canaries["key"] = fingerprint(what | {"rows": held_out.digest}) if canaries["num_prompts"] else ""
    return drift
