"""Train the reward model on preference pairs."""

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from profiles.schema import Profile
from tasks.artifacts import Artifact
from tasks.build import Stage, build
from tasks.pipeline_run import PipelineRun
from tasks.stage_config import with_model


@task(task_run_name="reward_model", cache_policy=NO_CACHE, persist_result=False)
def train_reward_model(run: PipelineRun, base: Artifact, pairs: Artifact) -> Artifact | State:
    """Return the reward model, a stand-alone checkpoint with one logit. Raises JobFailed with the root cause."""
    return build(run, reward_model_stage(run.profile, base, pairs), run.profile.placement.of("reward_model"))


def reward_model_stage(profile: Profile, base: Artifact, pairs: Artifact) -> Stage:
    recipe = profile.recipe
    own = recipe.reward_model
    lora = own.lora.model_dump() if own.lora else None
    config = with_model(recipe, base, args=own.args, lora=lora, eval_ratio=own.eval_ratio)
    return Stage("reward_model", "tasks.jobs.reward_model", config, {"base_model": base, "rows": pairs}, recipe.seed)
