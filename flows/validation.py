"""`posttrain validate`: the contracts of a profile's datasets, or of one file, judged without a run."""

import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from profiles.schema import Dataset, Profile, StagePlacement
from tasks.artifacts import Artifact, disk_errors
from tasks.check_profile import check_trainer_args, load_profile
from tasks.environment import home
from tasks.errors import ContractBroken, ProfileError
from tasks.fingerprints import fingerprint, tree_digest
from tasks.pipeline_run import store
from tasks.prepare_data import find_base_model, prepare_stage
from tasks.token_facts import TRAINERS, Tokens, usual_reader
from tasks.validate_data import hold_to_contract, last_snapshot, locate_dataset, refusal, tokens_of

Verdicts = list[tuple[str, Path, Any]]  # what was judged, where its report is, the verdict


def of_file(
    data: str, kind: str, layout: str, columns: dict[str, str], model: Path | None, overrides: list[str] | None
) -> Verdicts:
    """Judge one file, folder or dataset of the hub (`hub:OWNER/NAME@REVISION`); raises ContractBroken if it is broken.

    With a `model` the rows are also read as the usual trainer of their kind reads them. Overrides are `contract.NAME=NUMBER`
    over the contract's limits and `args.NAME=VALUE`, arguments of that trainer.
    """
    from data_contracts.kinds import KINDS
    from data_contracts.layouts import LAYOUTS

    if kind not in KINDS:
        raise ProfileError(f"--kind is {kind!r}; there is: {', '.join(KINDS)}.")
    if layout not in LAYOUTS:
        raise ProfileError(f"--layout is {layout!r}; there is: {', '.join(LAYOUTS)}.")
    if not data.startswith("hub:") and not Path(data).exists():
        raise ProfileError(f"--data is {data!r}: there is no such file or folder (looked from {Path.cwd()}).")
    limits, args = _settings(overrides or [], with_model=model is not None)
    how = {"kind": kind, "layout": layout, "columns": columns, "contract": limits}
    dataset = Dataset(**_origin(data), **how)
    source = locate_dataset("--data", dataset, None)
    tokens = _usual_reader(kind, args, model) if model else None
    folder = _findings()
    return _passed([(data, folder, _judge(dataset, source, None, folder, tokens))])


def column_names(text: str) -> dict[str, str]:
    """Return `prompt=question,answer=solution` as the kind's names to the source's."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    if any(not ours or not theirs for ours, _, theirs in pairs):
        raise ProfileError(f"--columns is {text!r}; write OURS=THEIRS,…, as in prompt=question,completion=answer.")
    return {ours: theirs for ours, _, theirs in pairs}


def _origin(data: str) -> dict[str, str]:
    if not data.startswith("hub:"):
        return {"path": data}
    name, _, revision = data.removeprefix("hub:").partition("@")
    return {"hub": name, "revision": revision or "main"}


def _usual_reader(kind: str, args: dict[str, Any], model: Path) -> Tokens:
    """Return how the trainer that most use for rows of this kind reads them."""
    if kind not in TRAINERS:
        raise ProfileError(f"--model: no trainer of posttrain reads {kind} rows yet. Leave it out.")
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ProfileError(f"--model is {str(model)!r}: the folder has no tokenizer.json or tokenizer_config.json.")
    base = Artifact("base_model", str(model.absolute()), "", "")
    check_trainer_args("--set args", TRAINERS[kind], args)
    return Tokens(base, [usual_reader(kind, args)], StagePlacement())


def of_profile(name: str, overrides: list[str] | None) -> Verdicts:
    """Judge every dataset of a profile that is there; what the prepare stage makes is there once a run has made it."""
    profile = load_profile(name, overrides)
    data, made = profile.recipe.datasets, _made(profile)
    base = find_base_model(profile, made) if made or not profile.recipe.base_model.prepared else None
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
            tokens = tokens_of(profile, field, base) if base else None
            last = last_snapshot(profile.name, f"validate-{field}", dataset)
            verdict = hold_to_contract(dataset, source, held_out, output, found, tokens, last, field == "eval").verdict
            verdicts.append((f"recipe.datasets.{field}  {source}", found, verdict))
            if field == "eval":
                contract = {"contract": verdict.to_dict()}
                held_out = Artifact("dataset", str(output), "", tree_digest(source), details=contract)
    if not verdicts:
        raise ProfileError(
            f"every dataset of {name} is made by its prepare stage, which has not run: `posttrain run {name}` makes and "
            "judges them."
        )
    return _passed(verdicts)


def _settings(overrides: list[str], with_model: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the limits that `--set contract.NAME=NUMBER` sets, and the trainer's `--set args.NAME=VALUE`."""
    limits, args = {}, {}
    for text in overrides:
        name, _, value = text.partition("=")
        given = yaml.safe_load(value)
        if name.startswith("contract.") and isinstance(given, int | float):
            limits[name.removeprefix("contract.")] = given
        elif name.startswith("args.") and value and with_model:
            args[name.removeprefix("args.")] = given
        else:
            raise ProfileError(
                f"--set {text!r}: with --data there is no profile, only limits and, with --model, the trainer's arguments: "
                "--set contract.NAME=NUMBER, --set args.NAME=VALUE."
            )
    return limits, args


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


def _judge(dataset: Dataset, source: Path, held_out: Artifact | None, findings: Path, tokens: Tokens | None) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return hold_to_contract(dataset, source, held_out, Path(folder), findings, tokens).verdict


def _passed(verdicts: Verdicts) -> Verdicts:
    broken = [refusal(name, verdict, findings) for name, findings, verdict in verdicts if not verdict.passed]
    if broken:
        raise ContractBroken("\n\n".join(broken))
    return verdicts
