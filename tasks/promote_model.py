"""Register the export as a version of the profile's model, and make it the champion."""

import logging
from dataclasses import asdict

from prefect import State, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from profiles.schema import Profile
from tasks import champion, served_model
from tasks.artifacts import Artifact
from tasks.errors import ReleaseFailed
from tasks.monitoring import mlflow_runs, registry
from tasks.monitoring.registry import Version
from tasks.pipeline_run import PipelineRun, recorded, write_json

log = logging.getLogger("posttrain")


@task(task_run_name="promote", cache_policy=NO_CACHE, persist_result=False)
def promote_model(run: PipelineRun) -> Version | State:
    """Return the version of the run's export, the champion from now on; as a Prefect state named Cached if it was that before.

    Where `release.promote` is false, or the gate did not ask for a gain over the champion, it stays a candidate. Raises
    ReleaseFailed if the champion is not the one any more that the policy was compared with, if this export was rolled back
    before, or if the server at `release.served_at` does not come to serve it.
    """
    name, release = run.profile.name, run.profile.release
    policy, export = built(run, run.profile.recipe.policy.method), built(run, "export")
    with recorded(run, "promote", export.fingerprint) as record:
        with champion.exclusive(name):
            version = registry.register(name, export, run.mlflow_run_id, tags_of(run, policy, export))
            registry.tag(version, release.model_dump(include={"served_at", "served_timeout_seconds"}, exclude_none=True))
            held = why_not(run.profile)
            moved = not held and champion.promote(version, champion.chosen(run))
        is_new = version.tags["run_id"] == run.run_id
        record.status = "ran" if moved or is_new else "cached"
        record.notes = [told(run, version, moved, held)]
        if not held:
            back = f"; or go back: posttrain rollback {name} --reason WHY"
            served_model.assert_served(version, release.served_at, release.served_timeout_seconds, run.stop, back)
    if record.status == "ran":
        return version
    return Completed(name="Cached", message=record.notes[0], data=version)


def why_not(profile: Profile) -> str:
    """Return why a candidate that passed its gate does not become the champion by itself; nothing if it does.

    A gate that does not ask for a gain over the champion passes a tie, and a loss too; run after run these would add up.
    """
    if not profile.release.promote:
        return "release.promote is false"
    return "" if "champion" in profile.gates.better_than else "gates.better_than does not name the champion"


def built(run: PipelineRun, stage: str) -> Artifact:
    """Return what the run built, or found, for a stage, with its files on this machine and verified once more."""
    key = next(record for record in run.records() if record.stage == stage).fingerprint
    found = run.store.find(stage, key)
    if found is None:
        raise ReleaseFailed(f"{stage}/{key} of run {run.run_id} is not in the store any more, or damaged. Run it again.")
    return run.store.fetch(found)


def tags_of(run: PipelineRun, policy: Artifact, export: Artifact) -> dict[str, str]:
    """Return what a version says of itself beside its export: policy, run, and the flags it is served with."""
    own = {"policy.stage": policy.stage, "policy.fingerprint": policy.fingerprint}
    return own | {"run_id": run.run_id, "serve": export.details["serve"]}


def told(run: PipelineRun, version: Version, moved: bool, held: str) -> str:
    """Say where the release went: in the log, on the run's page in Prefect, in MLflow's tags and in the run's folder."""
    found = champion.aliases(run.profile.name)
    what = "is the champion already"
    if moved:
        what = f"is the champion; before: {found.get(registry.PREVIOUS) or 'none'}"
    elif held:
        what = f"is a candidate ({held}): posttrain promote {run.run_id}"
    text = f"{version} {what}"
    log.info("promote: %s", text)
    create_markdown_artifact(key="release", markdown=f"{text}\n\n[in MLflow's registry]({registry.page(version)})")
    mlflow_runs.set_tags(run.mlflow_run_id, {"release": text})
    write_json(run.folder / "release.json", {alias: asdict(version) for alias, version in found.items()})
    return text
