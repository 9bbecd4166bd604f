"""Follows a job from this side: its curves to MLflow, its progress to Prefect, and what the governor found to both."""

import logging
import time
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event

from tasks.artifacts import Artifact
from tasks.errors import DriftHalted
from tasks.job_order import JobOrder
from tasks.launch import launch
from tasks.local_job import MetricsReader
from tasks.monitoring import curves, mlflow_runs
from tasks.monitoring.drift import ALWAYS, FINDINGS, series_of
from tasks.monitoring.metrics import key_metric
from tasks.pipeline_run import PipelineRun

log = logging.getLogger("posttrain")
RETRY_SECONDS = 15


def follow_job(run: PipelineRun, order: JobOrder, inputs: dict[str, Artifact]) -> Artifact:
    """Launch the job and return what it left; its curves go to MLflow and its progress on the run's page as they come."""
    link = mlflow_runs.run_url(order.mlflow_run_id)
    create_link_artifact(link=link, link_text=f"{order.stage} in MLflow", key=f"mlflow-{dashed(order.stage)}")
    listener = Listener(order, run.profile.name)
    try:
        artifact = launch(order, inputs, run.store, listener.hear, run.stop)
    except DriftHalted as halt:
        picture = "not drawn"
        try:
            listener.end()
            picture = draw(run.work(order.stage), order)
        except Exception as error:  # a server that is away must not turn a halt into something else
            log.warning("the halt is not everywhere yet: %s: %s", type(error).__name__, error)
        raise DriftHalted(f"{halt}\nCurves: {picture}", halt.last_good) from None
    listener.end()
    if order.drift:
        conclude(run, order, artifact, warned=bool(listener.findings))
    if dropped := artifact.metrics.get("data/dropped_rows"):
        log.warning(
            "%s: TRL left out %d rows: after truncation nothing of their replies was left to train on", order.stage, dropped
        )
    # what the trainer logged is a curve already; a bar of its end beside it would only crowd the page
    scalars = {name: v for name, v in artifact.metrics.items() if name not in listener.curves}
    mlflow_runs.log_scalars(order.mlflow_run_id, scalars)
    return artifact


def conclude(run: PipelineRun, order: JobOrder, artifact: Artifact, warned: bool) -> None:
    """Say in MLflow's tags and the log what became of a governed stage that was not halted for good."""
    told = [*artifact.details.get("retried", []), artifact.details.get("halted", "")]
    verdict = "rolled back" if told[-1] else "retried" if told[:-1] else "warned" if warned else "inside"
    worst = {"drift.worst": f"{artifact.metrics['drift/worst']:.2f}", "drift.worst_signal": artifact.details["worst_signal"]}
    tags = {"drift.verdict": verdict} | worst
    mlflow_runs.set_tags(order.mlflow_run_id, tags)
    if told[-1]:
        log.warning("%s: %s The chain goes on from step %d.", order.stage, told[-1].strip(), artifact.details["rolled_back_to"])
    if verdict != "inside":
        draw(run.work(order.stage), order)


def notes_of(artifact: Artifact) -> list[str]:
    """Return what a reader of the summary must know of a governed stage, cached or not: its warnings, restarts, a rollback."""
    details = artifact.details
    notes = [finding["text"] for finding in details.get(FINDINGS, []) if finding["severity"] == "warn"]
    notes += details.get("retried", [])
    if "rolled_back_to" in details:
        notes.append(f"{details['halted']} The policy is that of step {details['rolled_back_to']}.")
    return notes


def draw(work: Path, order: JobOrder) -> Path:
    """Draw every judged signal with its corridor, beside the job's log and in MLflow; return the picture's path."""
    picture = work / "drift.png"
    series = series_of(MetricsReader(work / "metrics.jsonl").new())
    picture.write_bytes(curves.draw(series, ["reward", "canary/reward", *(order.drift.get("signals") or ALWAYS)]))
    mlflow_runs.log_file(order.mlflow_run_id, picture)
    return picture


class Listener:
    """Passes a job's metrics on to MLflow and Prefect; a server that is down costs the job nothing, and no line is lost."""

    def __init__(self, order: JobOrder, profile: str):
        self.order, self.profile = order, profile
        self.progress = Progress(order.stage)
        self.waiting: list[dict[str, Any]] = []
        self.curves: set[str] = set()
        self.findings: list[dict[str, Any]] = []
        self.unsaid: list[dict[str, Any]] = []
        self.retry_at = 0.0

    def hear(self, lines: list[dict[str, Any]]) -> None:
        self.waiting += lines
        self.unsaid += [finding for line in lines for finding in line.get(FINDINGS, [])]
        self.curves.update(name for line in lines for name in line["metrics"])
        for finding in (finding for line in lines for finding in line.get(FINDINGS, [])):
            log.warning("%s: %s", self.order.stage, finding["text"])
        if time.monotonic() < self.retry_at:
            return
        try:
            self._hand_over()
            self.progress.show(lines)
        except Exception as error:  # whatever a server's failure is called, it must not end hours of training
            log.warning("metrics wait for their server: %s: %s", type(error).__name__, error)
            self.retry_at = time.monotonic() + RETRY_SECONDS

    def end(self) -> None:
        """Hand over what still waits; now that the job is done, a server that is still down is an error."""
        self._hand_over()
        self.progress.end()

    def _hand_over(self) -> None:
        mlflow_runs.log_points(self.order.mlflow_run_id, self.waiting)
        self.waiting = []
        if self.unsaid:
            self._announce()
            self.unsaid = []

    def _announce(self) -> None:
        """Make of each finding an event that an automation can listen to; all of them so far are a table on the run's page."""
        stage = self.order.stage
        self.findings += [finding for finding in self.unsaid if finding not in self.findings]
        signals = ", ".join(dict.fromkeys(finding["signal"] for finding in self.findings))
        mlflow_runs.set_tags(self.order.mlflow_run_id, {"drift.warned": signals})
        resource = {"prefect.resource.id": f"posttrain.{self.profile}.{stage}", "prefect.resource.name": stage}
        for finding in self.unsaid:
            name = "posttrain.drift.halted" if finding["severity"] == "halt" else "posttrain.drift.warned"
            emit_event(name, resource, payload=finding | {"mlflow_run_id": self.order.mlflow_run_id})
        head = "| step | signal | | what |\n|---|---|---|---|\n"
        rows = [f"| {f['step']} | {f['signal']} | {f['severity']} | {f['text']} |" for f in self.findings]
        create_markdown_artifact(key=f"drift-{dashed(stage)}", markdown=head + "\n".join(rows), description=f"{stage}: drift")


class Progress:
    """A stage's progress artifact on the Prefect run page, and the same as log records for the terminal."""

    def __init__(self, stage: str):
        self.stage = stage
        self.artifact_id = create_progress_artifact(progress=0.0, key=f"progress-{dashed(stage)}", description=stage)
        self.updated = 0.0

    def show(self, lines: list[dict[str, Any]]) -> None:
        """Show the newest step, at most every two seconds."""
        steps = [line for line in lines if line.get("max_steps")]
        if not steps or time.monotonic() - self.updated < 2:
            return
        self.updated = time.monotonic()
        step, max_steps = steps[-1]["step"], steps[-1]["max_steps"]
        self._put(100.0 * step / max_steps, f"{self.stage}: step {step} of {max_steps}")
        log.debug("%s: step %d of %d%s", self.stage, step, max_steps, headline(self.stage, steps[-1]["metrics"]))

    def end(self) -> None:
        self._put(100.0, f"{self.stage}: done")

    def _put(self, percent: float, description: str) -> None:
        update_progress_artifact(artifact_id=self.artifact_id, progress=percent, description=description)


def headline(stage: str, metrics: dict[str, float]) -> str:
    """Return the stage's key metric for the end of a log line, or nothing."""
    return f"  {found}" if (found := key_metric(stage, metrics)) else ""


def dashed(name: str) -> str:
    return name.replace("_", "-")
