"""Push a released export to the Hugging Face hub: the very files that were tested, as one commit."""

import logging
import os

from prefect import task
from prefect.blocks.system import Secret
from prefect.cache_policies import NO_CACHE

from profiles.schema import HubRepository
from tasks.errors import ReleaseFailed
from tasks.monitoring import mlflow_runs, registry
from tasks.monitoring.registry import Version
from tasks.pipeline_run import PipelineRun, recorded
from tasks.promote_model import built

SECRET = "hf-token"
log = logging.getLogger("posttrain")


@task(task_run_name="push", tags=["stage:push"], cache_policy=NO_CACHE, persist_result=False)
def push_to_hub(run: PipelineRun, version: Version) -> str:
    """Return the hub's commit of this version, made if it is not there yet; the version's tags remember it.

    Raises ReleaseFailed if there is no token or the hub does not take the files. The release stands without it.
    """
    target = run.profile.release.push_to_hub
    with recorded(run, "push", version.fingerprint) as record:
        if commit := version.tags.get(f"hub.{target.repo}"):
            record.status = "cached"
            return commit
        commit = push(built(run, "export").path, target, f"{version.name}, version {version.number} ({version.fingerprint})")
        registry.tag(version, {f"hub.{target.repo}": commit})
        mlflow_runs.set_tags(run.mlflow_run_id, {"hub": f"{target.repo}@{commit}"})
        record.notes = [f"{target.repo} on the hub is at {commit}"]
        log.info("push: %s", record.notes[0])
    return commit


def push(folder: str, target: HubRepository, message: str) -> str:
    """Return the commit that a folder's files became; the token is in no message, log or artifact."""
    from huggingface_hub import HfApi

    token = find_token()
    try:
        hub = HfApi(token=token)
        hub.create_repo(target.repo, private=target.private, exist_ok=True)
        made = hub.upload_folder(repo_id=target.repo, folder_path=folder, commit_message=message, delete_patterns="*")
    except Exception as error:  # offline mode, DNS, TLS and refusals each have a class of their own, of three libraries
        why = f"{type(error).__name__}: {error}".replace(token, "…")
        raise ReleaseFailed(
            f"the export is released, but {target.repo} on the Hugging Face hub did not take it: {why}. Run it again when the "
            "hub answers and the token may write there: nothing else is done anew."
        ) from None
    return made.oid


def find_token() -> str:
    """Return HF_TOKEN, else the Prefect Secret block `hf-token`; raises ReleaseFailed if there is neither."""
    if token := os.environ.get("HF_TOKEN"):
        return token
    try:
        return Secret.load(SECRET).get()
    except ValueError:
        raise ReleaseFailed(
            "release.push_to_hub is set, but there is no token to push with: set HF_TOKEN, or save a Secret block named "
            f"{SECRET} on Prefect's Blocks page."
        ) from None
