"""Hold a dataset to its contract: strict rows, flat facts, Great Expectations over them; then pin it in the store."""

import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import State, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from profiles.schema import Dataset, Profile
from tasks import hub
from tasks.artifacts import Artifact, disk_errors
from tasks.build import cached
from tasks.errors import ContractBroken, ProfileError
from tasks.fingerprints import PROJECT, code_digest, file_digest, fingerprint, tree_digest
from tasks.monitoring import mlflow_runs
from tasks.pipeline_run import PipelineRun, last_manifests, recorded
from tasks.prepare_data import locate
from tasks.token_facts import Tokens, uses_of

log = logging.getLogger("posttrain")


@task(task_run_name="validate-{name}", cache_policy=NO_CACHE, persist_result=False)
def validate_data(
    run: PipelineRun, name: str, made: Artifact | None, base: Artifact, held_out: Artifact | None
) -> Artifact | State:
    """Return the dataset `recipe.datasets.<name>` as canonical Parquet, its contract's verdict in its details.

    `base` is the model whose tokenizer and template the rows must suit, `held_out` the validated eval set, whose prompts no
    training row may repeat. Raises ContractBroken with the rows, the rules and the harm; ProfileError if nothing can be read.
    """
    dataset: Dataset = getattr(run.profile.recipe.datasets, name)
    source = locate_dataset(f"recipe.datasets.{name}", dataset, made)
    tokens = tokens_of(run.profile, name, run.store.fetch(base), run.stop)
    identity = identify(dataset, source, held_out, tokens)
    key, stage = fingerprint(identity), f"validate-{name}"
    if (hit := run.store.find("dataset", key)) is not None:
        return cached(run, stage, hit)
    tags = {"stage": stage, "fingerprint": key, "run_id": run.run_id}
    with (
        recorded(run, stage, key) as record,
        run.store.staging("dataset", key) as staged,
        mlflow_runs.stage_run(run.profile.name, stage, tags, run.mlflow_run_id) as mlflow_run_id,
    ):
        record.mlflow_run_id = mlflow_run_id
        findings = run.work(stage)
        try:
            last = last_snapshot(run.profile.name, stage, dataset)
            judged = hold_to_contract(dataset, source, held_out, staged, findings, tokens, last, name == "eval")
        finally:
            mlflow_runs.log_folder(mlflow_run_id, findings)
        verdict = judged.verdict
        _show(verdict, stage, mlflow_run_id)
        if not verdict.passed:
            raise ContractBroken(refusal(f"recipe.datasets.{name} ({source})", verdict, findings))
        counts = {"num_rows": float(verdict.n_rows), "data/quarantined_rows": float(verdict.n_set_aside)}
        details = {
            "contract": verdict.to_dict(),
            "tokens": tokens.totals(judged.facts),
            "snapshot": taken(judged),
            "origin": origin_of(dataset),
            "made_of": {"source": source_name(dataset, source)} | ({"held_out": held_out.source} if held_out else {}),
        }
        mlflow_runs.log_dict(mlflow_run_id, details["snapshot"], "snapshot.json")
        artifact = Artifact("dataset", str(staged), key, "", counts, details, mlflow_run_id)
        artifact = run.store.commit(staged, artifact, identity)
        record.artifact, record.metrics = artifact.path, artifact.metrics
        mlflow_runs.log_dataset(mlflow_run_id, name, artifact.path, artifact.digest, dataset.kind)
    log.info("%s: %d %s rows hold their contract", stage, verdict.n_rows, dataset.kind)
    if verdict.n_set_aside:
        log.warning("%s: %d bad rows do not train, as the profile allows: %s", stage, verdict.n_set_aside, findings)
    return artifact


def refusal(what: str, verdict: Any, findings: Path) -> str:
    """Return the text of a broken contract: the rules, and where every bad row is written down."""
    return f"{what} violates its contract. Report and every bad row: {findings}\n{verdict.to_text()}"


def tokens_of(profile: Profile, name: str, base: Artifact, stop: threading.Event | None = None) -> Tokens:
    """Return how the trainers of `recipe.datasets.<name>` will read its rows."""
    return Tokens(base, uses_of(profile.recipe, name), profile.placement.default, stop or threading.Event())


def hold_to_contract(
    dataset: Dataset,
    source: Path,
    held_out: Artifact | None,
    output: Path,
    findings: Path,
    tokens: Tokens | None,
    last: dict[str, Any] | None = None,
    is_held_out: bool = False,
) -> Any:
    """Write rows.parquet into `output` and return what was judged; raises ContractBroken where nothing could be.

    Without `tokens` nothing is asked that needs a tokenizer, without the `last` snapshot nothing is compared; rows that are
    themselves held out are not asked whether they overlap with others that are. `findings` gets what a person looks at:
    contract.html, Great Expectations' own result, and quarantine.jsonl if a row is bad.
    """
    from data_contracts.canonical import RowsFile
    from data_contracts.contract import ContractInvalid, contract_for
    from data_contracts.held_out import HeldOut
    from data_contracts.quarantine import FILE, judge_source
    from data_contracts.rows import RowsRefused
    from data_contracts.snapshot import judge_drift, split_limits

    limits, drift_limits = split_limits(dataset.contract)
    try:
        contract = contract_for(dataset.kind).with_tokens(tokens.methods() if tokens else {}).with_limits(limits)
        contract = contract.of_held_out() if is_held_out else contract
    except ContractInvalid as error:
        raise ProfileError(f"contract of {source}: {error}") from None
    try:
        how = dataset.model_dump(include={"layout", "columns", "start", "stop"})
        hidden = None if held_out is None else HeldOut.of(RowsFile.at(held_out / "rows.parquet"), _kind(held_out))
        with disk_errors(output), _judge_of(dataset) as spark:
            more = tokens.facts if tokens else None
            by = replace(contract, spark=spark)
            judged = judge_source(source, by, hidden, how, findings / FILE, output / "rows.parquet", more)
    except RowsRefused as error:
        rows = f"\nThe bad rows: {findings / FILE}" if (findings / FILE).is_file() else ""
        raise ContractBroken(f"{error}{rows}") from None
    except ValueError as error:
        raise ProfileError(f"{source} cannot be read as asked: {error}") from None
    if last is not None:
        judged = judged.with_more(judge_drift(last, judged.facts, judged.columns(), drift_limits))
    with disk_errors(output):
        (findings / "contract.html").write_text(judged.verdict.to_html(str(source)), encoding="utf-8")
        (findings / "great_expectations.json").write_text(json.dumps(judged.verdict.gx_result, indent=1))
    return judged


@contextmanager
def _judge_of(dataset: Dataset) -> Iterator[Any]:
    """Start Spark where the dataset asks for it, on the machine or cluster that the environment names; pandas is None."""
    from data_contracts.spark import SparkUnusable, started

    if dataset.engine == "pandas":
        yield None
        return
    master, folder = os.environ.get("POSTTRAIN_SPARK_MASTER", "local[*]"), os.environ.get("POSTTRAIN_SPARK_FOLDER")
    try:
        with started(master, Path(folder) if folder else None) as spark:
            yield spark
    except SparkUnusable as error:
        hint = "POSTTRAIN_SPARK_MASTER and POSTTRAIN_SPARK_FOLDER say where Spark runs; engine: pandas needs neither"
        raise ProfileError(f"a dataset's engine is 'spark', and {error}. {hint}.") from error


def taken(judged: Any) -> dict[str, Any]:
    """Return what the next set of this dataset is compared with."""
    from data_contracts.snapshot import snapshot

    return snapshot(judged.facts, judged.columns())


def last_snapshot(profile: str, stage: str, dataset: Dataset) -> dict[str, Any] | None:
    """Return the snapshot of the rows that this profile last accepted from the same place, read in the same way."""
    for manifest in last_manifests(profile, stage, "dataset"):
        details = manifest["artifact"]["details"]
        if details.get("origin") == origin_of(dataset):
            return details["snapshot"]
    return None


def origin_of(dataset: Dataset) -> dict[str, Any]:
    """Return where rows come from and how they are read: another place or slice is a person's choice, and no drift."""
    return dataset.model_dump(exclude={"contract", "revision", "engine"})


def source_name(dataset: Dataset, source: Path) -> str:
    """Return what a person finds the rows by."""
    return f"hub:{dataset.hub}@{dataset.revision}" if dataset.hub else str(source.resolve())


def locate_dataset(setting: str, dataset: Dataset, made: Artifact | None) -> Path:
    """Return the local file or folder of a dataset; one on the hub is fetched at its pinned revision."""
    if dataset.hub:
        return hub.fetch_split(setting, dataset.hub, dataset.revision, dataset.split)
    path = locate(setting, dataset, made)
    if not path.exists():
        raise ProfileError(f"{setting}.path is {dataset.path!r}: there is no such file (looked from {Path.cwd()}).")
    return path


def identify(dataset: Dataset, source: Path, held_out: Artifact | None, tokens: Tokens) -> dict[str, Any]:
    """Return what makes two validated datasets the same: the rows' bytes, how they are read, and what judges them."""
    contracts = [PROJECT / "data_contracts" / f"{name}.yaml" for name in (dataset.kind, "tokens")]
    reading = dataset.model_dump(include={"kind", "layout", "columns", "start", "stop", "contract"})
    return {
        "stage": "dataset",
        "recipe": reading,
        "inputs": {"source": tree_digest(source), "held_out": held_out.digest if held_out else None},
        "code": code_digest("data_contracts.quarantine"),
        "contract": {path.stem: file_digest(path) for path in contracts},
        "tokens": tokens.identity(),
    }


def _kind(held_out: Artifact) -> str:
    return held_out.details["contract"]["kind"]


def _show(verdict: Any, stage: str, mlflow_run_id: str) -> None:
    """Put the verdict where a person looks: the run's page in Prefect, and MLflow."""
    create_markdown_artifact(key=f"contract-{stage}", markdown=verdict.to_markdown(), description=f"contract of {stage}")
    mlflow_runs.log_dict(mlflow_run_id, verdict.to_dict(), "contract.json")
    counts = {"data/num_rows": float(verdict.n_rows), "data/quarantined_rows": float(verdict.n_set_aside)}
    mlflow_runs.log_scalars(mlflow_run_id, counts)
