"""`posttrain why`: what differs between two runs' builds of a stage, in what they were made from and what came of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.plan import difference, named
from tasks.environment import home
from tasks.errors import ProfileError
from tasks.pipeline_run import StageRecord, run_of, store


@dataclass(frozen=True)
class Comparison:
    """Two runs of a stage: the fields of identity that differ, and by metric the two values where both have one."""

    earlier: tuple[str, StageRecord]
    later: tuple[str, StageRecord]
    fields: list[str]
    metrics: dict[str, tuple[float, float]]


def why(stage: str, profile: str, earlier: str | None, later: str | None) -> Comparison:
    """Compare a stage's builds in two runs of a profile, by default its newest two; ProfileError if there are none."""
    found = [(folder.name, record) for folder in runs(profile) if (record := record_of(folder, stage))]
    if later is not None:
        found = found[_place(found, later, stage, profile) :]
    if earlier is not None:
        found = [found[0], found[_place(found, earlier, stage, profile)]] if found else found
    if len(found) < 2:
        raise ProfileError(
            f"{home() / profile} has {len(found)} run{'s' * (len(found) != 1)} that came to {stage}: two are compared. Stages "
            f"are named as in the summary: {', '.join(stages_of(profile)) or 'no run is there'}."
        )
    (new_id, new), (old_id, old) = found[:2]
    before, after = (identity_of(profile, run_id, record) for run_id, record in ((old_id, old), (new_id, new)))
    both = {name: (old.metrics[name], new.metrics[name]) for name in old.metrics if name in new.metrics}
    return Comparison((old_id, old), (new_id, new), [named(line, stage) for line in difference(before, after)], both)


def runs(profile: str) -> list[Path]:
    """Return the folders of a profile's runs, the newest first."""
    return [path.parent for path in sorted((home() / profile).glob("*/profile.json"), reverse=True)]


def stages_of(profile: str) -> list[str]:
    return list(dict.fromkeys(record.stage for folder in runs(profile)[:5] for record in run_of(folder).records()))


def record_of(folder: Path, stage: str) -> StageRecord | None:
    """Return the run's last record of a stage, if it came to it."""
    return next((record for record in reversed(run_of(folder).records()) if record.stage == stage and record.fingerprint), None)


def identity_of(profile: str, run_id: str, record: StageRecord) -> dict[str, Any]:
    """Return what a build was fingerprinted from: as the store has it, or, where it failed, as its run kept it."""
    kept = home() / profile / run_id / record.stage / "identity.json"
    folder = "dataset" if record.stage.startswith("validate-") else record.stage
    identity = store().identity(folder, str(record.fingerprint))
    if identity is None and kept.is_file():
        identity = json.loads(kept.read_text())
    if identity is None:
        raise ProfileError(
            f"{record.stage}/{record.fingerprint} of run {run_id} is neither in the store nor in the run's folder."
        )
    return identity


def _place(found: list[tuple[str, StageRecord]], run_id: str, stage: str, profile: str) -> int:
    ids = [name for name, _ in found]
    if run_id not in ids:
        raise ProfileError(
            f"run {run_id} of {profile} did not come to {stage}. Those that did: {', '.join(ids[:10]) or 'none'}."
        )
    return ids.index(run_id)
