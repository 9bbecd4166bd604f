"""Which release of a profile is in force: asked once per run, and moved by one process at a time."""

import fcntl
import getpass
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL

from tasks.artifacts import Artifact, Store
from tasks.environment import home
from tasks.errors import ReleaseFailed
from tasks.monitoring import registry
from tasks.monitoring.registry import CANDIDATE, CHAMPION, PREVIOUS, Version
from tasks.pipeline_run import PipelineRun, write_json

LOCK_SECONDS = 600
CHOSEN = "champion.json"
log = logging.getLogger("posttrain")


@dataclass(frozen=True)
class Opponent:
    """What a policy is compared with: `version` is the champion when it was looked up, `export` what is loaded.

    The champion's own policy, made again, is compared with what it was compared with when it was promoted: nothing has
    changed, so nothing is evaluated anew.
    """

    version: int | None
    export: Artifact | None


def find_opponent(name: str, store: Store, policy: Artifact) -> Opponent:
    """Return the profile's champion, as the policy's opponent; raises ReleaseFailed if the store has lost its export."""
    champion = registry.at(name, CHAMPION)
    if champion is None:
        return Opponent(None, None)
    key = champion.fingerprint
    if champion.tags["policy.fingerprint"] == policy.fingerprint:
        key = champion.tags.get("compared_with", "")
    if not key:
        return Opponent(champion.number, None)
    export = store.find("export", key)
    if export is None and key == champion.fingerprint:
        raise ReleaseFailed(
            f"{champion} is the champion, but its export is not in the store any more, or damaged: nothing can be compared "
            f"with it. Bring {champion.tags['path']} back, or take the champion back: posttrain rollback {name}."
        )
    return Opponent(champion.number, export)


def choose_opponent(run: PipelineRun, policy: Artifact) -> Opponent:
    """Return `find_opponent`'s answer and keep it in the run's folder: the promotion counts only against that very champion."""
    found = find_opponent(run.profile.name, run.store, policy)
    key = found.export.fingerprint if found.export else None
    write_json(run.folder / CHOSEN, {"version": found.version, "compared_with": key})
    return found


def promote(version: Version, chosen: dict[str, Any], forced: str | None = None) -> bool:
    """Make a version the champion, and tell whether it was another one before; `exclusive` must be held.

    `previous` is written first: whenever the process dies, `champion` is the old release or the new one, whole. Raises
    ReleaseFailed if the champion is another one than the version was compared with (`chosen`), or if this one was rolled
    back; `forced`, a reason, overrules both.
    """
    champion = registry.at(version.name, CHAMPION)
    if champion and champion.number == version.number:
        return False
    if forced:
        registry.tag(version, {"forced": f"by {user()}: {forced}"})
    elif reason := version.tags.get("rolled_back"):
        raise ReleaseFailed(
            f"{version} was rolled back ({reason}), and is not promoted again by itself. If it should be: "
            f"posttrain promote {version.tags['run_id']} --force REASON"
        )
    elif (champion.number if champion else None) != chosen["version"]:
        was = f"version {chosen['version']}" if chosen["version"] else "no champion"
        raise ReleaseFailed(
            f"{champion or 'no version'} is the champion now, but {version} was compared with {was}: someone promoted or "
            "rolled back meanwhile. Run it again: only the comparison is made anew."
        )
    registry.tag(version, {"compared_with": chosen["compared_with"] or ""})
    move(version, champion)
    return True


def move(version: Version, former: Version | None) -> None:
    """Let `champion` point to the version, after `previous` points to the former one."""
    if former:
        registry.point(former, PREVIOUS)
    registry.point(version, CHAMPION)


def rollback(name: str, store: Store, reason: str) -> tuple[Version, Version]:
    """Make `previous` the champion again; return the new champion and the one that was rolled back.

    Raises ReleaseFailed, and moves nothing, if there is no other previous release or its export is not whole in the store.
    """
    with exclusive(name):
        champion, previous = registry.at(name, CHAMPION), registry.at(name, PREVIOUS)
        if champion is None or previous is None or champion.number == previous.number or "rolled_back" in previous.tags:
            raise ReleaseFailed(
                f"{name} has no previous release to go back to: the champion is {champion or 'none'}, and before it "
                f"{f'there was {previous}, which was taken back itself' if previous else 'there was none'}."
            )
        if store.find("export", previous.fingerprint) is None:
            raise ReleaseFailed(f"{previous} cannot serve: its export is not in the store, or damaged. Nothing was moved.")
        registry.tag(champion, {"rolled_back": f"by {user()}: {reason}"})
        move(previous, champion)
    return previous, champion


def aliases(name: str) -> dict[str, Version]:
    """Return the versions that champion, previous and candidate point to."""
    found = {alias: registry.at(name, alias) for alias in (CHAMPION, PREVIOUS, CANDIDATE)}
    return {alias: version for alias, version in found.items() if version}


@contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Hold the one right to register and move a profile's releases, on this machine and on all that share its server.

    On one machine it is a file lock, which the kernel frees with its holder. Machines have no file in common but the Prefect
    server: its concurrency limit is a lease, which expires with its holder. Raises ReleaseFailed if others hold it too long.
    """
    folder = home() / ".releases"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not PREFECT_API_URL.value():
            yield
            return
        limit = f"posttrain-release-{name}"
        with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):  # another machine was first
            client.upsert_global_concurrency_limit_by_name(limit, 1)
        try:
            with concurrency(limit, timeout_seconds=LOCK_SECONDS, lease_duration=60, strict=True):
                yield
        except TimeoutError as error:
            raise ReleaseFailed(f"another run has held Prefect's limit {limit} for {LOCK_SECONDS} s: is it stuck?") from error


def chosen(run: PipelineRun) -> dict[str, Any]:
    """Return what `choose_opponent` kept for this run."""
    return json.loads((run.folder / CHOSEN).read_text())


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
