"""Which release of a profile is in force: asked once per run, and moved by one process at a time."""

import fcntl
import getpass
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO
from urllib.parse import urlsplit

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL

from tasks.artifacts import Artifact, Store
from tasks.environment import home
from tasks.errors import ReleaseFailed
from tasks.monitoring import mlflow_runs, registry
from tasks.monitoring.registry import CANDIDATE, CHAMPION, PREVIOUS, Version
from tasks.pipeline_run import PipelineRun, write_json

LOCK_SECONDS = 600
CHOSEN = "champion.json"
ROLLED_BACK, REPLACES = "rolled_back", "replaces"
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
    if key != champion.fingerprint:
        return Opponent(champion.number, store.find("export", key))
    try:
        return Opponent(champion.number, export_of(champion, store))
    except ReleaseFailed as error:
        raise ReleaseFailed(
            f"{error} It is the champion, so nothing can be compared. Bring {champion.tags['path']} back, or take the champion "
            f"back: posttrain rollback {name} --reason WHY. If it was the first release, remove the alias `champion` on "
            f"{registry.page(champion)}: the next run is then compared with the base."
        ) from None


def export_of(version: Version, store: Store) -> Artifact:
    """Return a version's export with its files here, verified, and the very one that was registered; else raises ReleaseFailed.

    Another build of the same recipe has the same fingerprint; the digest tells them apart.
    """
    found = store.find("export", version.fingerprint)
    if found is None:
        raise ReleaseFailed(f"the export of {version} is not in the store any more, or damaged.")
    found = store.fetch(found)
    if found.digest != version.tags["digest"]:
        raise ReleaseFailed(
            f"{found.path} is another build than the export of {version}: its digest is {found.digest}, "
            f"{version.tags['digest']} was released."
        )
    return found


def choose_opponent(run: PipelineRun, policy: Artifact) -> Opponent:
    """Return `find_opponent`'s answer and keep it in the run's folder: the promotion counts only against that very champion."""
    found = find_opponent(run.profile.name, run.store, policy)
    key = found.export.fingerprint if found.export else None
    write_json(run.folder / CHOSEN, {"version": found.version, "compared_with": key})
    return found


def promote(version: Version, chosen: dict[str, Any], forced: str | None = None) -> bool:
    """Make a version the champion, and tell whether it was another one before; `exclusive` must be held.

    `previous` is written first: whenever the process dies, `champion` is the old release or the new one, whole, and the tag
    `replaces` still knows what the old one had replaced. The same export built again takes the champion's place, and `previous`
    stays. Raises
    ReleaseFailed if the champion is another one than the version was compared with (`chosen`), or if this one was rolled
    back; `forced`, a reason, overrules both.
    """
    champion = registry.at(version.name, CHAMPION)
    if champion and champion.fingerprint == version.fingerprint:
        if champion.number != version.number:
            registry.tag(version, {name: champion.tags.get(name, "") for name in ("compared_with", REPLACES)})
            registry.point(version, CHAMPION)
        return False
    if forced:
        registry.tag(version, {"forced": f"by {user()}: {forced}"})
        registry.untag(version, ROLLED_BACK)
    elif reason := version.tags.get(ROLLED_BACK):
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
    replaces = champion.number if champion else ""
    registry.tag(version, {"compared_with": chosen["compared_with"] or "", REPLACES: replaces})
    if champion:
        registry.point(champion, PREVIOUS)
    registry.point(version, CHAMPION)
    return True


def before(champion: Version) -> Version | None:
    """Return the release that a champion replaced: `previous`, or, where a promotion died halfway, what the tag remembers."""
    previous = registry.at(champion.name, PREVIOUS)
    if previous is None or previous.fingerprint != champion.fingerprint:
        return previous
    return registry.version(champion.name, champion.tags.get(REPLACES, ""))


def rollback(name: str, store: Store, reason: str) -> tuple[Version, Version]:
    """Make `previous` the champion again; return the new champion and the one that was rolled back.

    Raises ReleaseFailed, and moves nothing, if there is no other previous release or its export is not whole in the store.
    """
    with exclusive(name):
        champion = registry.at(name, CHAMPION)
        previous = before(champion) if champion else None
        if champion is None or previous is None or ROLLED_BACK in previous.tags:
            raise ReleaseFailed(
                f"{name} has no previous release to go back to: the champion is {champion or 'none'}, and before it "
                f"{f'there was {previous}, which was taken back itself' if previous else 'there was none'}."
            )
        try:
            export_of(previous, store)
        except ReleaseFailed as error:
            raise ReleaseFailed(f"{error} It cannot serve, and nothing was moved.") from None
        registry.tag(champion, {ROLLED_BACK: f"by {user()}: {reason}"})
        registry.point(previous, CHAMPION)  # first: whatever dies after this, the bad release is not in force
        registry.point(champion, PREVIOUS)
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
    registry.refuse_name(name)
    folder = home() / ".releases"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("a+") as file:
        _wait_for(file, name)
        if not PREFECT_API_URL.value():
            refuse_unlocked_registry()
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


def _wait_for(file: TextIO, name: str) -> None:
    """Take the file lock; says who has it, and raises ReleaseFailed if that one holds it too long."""
    end, said = time.monotonic() + LOCK_SECONDS, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = f"process {file.read().strip() or '?'} on this machine"
            if time.monotonic() > end:
                raise ReleaseFailed(f"{holder} has held the releases of {name} for {LOCK_SECONDS} s: is it stuck?") from None
            if not said:
                log.warning("the releases of %s are held by %s: waiting", name, holder)
            said = True
            time.sleep(0.2)
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()


def refuse_unlocked_registry() -> None:
    """Raise ReleaseFailed where other machines may move the same aliases, and no Prefect server keeps them apart."""
    address = urlsplit(mlflow_runs.tracking_uri())
    if address.scheme in ("http", "https") and address.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ReleaseFailed(
            f"the releases are in the registry at {address.hostname}, which other machines reach too, and PREFECT_API_URL is "
            "not set: nothing keeps two of them from promoting over each other. Set it to the server that they share, or "
            "release.promote: false."
        )


def chosen(run: PipelineRun) -> dict[str, Any]:
    """Return what `choose_opponent` kept for this run."""
    return json.loads((run.folder / CHOSEN).read_text())


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
