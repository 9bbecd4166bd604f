"""Make the folder that vLLM serves, serve it, and hold its answers against the trained policy's."""

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from profiles.schema import Profile
from tasks.artifacts import Artifact
from tasks.build import Stage, build
from tasks.pipeline_run import PipelineRun
from tasks.stage_config import with_release


@task(task_run_name="export", cache_policy=NO_CACHE, persist_result=False)
def export_vllm(
    run: PipelineRun, base: Artifact, policy: Artifact, merged: Artifact, rows: Artifact, evaluation: Artifact
) -> Artifact | State:
    """Return the export. Raises JobFailed if the served model does not write what the trained one writes."""
    stage = export_stage(run.profile, base, policy, merged, rows, evaluation)
    return build(run, stage, run.profile.placement.of("export"))


def export_stage(
    profile: Profile, base: Artifact, policy: Artifact, merged: Artifact, rows: Artifact, evaluation: Artifact
) -> Stage:
    origin = profile.recipe.base_model
    card = {
        "profile": profile.name,
        "description": profile.description,
        "base_model": origin.hub or base.digest[:12],
        "licence": origin.licence,
        # the champion's would make the same policy another export whenever the champion changes
        "metrics": {n: v for n, v in evaluation.metrics.items() if n.endswith(("/base", "/sft", "/policy"))},
        "lineage": {
            "base model": base.digest,
            "policy": policy.digest,
            "merged checkpoint": merged.digest,
            "held-out rows": rows.digest,
        },
    }
    config = with_release(profile.recipe, base, **profile.recipe.export.model_dump(exclude={"dtype"}), card=card)
    inputs = {"base_model": base, "policy": policy, "merge": merged, "rows": rows}
    return Stage("export", "tasks.jobs.export", config, inputs, profile.recipe.seed)
