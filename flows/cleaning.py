"""`posttrain gc`: frees what no release, no recent run and no living process needs, and says what that is before it does."""

import fcntl
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.lineage import lineage, roots
from tasks.environment import home
from tasks.monitoring import mlflow_runs, registry
from tasks.pipeline_run import CLOSED, PROCESS, WAITING, run_of, store
from tasks.remote_store import MANIFEST

LEFTOVER_SECONDS = 3600  # a staging folder, a checkpoint or a table of facts that is younger may be in use


@dataclass(frozen=True)
class Freed:
    """A folder or file that nothing needs, its size, and why."""

    path: Path
    size: int
    why: str


def unneeded(keep: int) -> list[Freed]:
    """Return what can be freed: artifacts and work folders of older runs, and what dead processes left behind.

    Kept are, with everything they are made of: each profile's champion, previous release and candidate, what its newest `keep`
    runs have, and what runs that have not ended have. A remote store is not touched.
    """
    needed = set(_needed(keep))
    found = [_freed(path.parent, "no release and no recent run has it") for path in _artifacts() if path.parent not in needed]
    found += [_freed(path, "a build left it half-written") for path in store().root.glob("[!.]*/.*") if _is_leftover(path)]
    found += [_freed(path, "no build goes on from it") for path in _checkpoints()]
    found += [_freed(path, "facts are counted again in a minute") for path in _old_facts(keep)]
    found += [_freed(path, "of an older run; its summary, report and log stay") for path in _work_folders(keep)]
    return found


def free(found: list[Freed]) -> None:
    """Remove them; an artifact's manifest goes first, so that what is cut short is no artifact any more."""
    for item in found:
        (item.path / MANIFEST).unlink(missing_ok=True) if item.path.is_dir() else None
        shutil.rmtree(item.path) if item.path.is_dir() else item.path.unlink(missing_ok=True)


def _artifacts() -> list[Path]:
    return sorted(store().root.glob(f"[!.]*/[!.]*/{MANIFEST}"))


def _needed(keep: int) -> Iterator[Path]:
    """Yield the folders of all that is kept."""
    tops = {store().place("export", version.fingerprint) for version in _releases()}
    for folder in _kept_runs(keep):
        tops |= {Path(record.artifact) for record in run_of(folder).records() if record.artifact}
    for top in tops:
        if (top / MANIFEST).is_file():
            yield top
            for node in roots(lineage(str(top))):
                if path := node.facts.get("path"):
                    yield Path(path)


def _releases() -> Iterator[registry.Version]:
    for model in mlflow_runs.client().search_registered_models():
        for alias in (registry.CHAMPION, registry.PREVIOUS, registry.CANDIDATE):
            if version := registry.at(model.name, alias):
                yield version


def _runs() -> dict[str, list[Path]]:
    """Return the folders of each profile's runs, the newest first."""
    found: dict[str, list[Path]] = {}
    for path in sorted(home().glob("[!.]*/*/profile.json"), reverse=True):
        found.setdefault(path.parts[-3], []).append(path.parent)
    return found


def _kept_runs(keep: int) -> list[Path]:
    return [
        folder
        for folders in _runs().values()
        for number, folder in enumerate(folders)
        if number < keep or not (folder / CLOSED).is_file() or (folder / WAITING).is_file()
    ]


def _is_leftover(path: Path) -> bool:
    return path.is_dir() and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS


def _checkpoints() -> Iterator[Path]:
    """Yield the checkpoints of builds that are done or that nobody has touched for a day, unless a job has them."""
    for folder in (home() / ".checkpoints").glob("*/*/"):
        is_done = (store().place(folder.parent.name, folder.name) / MANIFEST).is_file()
        is_old = time.time() - max((p.stat().st_mtime for p in folder.rglob("*")), default=folder.stat().st_mtime) > 86400
        if (is_done or is_old) and _is_free(folder.with_name(f"{folder.name}.lock")):
            yield folder


def _is_free(lock: Path) -> bool:
    if not lock.is_file():
        return True
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _old_facts(keep: int) -> list[Path]:
    """Return the tables of token facts that no recent run can have used."""
    starts = [(folder / PROCESS).stat().st_mtime for folder in _kept_runs(keep) if (folder / PROCESS).is_file()]
    limit = min([*starts, time.time() - LEFTOVER_SECONDS])
    return [path for path in (home() / ".token_facts").glob("*.parquet") if path.stat().st_mtime < limit]


def _work_folders(keep: int) -> Iterator[Path]:
    """Yield what older runs' jobs left beside their results: converted data, checkpoints and caches, not their logs."""
    kept = set(_kept_runs(keep))
    for folder in (folder for folders in _runs().values() for folder in folders if folder not in kept):
        yield from (path for name in ("cache", "checkpoints") for path in folder.glob(f"*/{name}") if path.is_dir())


def _freed(path: Path, why: str) -> Freed:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return Freed(path, sum(p.stat().st_size for p in files), why)
