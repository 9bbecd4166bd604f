"""Push a released export to the Hugging Face hub: the very files that were tested, as one commit."""

import logging
import os
import re
from typing import Any

from prefect import task
from prefect.blocks.system import Secret
from prefect.cache_policies import NO_CACHE

from profiles.schema import HubRepository
from tasks import champion
from tasks.errors import ReleaseFailed
from tasks.monitoring import mlflow_runs, registry
from tasks.monitoring.registry import Version
from tasks.pipeline_run import PipelineRun, recorded

SECRET = "hf-token"
log = logging.getLogger("posttrain")


@task(task_run_name="push", cache_policy=NO_CACHE, persist_result=False)
def push_to_hub(run: PipelineRun, version: Version) -> str:
    """Return the hub's commit of this version, made if it is not there yet; the version's tags remember it.

    Raises ReleaseFailed if there is no token or the hub does not take the files. The release stands without it.
    """
    target = run.profile.release.push_to_hub
    with recorded(run, "push", version.fingerprint) as record, champion.exclusive(version.name):
        in_force = registry.at(version.name, registry.CHAMPION)
        if in_force is None or in_force.number != version.number:
            raise ReleaseFailed(
                f"{version} was not pushed: {in_force or 'nothing'} is the champion by now, and the hub must not have another."
            )
        commit = version.tags.get(f"hub.{target.repo}")
        if commit and commit == head(target.repo):
            record.status = "cached"
            return commit
        message = f"{version.name}, version {version.number} ({version.fingerprint})"
        commit = push(champion.export_of(version, run.store).path, target, message)
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
        refuse_other_visibility(hub, target)
        made = hub.upload_folder(repo_id=target.repo, folder_path=folder, commit_message=message, delete_patterns="*")
    except ReleaseFailed:
        raise
    except Exception as error:  # offline mode, DNS, TLS and refusals each have a class of their own, of three libraries
        why = f"{type(error).__name__}: {error}".replace(token, "…")
        raise ReleaseFailed(
            f"the export is released, but {target.repo} on the Hugging Face hub did not take it: {why}. Run it again when the "
            "hub answers and the token may write there: nothing else is done anew."
        ) from None
    return made.oid


def refuse_other_visibility(hub: Any, target: HubRepository) -> None:
    """Raise ReleaseFailed if a repository that was there already is not as private as asked: the hub changes nothing of it."""
    is_private = bool(hub.repo_info(target.repo).private)
    if is_private != target.private:
        there, asked = ("private", "public") if is_private else ("public", "private")
        raise ReleaseFailed(
            f"{target.repo} on the Hugging Face hub is {there}, and release.push_to_hub.private asks for a {asked} one: "
            "nothing was pushed. Change it on its settings page, or name another repository."
        )


def head(repository: str) -> str | None:
    """Return the newest commit of a repository on the hub, None if there is none."""
    from huggingface_hub import HfApi

    try:
        return HfApi(token=find_token()).repo_info(repository).sha
    except Exception:  # whatever stands in the way, the push that follows meets it and says so
        return None


def find_token() -> str:
    """Return HF_TOKEN, else the Prefect Secret block `hf-token`, without white space around it.

    Raises ReleaseFailed if there is neither, or if it cannot be a token: an HTTP library would repeat it in its error.
    """
    token = _given_token().strip()
    if not token or not re.fullmatch(r"[!-~]+", token):
        raise ReleaseFailed(
            "the token for the Hugging Face hub is empty, or has white space or other signs in it that no token has. Set "
            f"HF_TOKEN, or the Secret block {SECRET}, to the token alone."
        )
    return token


def _given_token() -> str:
    if token := os.environ.get("HF_TOKEN"):
        return token
    try:
        return Secret.load(SECRET).get()
    except ValueError:
        raise ReleaseFailed(
            "release.push_to_hub is set, but there is no token to push with: set HF_TOKEN, or save a Secret block named "
            f"{SECRET} on Prefect's Blocks page."
        ) from None
