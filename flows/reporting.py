"""What a run leaves for people and machines: summary.json, the report, Prefect artifacts, and MLflow's closing status."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.client.orchestration import get_client

from flows import report
from flows.drift_history import history
from tasks import gates, retrains
from tasks.artifacts import Artifact, disk_errors
from tasks.errors import GateFailed, RunCancelled, RunDied
from tasks.interrupts import interrupts, suspension
from tasks.ledger import ledger, total
from tasks.monitoring import mlflow_runs
from tasks.pipeline_run import CLOSED, PipelineRun, StageRecord, write_json

log = logging.getLogger("posttrain")
HISTORY = 20  # runs in the report's charts between retrains
TAG = {"PASS": "passed", "FAIL": "failed", "INCONCLUSIVE": "inconclusive"}


@contextmanager
def reported(run: PipelineRun, summary: dict[str, Any]) -> Iterator[None]:
    """Fill and publish `summary` when the block ends, however it ends; the process of a run that waits may end, not the run."""
    error: BaseException | None = None
    try:
        with mlflow_runs.closing(run.mlflow_run_id):
            try:
                mlflow_runs.log_dict(run.mlflow_run_id, run.profile.model_dump(mode="json"), "profile.json")
                link = mlflow_runs.run_url(run.mlflow_run_id)
                create_link_artifact(link=link, link_text="this run in MLflow", key="mlflow-run")
                yield
            except BaseException as raised:
                error = raised
                error.summary_file = run.folder / "summary.json"
                raise
            finally:
                if not isinstance(error, suspension()):
                    summary.update(summarise(run, error))
                    write_report(run, summary)
    finally:
        if not isinstance(error, suspension()):
            (run.folder / CLOSED).touch()


def write_report(run: PipelineRun, summary: dict[str, Any]) -> None:
    """Publish the summary; a server that is away changes nothing about what the run came to."""
    try:
        with disk_errors(run.folder):
            publish(run, summary)
        label(run, summary)
    except httpx.HTTPError as error:
        log.warning("the report is in %s, but not on the servers: %s: %s", run.folder, type(error).__name__, error)


def summarise(run: PipelineRun, error: BaseException | None) -> dict[str, Any]:
    """Return the run's summary: the same for a person's table, a script's JSON and the report."""
    by_stage = concluded(run.records())
    export = by_stage.get("export")
    return {
        "profile": run.profile.name,
        "run_id": run.run_id,
        "status": status_of(error),
        "exit_code": exit_code_of(error),
        "error": None if error is None else f"{type(error).__name__}: {error}",
        "stages": [asdict(record) for record in in_order(run, [*by_stage.values(), *skipped(run, by_stage)])],
        "cost": ledger(run),
        "metrics": _read(run.folder / "metrics.json", {}),
        "gate": _read(run.folder / "gate.json", None),
        "retrain": _read(run.folder / "retrain.json", None),
        "approval": _read(run.folder / "approval.json", None),
        "release": _read(run.folder / "release.json", None),
        "export": export.artifact if export else None,
        "serve": serve_command(run, export),
        "report": str(run.folder / "report.html"),
        "mlflow_run_id": run.mlflow_run_id,
        "prefect_flow_run_id": run.flow_run_id,
    }


def concluded(records: list[StageRecord]) -> dict[str, StageRecord]:
    """Return each stage's last record; attempts that were made before it are among its notes."""
    last: dict[str, StageRecord] = {}
    for record in records:
        before = last.get(record.stage)
        if before and before.cause:
            failed = f"an attempt failed ({before.cause}): {str(before.reason).splitlines()[0]}"
            record.notes = [*before.notes, failed, *record.notes]
        last[record.stage] = record
    return last


def serve_command(run: PipelineRun, export: StageRecord | None) -> str | None:
    """Return the command that serves the export as it was tested: vLLM's own choice of dtype would be another model."""
    if export is None or export.artifact is None:
        return None
    manifest = run.store.manifest("export", export.fingerprint)
    return f"vllm serve {export.artifact} {manifest['artifact']['details'].get('serve', '')}".rstrip()


def status_of(error: BaseException | None) -> str:
    """Return completed, failed, cancelled, or crashed for a run that died without a word; `waiting` is said elsewhere."""
    if isinstance(error, RunDied):
        return "crashed"
    if error is None:
        return "completed"
    return "cancelled" if isinstance(error, (RunCancelled, *interrupts())) else "failed"


def exit_code_of(error: BaseException | None) -> int:
    """Return what `posttrain` exits with: 0, the deliberate stop's own code, 130 for Ctrl-C, 1 for a bug."""
    if error is None:
        return 0
    return RunCancelled.exit_code if isinstance(error, interrupts()) else getattr(error, "exit_code", 1)


def in_order(run: PipelineRun, records: list[StageRecord]) -> list[StageRecord]:
    """Return the records in the recipe's order: what runs side by side ends in any."""
    data = [f"validate-{name}" for name in ("eval", "sft", "preference", "unpaired", "prompts")]
    order = [
        "prepare",
        *data,
        "sft",
        "reward_model",
        run.profile.recipe.policy.method,
        "merge",
        "evaluate",
        "export",
        "promote",
        "push",
    ]
    return sorted(records, key=lambda record: order.index(record.stage))


def skipped(run: PipelineRun, by_stage: dict[str, StageRecord]) -> list[StageRecord]:
    """Return a record for each stage that this run did not come to, or whose recipe does without it."""
    recipe = run.profile.recipe
    reasons = {"sft": None if recipe.sft else "not in the recipe"}
    reasons |= {"reward_model": None if recipe.reward_model else "not in the recipe"}
    stages = ["sft", "reward_model", recipe.policy.method, "merge", "evaluate", "export", "promote"]
    late = "an earlier stage stopped the run"
    return [StageRecord(s, "skipped", reason=reasons.get(s) or late) for s in stages if s not in by_stage]


def gate_candidate(run: PipelineRun, policy: Artifact, evaluation: Artifact) -> None:
    """Judge the policy on the evaluation's scores and against the last accepted ones.

    Raises GateFailed with every claim that did not pass, ProfileError when the gate names what was not measured.
    """
    scores, metric = read_scores(evaluation / "samples.jsonl"), run.profile.recipe.evaluate.metric
    asked = gates.judge(scores, run.profile.gates, metric, evaluation.details["comparable"]).claims
    verdict = gates.weigh([*asked, *drift_claims(run, policy, evaluation)])
    leave_verdict(run, verdict, scores, retrains.looks(run, policy, evaluation))
    if verdict.verdict != "PASS":
        raise GateFailed(refusal(verdict), inconclusive=verdict.verdict == "INCONCLUSIVE")


def drift_claims(run: PipelineRun, policy: Artifact, evaluation: Artifact) -> list[gates.Claim]:
    """Return a claim that fails for each canary that is too far from the last accepted runs'; the others only warn."""
    canaries = {name: v for name, v in (policy.metrics | evaluation.metrics).items() if name in retrains.SIGNALS}
    key = policy.details.get("canaries", "")
    drifted = retrains.compare(canaries, retrains.past_canaries(run.profile, policy, key), run.profile.drift.between_runs)
    write_json(run.folder / "retrain.json", {"canaries": canaries, "drifted": [asdict(d) for d in drifted]})
    retrains.leave_canaries(run, policy, key, canaries)
    for found in drifted:
        log.warning("between retrains: %s", found.text)
    return [
        gates.Claim("no drift between retrains", "FAIL", d.text, d.signal, estimate=d.value, limit=d.limit)
        for d in drifted
        if d.fails
    ]


def leave_verdict(run: PipelineRun, verdict: gates.Verdict, scores: dict[str, dict[str, list[float]]], looks: int) -> None:
    """Leave the verdict, every claim and every model's estimates in gate.json, metrics.json and MLflow."""
    estimates = {metric: {name: asdict(e) for name, e in own.items()} for metric, own in gates.estimates(scores).items()}
    write_json(run.folder / "metrics.json", estimates)
    write_json(run.folder / "gate.json", asdict(verdict) | {"looks": looks})
    flat = {f"{metric}/{name}": e["value"] for metric, models in estimates.items() for name, e in models.items()}
    passed = float(verdict.verdict == "PASS")
    mlflow_runs.log_scalars(run.mlflow_run_id, flat | {"gate/passed": passed, "gate/looks": float(looks)})
    mlflow_runs.set_tags(run.mlflow_run_id, {"gate": TAG[verdict.verdict]})
    log.info("gate: %s (candidate number %d on these held-out rows)", verdict.verdict, looks)
    if not verdict.claims:
        log.warning("gates: nothing was asked of the candidate, so any would have passed. Name a model in gates.better_than.")


def refusal(verdict: gates.Verdict) -> str:
    """Return the verdict, what it means and a line for each claim that did not pass."""
    meaning = {"FAIL": "the candidate is not good enough", "INCONCLUSIVE": "the candidate is not shown to be good enough"}
    head = f"{verdict.verdict}: {meaning[verdict.verdict]}; it is not released."
    return "\n".join([head, *(f"- {claim.verdict}: {claim.text}" for claim in verdict.open)])


def read_scores(samples: Path) -> dict[str, dict[str, list[float]]]:
    """Return each metric's and model's scores in row order; raises ValueError for a row that is there twice or not at all."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    with samples.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            rows = found.setdefault(line["metric"], {}).setdefault(line["model"], {})
            if line["row"] in rows:
                raise ValueError(f"{samples}: row {line['row']} of {line['model']} has {line['metric']} twice")
            rows[line["row"]] = line["score"]
    for metric, models in found.items():
        for name, rows in models.items():
            if missing := set(range(max(map(len, models.values())))) - set(rows):
                raise ValueError(f"{samples}: {metric} of {name} has no row {min(missing)} ({len(missing)} missing)")
    return {m: {name: [rows[row] for row in sorted(rows)] for name, rows in models.items()} for m, models in found.items()}


def publish(run: PipelineRun, summary: dict[str, Any]) -> None:
    """Write summary.json and report.html, and put both where their readers look: Prefect and MLflow."""
    write_json(run.folder / "summary.json", summary)
    for record in summary["stages"]:
        mlflow_runs.set_tags(run.mlflow_run_id, {f"stage.{record['stage']}": record["status"]})
    mlflow_runs.log_scalars(run.mlflow_run_id, cost_metrics(summary["cost"]))
    if summary["exit_code"] == 0:
        mlflow_runs.set_tags(run.mlflow_run_id, {"accepted": "true"})
    plots = report.plots_of(summary["stages"])
    past = report.plots_of_history(history(run.profile.name, HISTORY))
    (run.folder / "report.html").write_text(report.html(run, summary, plots, past), encoding="utf-8")
    mlflow_runs.log_file(run.mlflow_run_id, run.folder / "report.html")
    create_markdown_artifact(key="summary", markdown=report.markdown(run, summary, plots), description="Stages, metrics, gate")


def cost_metrics(cost: dict[str, Any]) -> dict[str, float]:
    """Return the ledger as metrics of the run: `cost/cpu_seconds`, `cost/wasted_cpu_seconds`, …"""
    wasted = total(list(cost["waste"].values()))
    return {f"cost/{unit}": v for unit, v in cost["total"].items()} | {f"cost/wasted_{unit}": v for unit, v in wasted.items()}


def label(run: PipelineRun, summary: dict[str, Any]) -> None:
    """Put on the Prefect run what a caller far away needs: `posttrain run --deployment` exits with the code that is there."""
    labels = {f"posttrain.{name}": summary[name] for name in ("profile", "run_id", "status", "exit_code")}
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(UUID(run.flow_run_id), labels)


def _read(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.is_file() else default
