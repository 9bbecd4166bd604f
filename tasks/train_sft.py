"""Fine-tune a LoRA adapter on demonstrations: the start of the policy, and its frozen reference."""

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from profiles.schema import Profile
from tasks.artifacts import Artifact
from tasks.build import Stage, build
from tasks.pipeline_run import PipelineRun
from tasks.stage_config import with_model


@task(task_run_name="sft", cache_policy=NO_CACHE, persist_result=False)
def train_sft(run: PipelineRun, base: Artifact, data: Artifact) -> Artifact | State:
    """Return the SFT adapter. Raises JobFailed with the root cause and the log's path."""
    return build(run, sft_stage(run.profile, base, data), run.profile.placement.of("sft"))


def sft_stage(profile: Profile, base: Artifact, data: Artifact) -> Stage:
    recipe = profile.recipe
    config = with_model(recipe, base, args=recipe.sft.args, lora=recipe.sft.lora.model_dump())
    return Stage("sft", "tasks.jobs.sft", config, {"base_model": base, "rows": data}, recipe.seed)
