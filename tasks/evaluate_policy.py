"""Ask base, SFT and policy the same held-out questions."""

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from profiles.schema import Profile
from tasks.artifacts import Artifact
from tasks.build import Stage, build
from tasks.pipeline_run import PipelineRun
from tasks.stage_config import with_model


@task(task_run_name="evaluate", tags=["stage:evaluate"], cache_policy=NO_CACHE, persist_result=False)
def evaluate_policy(
    run: PipelineRun, base: Artifact, sft: Artifact | None, policy: Artifact, rows: Artifact
) -> Artifact | State:
    """Return every model's answer to every row (samples.jsonl); metrics are shares in [0, 1]."""
    return build(run, evaluate_stage(run.profile, base, sft, policy, rows), run.profile.placement.of("evaluate"))


def evaluate_stage(profile: Profile, base: Artifact, sft: Artifact | None, policy: Artifact, rows: Artifact) -> Stage:
    recipe = profile.recipe
    given = {"base_model": base, "sft": sft, "policy": policy, "rows": rows}
    inputs = {name: artifact for name, artifact in given.items() if artifact is not None}
    config = with_model(recipe, base, **recipe.evaluate.model_dump())
    return Stage("evaluate", "tasks.jobs.evaluate", config, inputs, recipe.seed)
