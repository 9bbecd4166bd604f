"""`posttrain validate`: the contracts of a profile's datasets, or of one file, judged without a run."""

import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from profiles.schema import Dataset, Profile
from tasks.artifacts import Artifact, disk_errors
from tasks.check_profile import load_profile
from tasks.environment import home
from tasks.errors import ContractBroken, ProfileError
from tasks.fingerprints import fingerprint, tree_digest
from tasks.pipeline_run import store
from tasks.prepare_data import find_base_model, prepare_stage
from tasks.validate_data import hold_to_contract, locate_dataset, refusal

Verdicts = list[tuple[str, Path, Any]]  # what was judged, where its report is, the verdict


def of_file(data: Path, kind: str, layout: str, overrides: list[str] | None) -> Verdicts:
    """Judge one file, with `contract.NAME=NUMBER` over its contract's limits; raises ContractBroken if it violates it."""
    from data_contracts.kinds import KINDS
    from data_contracts.layouts import LAYOUTS

    if kind not in KINDS:
        raise ProfileError(f"--kind is {kind!r}; there is: {', '.join(KINDS)}.")
    if layout not in LAYOUTS:
        raise ProfileError(f"--layout is {layout!r}; there is: {', '.join(LAYOUTS)}.")
    if not data.exists():
        raise ProfileError(f"--data is {str(data)!r}: there is no such file.")
    dataset = Dataset(path=str(data), kind=kind, layout=layout, contract=_limits(overrides or []))
    folder = _findings()
    return _passed([(str(data), folder, _judge(dataset, data, None, folder))])


def of_profile(name: str, overrides: list[str] | None) -> Verdicts:
    """Judge every dataset of a profile that is there; what the prepare stage makes is there once a run has made it."""
    profile = load_profile(name, overrides)
    data, made = profile.recipe.datasets, _made(profile)
    verdicts: Verdicts = []
    findings = _findings()
    with tempfile.TemporaryDirectory() as folder:
        held_out = None
        for field in ("eval", "sft", "preference", "prompts"):
            dataset = getattr(data, field)
            if dataset is None or (dataset.prepared and made is None):
                continue
            source = locate_dataset(f"recipe.datasets.{field}", dataset, made)
            output, found = Path(folder) / field, findings / field
            output.mkdir()
            found.mkdir()
            verdict = hold_to_contract(dataset, source, held_out, output, found)
            verdicts.append((f"recipe.datasets.{field}  {source}", found, verdict))
            if field == "eval":
                held_out = Artifact("dataset", str(output), "", tree_digest(source))
    if not verdicts:
        raise ProfileError(
            f"every dataset of {name} is made by its prepare stage, which has not run: `posttrain run {name}` makes and "
            "judges them."
        )
    return _passed(verdicts)


def _limits(overrides: list[str]) -> dict[str, float]:
    """Return the limits that `--set contract.NAME=NUMBER` sets; anything else would be a setting of a profile."""
    limits = {}
    for text in overrides:
        name, _, value = text.removeprefix("contract.").partition("=")
        try:
            limits[name] = int(value) if value.isdigit() else float(value)
        except ValueError:
            value = ""
        if not value or not text.startswith("contract."):
            raise ProfileError(f"--set {text!r}: with --data there is no profile, only limits: --set contract.NAME=NUMBER.")
    return limits


def _made(profile: Profile) -> Artifact | None:
    """Return what the profile's prepare stage has made, if it has."""
    if profile.recipe.prepare is None:
        return None
    base = find_base_model(profile, None) if profile.recipe.prepare.base_model else None
    key = fingerprint(prepare_stage(profile, base).identity(profile.placement.of("prepare")))
    found = store().find("prepare", key)
    return store().fetch(found) if found else None


def _findings() -> Path:
    """Return a new folder for what a person looks at: reports, and the bad rows."""
    folder = home() / ".validations" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"
    with disk_errors(folder):
        folder.mkdir(parents=True)
    return folder


def _judge(dataset: Dataset, source: Path, held_out: Artifact | None, findings: Path) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return hold_to_contract(dataset, source, held_out, Path(folder), findings)


def _passed(verdicts: Verdicts) -> Verdicts:
    broken = [refusal(name, verdict, findings) for name, findings, verdict in verdicts if not verdict.passed]
    if broken:
        raise ContractBroken("\n\n".join(broken))
    return verdicts
