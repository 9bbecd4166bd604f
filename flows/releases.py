"""`posttrain champion`, `promote` and `rollback`: what is released, and a person's hand in it."""

import json
from typing import Any

from tasks import champion, promote_model, served_model
from tasks.environment import home
from tasks.errors import ReleaseFailed
from tasks.monitoring import registry
from tasks.monitoring.registry import Version
from tasks.pipeline_run import PipelineRun, run_of, store


def find_run(what: str) -> PipelineRun:
    """Return the run of that id, or a profile's newest one that came to an export; raises ReleaseFailed if there is none.

    A run that its gate stopped has no export: the gate comes first.
    """
    folders = sorted(home().glob(f"*/{what}/profile.json")) or sorted((home() / what).glob("*/profile.json"), reverse=True)
    runs = (run_of(path.parent) for path in folders)
    found = next((run for run in runs if any(r.stage == "export" and r.artifact for r in run.records())), None)
    if found is None and folders:
        last = _summary(run_of(folders[0].parent))
        why = last.get("error") or last.get("status") or "it did not end"
        raise ReleaseFailed(
            f"run {folders[0].parent.name} did not come to an export, so there is nothing to release: "
            f"{str(why).splitlines()[0]} To release what a gate stops, change the gate: the run goes on from the store."
        )
    if found is None:
        raise ReleaseFailed(f"{home()} has no run {what!r}, and no run of a profile of that name.")
    return found


def promote(what: str, reason: str | None) -> Version:
    """Make a run's export the champion: one that passed everything, or with a `reason` whatever the gates said.

    Raises ReleaseFailed, and does not move `champion`, if the run was not accepted or its export is not whole in the store.
    """
    run = find_run(what)
    summary = _summary(run)
    if not reason and summary.get("exit_code") != 0:
        raise ReleaseFailed(
            f"run {run.run_id} was not accepted: {summary.get('error') or summary.get('status') or 'it did not end'}. "
            "To release it all the same, and say why: --force REASON"
        )
    policy, export = (promote_model.built(run, stage) for stage in (run.profile.recipe.policy.method, "export"))
    name = run.profile.name
    with champion.exclusive(name):
        tags = promote_model.tags_of(run, policy, export)
        version = registry.register(name, export, run.mlflow_run_id, tags)
        champion.promote(version, champion.chosen(run), reason)
    release = run.profile.release
    print(f"{version} is the champion", flush=True)
    back = f"; or go back: posttrain rollback {name} --reason WHY"
    served_model.assert_served(version, release.served_at, release.served_timeout_seconds, way_back=back)
    return version


def rollback(name: str, reason: str) -> tuple[Version, Version]:
    """Make the previous release the champion again, and return the new champion and the one taken back."""
    now, former = champion.rollback(name, store(), reason)
    print(f"{now} is the champion again; taken back: {former}", flush=True)
    for hub, commit in former.tags.items():
        if hub.startswith("hub."):
            print(f"{hub.removeprefix('hub.')} on the Hugging Face hub still has the one taken back ({commit})", flush=True)
    newest = former.tags if former.tags.get("served_at") else now.tags  # the server may have moved since the older one
    served_model.assert_served(now, newest.get("served_at"), float(newest.get("served_timeout_seconds", 0)))
    return now, former


def rows(name: str) -> list[dict[str, Any]]:
    """Return a row per alias: `{"alias", "version", "export", "run", "created", "path", "notes"}`; ReleaseFailed for none."""
    found = champion.aliases(name)
    if not found:
        raise ReleaseFailed(f"no release of {name} is in MLflow's registry here. A run that passes every gate makes one.")
    return [
        {
            "alias": alias,
            "version": version.number,
            "export": version.fingerprint,
            "run": version.tags["run_id"],
            "created": version.created,
            "path": version.tags["path"],
            "notes": [f"{key} {version.tags[key]}" for key in ("forced", "rolled_back") if version.tags.get(key)],
        }
        for alias, version in found.items()
    ]


def _summary(run: PipelineRun) -> dict[str, Any]:
    path = run.folder / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else {}
