"""Ask base, SFT and policy the same held-out questions."""

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from profiles.schema import Profile
from tasks.artifacts import Artifact
from tasks.build import Stage, build
from tasks.champion import choose_opponent
from tasks.pipeline_run import PipelineRun
from tasks.stage_config import with_model
from tasks.train_policy import judge


@task(task_run_name="evaluate", tags=["stage:evaluate"], cache_policy=NO_CACHE, persist_result=False)
def evaluate_policy(
    run: PipelineRun, base: Artifact, sft: Artifact | None, policy: Artifact, rows: Artifact
) -> Artifact | State:
    """Return every model's answer to every row (samples.jsonl); metrics are shares in [0, 1].

    `canary/kl_to_champion` is the policy's KL to the profile's champion, if there is one. Raises ReleaseFailed if the store
    has lost the champion's export.
    """
    champion = choose_opponent(run, policy).export
    stage = evaluate_stage(run.profile, base, sft, policy, rows, champion)
    return build(run, stage, run.profile.placement.of("evaluate"))


def evaluate_stage(
    profile: Profile,
    base: Artifact,
    sft: Artifact | None,
    policy: Artifact,
    rows: Artifact,
    champion: Artifact | None,
) -> Stage:
    recipe = profile.recipe
    given = {"base_model": base, "sft": sft, "policy": policy, "rows": rows, "champion": champion}
    inputs = {name: artifact for name, artifact in given.items() if artifact is not None}
    asked = judge(profile, rows)["canaries"]
    canaries = {"canaries": {name: asked[name] for name in ("num_prompts", "max_new_tokens", "batch_size")}} if champion else {}
    config = with_model(recipe, base, **recipe.evaluate.model_dump(), **canaries)
    return Stage("evaluate", "tasks.jobs.evaluate", config, inputs, recipe.seed)
