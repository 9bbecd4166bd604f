"""`posttrain validate`: the contracts of a profile's datasets, or of one file, judged without a run."""

import tempfile
from pathlib import Path
from typing import Any

from profiles.schema import Dataset, Profile
from tasks.artifacts import Artifact
from tasks.check_profile import load_profile
from tasks.errors import ContractBroken, ProfileError
from tasks.fingerprints import fingerprint, tree_digest
from tasks.pipeline_run import store
from tasks.prepare_data import find_base_model, prepare_stage
from tasks.validate_data import hold_to_contract, locate_dataset

Verdicts = list[tuple[str, Any]]


def of_file(data: Path, kind: str, layout: str) -> Verdicts:
    """Judge one file; raises ContractBroken if it violates the contract of its kind."""
    from data_contracts.kinds import KINDS
    from data_contracts.layouts import LAYOUTS

    if kind not in KINDS:
        raise ProfileError(f"--kind is {kind!r}; there is: {', '.join(KINDS)}.")
    if layout not in LAYOUTS:
        raise ProfileError(f"--layout is {layout!r}; there is: {', '.join(LAYOUTS)}.")
    if not data.exists():
        raise ProfileError(f"--data is {str(data)!r}: there is no such file.")
    return _passed([(str(data), _judge(Dataset(path=str(data), kind=kind, layout=layout), data, None))])


def of_profile(name: str, overrides: list[str] | None) -> Verdicts:
    """Judge every dataset of a profile that is there; what the prepare stage makes is there once a run has made it."""
    profile = load_profile(name, overrides)
    data, made = profile.recipe.datasets, _made(profile)
    verdicts: Verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        held_out = None
        for field in ("eval", "sft", "preference", "prompts"):
            dataset = getattr(data, field)
            if dataset is None or (dataset.prepared and made is None):
                continue
            source = locate_dataset(f"recipe.datasets.{field}", dataset, made)
            output = Path(folder) / field
            output.mkdir()
            verdicts.append((f"recipe.datasets.{field}  {source}", hold_to_contract(dataset, source, held_out, output)))
            if field == "eval":
                held_out = Artifact("dataset", str(output), "", tree_digest(source))
    if not verdicts:
        raise ProfileError(
            f"every dataset of {name} is made by its prepare stage, which has not run: `posttrain run {name}` makes and "
            "judges them."
        )
    return _passed(verdicts)


def _made(profile: Profile) -> Artifact | None:
    """Return what the profile's prepare stage has made, if it has."""
    if profile.recipe.prepare is None:
        return None
    base = find_base_model(profile, None) if profile.recipe.prepare.base_model else None
    key = fingerprint(prepare_stage(profile, base).identity(profile.placement.of("prepare")))
    found = store().find("prepare", key)
    return store().fetch(found) if found else None


def _judge(dataset: Dataset, source: Path, held_out: Artifact | None) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return hold_to_contract(dataset, source, held_out, Path(folder))


def _passed(verdicts: Verdicts) -> Verdicts:
    broken = [f"{name}:\n{verdict.to_markdown()}" for name, verdict in verdicts if not verdict.passed]
    if broken:
        raise ContractBroken("\n".join(broken))
    return verdicts
