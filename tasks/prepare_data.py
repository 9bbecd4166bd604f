"""Make the data (and a base model) that the profile makes from code, and find what it takes from elsewhere."""

from pathlib import Path

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from profiles.schema import Origin, Profile
from tasks import hub
from tasks.artifacts import Artifact, hub_model, local_model
from tasks.build import Stage, build
from tasks.errors import ProfileError
from tasks.pipeline_run import PipelineRun


@task(task_run_name="prepare", cache_policy=NO_CACHE, persist_result=False)
def prepare_data(run: PipelineRun, base: Artifact | None) -> Artifact | State:
    """Return what `tasks.jobs.make_<maker>` makes; `base` is the model it samples from, if it does.

    Raises ProfileError if there is no such maker, JobFailed with the log's path if it fails.
    """
    return build(run, prepare_stage(run.profile, base), run.profile.placement.of("prepare"))


def prepare_stage(profile: Profile, base: Artifact | None) -> Stage:
    recipe = profile.recipe
    inputs = {"base_model": base} if base is not None else {}
    return Stage("prepare", f"tasks.jobs.make_{recipe.prepare.maker}", recipe.prepare.config, inputs, recipe.seed)


def find_base_model(profile: Profile, made: Artifact | None) -> Artifact:
    """Return the recipe's base model as an input of the stages; raises ProfileError naming what is wrong with it."""
    origin = profile.recipe.base_model
    if origin.hub:
        commit = hub.commit_of("recipe.base_model", origin.hub, origin.revision, "model")
        return hub_model(origin.hub, commit, hub.fetch_model("recipe.base_model", origin.hub, commit))
    return local_model("recipe.base_model", locate("recipe.base_model", origin, made))


def locate(setting: str, origin: Origin, made: Artifact | None) -> Path:
    """Return the local path of a `path` or `prepared` origin."""
    if origin.path:
        return Path(origin.path)
    path = made / origin.prepared
    if not path.exists():
        names = sorted(p.name for p in Path(made.path).iterdir() if p.name != "manifest.json")
        raise ProfileError(f"{setting}.prepared is {origin.prepared!r}; the prepare stage made: {', '.join(names)}.")
    return path
