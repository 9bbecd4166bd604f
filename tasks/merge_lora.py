"""Merge the policy's adapter into the base, with a certificate that the merge is exact."""

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from profiles.schema import Profile
from tasks.artifacts import Artifact
from tasks.build import Stage, build
from tasks.pipeline_run import PipelineRun
from tasks.stage_config import with_release


@task(task_run_name="merge", cache_policy=NO_CACHE, persist_result=False)
def merge_lora(run: PipelineRun, base: Artifact, policy: Artifact) -> Artifact | State:
    """Return the merged checkpoint. Raises JobFailed if the certificate does not hold."""
    return build(run, merge_stage(run.profile, base, policy), run.profile.placement.of("merge"))


def merge_stage(profile: Profile, base: Artifact, policy: Artifact) -> Stage:
    inputs = {"base_model": base, "policy": policy}
    return Stage("merge", "tasks.jobs.merge", with_release(profile.recipe, base), inputs, profile.recipe.seed)
