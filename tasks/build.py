"""Builds a stage's artifact once: a verified hit in the store, or one job whose result is committed whole."""

import dataclasses
import logging
import time
from typing import Any

from prefect import State
from prefect.artifacts import create_link_artifact, create_progress_artifact, update_progress_artifact
from prefect.states import Completed

from profiles.schema import StagePlacement
from tasks.artifacts import Artifact
from tasks.environment import home
from tasks.fingerprints import code_digest, fingerprint, library_versions
from tasks.job_order import JobOrder
from tasks.launch import launch, slot
from tasks.local_job import ONE_PROCESS, job_python, num_processes
from tasks.monitoring import mlflow_runs
from tasks.monitoring.metrics import key_metric
from tasks.pipeline_run import PipelineRun, cached_record, recorded

log = logging.getLogger("posttrain")
RETRY_SECONDS = 15


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage is: its name, the job module that runs it, its part of the recipe and the artifacts it reads."""

    name: str
    module: str
    config: dict[str, Any]
    inputs: dict[str, Artifact]
    seed: int
    judged_by: dict[str, Any] = dataclasses.field(default_factory=dict)

    def identity(self, placement: StagePlacement) -> dict[str, Any]:
        """Return everything that can change the stage's result, and nothing else about where it runs.

        `judged_by` (drift corridors) stays outside: it can stop a run, but not change what a finished one left.
        """
        return {
            "stage": self.name,
            "recipe": self.config | {"seed": self.seed},
            "inputs": {name: artifact.digest for name, artifact in self.inputs.items()},
            "code": code_digest(self.module),
            "libraries": library_versions(job_python(placement)),
            "num_processes": 1 if self.name in ONE_PROCESS else num_processes(placement),
        }


def build(run: PipelineRun, stage: Stage, placement: StagePlacement) -> Artifact | State:
    """Return the stage's artifact: built now, or as a Prefect state named Cached when the store has it whole.

    Raises what `launch` raises; nothing of a failed build is left in the store.
    """
    identity = stage.identity(placement)
    key = fingerprint(identity)
    if (hit := run.store.find(stage.name, key)) is not None:
        return cached(run, stage.name, hit)
    tags = {"stage": stage.name, "fingerprint": key, "run_id": run.run_id}
    with (
        slot(placement),
        recorded(run, stage.name, key) as record,
        mlflow_runs.stage_run(run.profile.name, stage.name, tags, run.mlflow_run_id) as mlflow_run_id,
    ):
        log.info("%s: runs (log: %s)", stage.name, run.work(stage.name) / "log.txt")
        record.mlflow_run_id = mlflow_run_id
        _log_inputs(mlflow_run_id, identity, stage)
        order = JobOrder(
            stage=stage.name, module=stage.module, seed=stage.seed, config=stage.config, drift=stage.judged_by,
            identity=identity, fingerprint=key, placement=placement, store_id=run.store.id(), mlflow_run_id=mlflow_run_id,
            work=run.work(stage.name).relative_to(home()).as_posix(),
        )  # fmt: skip
        artifact = _follow_job(run, order, stage.inputs)
        record.artifact, record.metrics = artifact.path, artifact.metrics
    log.info("%s: done in %.0f s%s", stage.name, record.seconds, headline(stage.name, artifact.metrics))
    return artifact


def cached(run: PipelineRun, stage: str, hit: Artifact) -> State:
    """Return the Prefect state Cached with the artifact, and record the hit."""
    run.record(cached_record(stage, hit))
    log.info("%s: cached%s", stage, headline(stage, hit.metrics))
    return Completed(name="Cached", message=f"{stage}/{hit.fingerprint} verified", data=hit)


def headline(stage: str, metrics: dict[str, float]) -> str:
    """Return the stage's key metric for the end of a log line, or nothing."""
    return f"  {found}" if (found := key_metric(stage, metrics)) else ""


def _log_inputs(mlflow_run_id: str, identity: dict[str, Any], stage: Stage) -> None:
    mlflow_runs.log_params(mlflow_run_id, _flat(identity["recipe"]))
    mlflow_runs.log_dict(mlflow_run_id, identity, "identity.json")
    for name, artifact in stage.inputs.items():
        if artifact.stage == "dataset":
            mlflow_runs.log_dataset(mlflow_run_id, name, artifact.path, artifact.digest, stage.name)


def _follow_job(run: PipelineRun, order: JobOrder, inputs: dict[str, Artifact]) -> Artifact:
    """Launch the job, with its curves in MLflow and its progress on the run's page."""
    link = mlflow_runs.run_url(order.mlflow_run_id)
    create_link_artifact(link=link, link_text=f"{order.stage} in MLflow", key=f"mlflow-{_dashed(order.stage)}")
    listener = Listener(order.stage, order.mlflow_run_id)
    artifact = launch(order, inputs, run.store, listener.hear, run.stop)
    listener.end()
    if dropped := artifact.metrics.get("data/dropped_rows"):
        log.warning(
            "%s: TRL left out %d rows: after truncation nothing of their replies was left to train on", order.stage, dropped
        )
    # what the trainer logged is a curve already; a bar of its end beside it would only crowd the page
    scalars = {name: v for name, v in artifact.metrics.items() if name not in listener.curves}
    mlflow_runs.log_scalars(order.mlflow_run_id, scalars)
    return artifact


class Listener:
    """Passes a job's metrics on to MLflow and Prefect; a server that is down costs the job nothing, and no line is lost."""

    def __init__(self, stage: str, mlflow_run_id: str):
        self.mlflow_run_id = mlflow_run_id
        self.progress = Progress(stage)
        self.waiting: list[dict[str, Any]] = []
        self.curves: set[str] = set()
        self.retry_at = 0.0

    def hear(self, lines: list[dict[str, Any]]) -> None:
        self.waiting += lines
        self.curves.update(name for line in lines for name in line["metrics"])
        if time.monotonic() < self.retry_at:
            return
        try:
            mlflow_runs.log_points(self.mlflow_run_id, self.waiting)
            self.waiting = []
            self.progress.show(lines)
        except Exception as error:  # whatever a server's failure is called, it must not end hours of training
            log.warning("metrics wait for their server: %s: %s", type(error).__name__, error)
            self.retry_at = time.monotonic() + RETRY_SECONDS

    def end(self) -> None:
        """Hand over what still waits; now that the job is done, a server that is still down is an error."""
        mlflow_runs.log_points(self.mlflow_run_id, self.waiting)
        self.progress.end()


class Progress:
    """A stage's progress artifact on the Prefect run page, and the same as log records for the terminal."""

    def __init__(self, stage: str):
        self.stage = stage
        self.artifact_id = create_progress_artifact(progress=0.0, key=f"progress-{_dashed(stage)}", description=stage)
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


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level with dotted keys: MLflow compares runs by them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
