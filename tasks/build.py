"""Builds a stage's artifact once: a verified hit in the store, or one job whose result is committed whole."""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

from prefect import State
from prefect.artifacts import create_link_artifact, create_progress_artifact, update_progress_artifact
from prefect.states import Completed

from profiles.schema import StagePlacement
from tasks.artifacts import Artifact
from tasks.fingerprints import code_digest, fingerprint, library_versions
from tasks.job_spec import JobResult, JobSpec
from tasks.launch import job_python, launch
from tasks.monitoring import mlflow_runs
from tasks.monitoring.metrics import KEY_METRIC
from tasks.pipeline_run import PipelineRun, cached_record, recorded

log = logging.getLogger("posttrain")


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
        """Return everything that can change the stage's result, and nothing about where it runs.

        `judged_by` (drift corridors) stays outside: it can stop a run, but not change what a finished one left.
        """
        return {
            "stage": self.name,
            "recipe": self.config | {"seed": self.seed},
            "inputs": {name: artifact.digest for name, artifact in self.inputs.items()},
            "code": code_digest(self.module),
            "libraries": library_versions(job_python(placement)),
        }


def build(run: PipelineRun, stage: Stage, placement: StagePlacement) -> Artifact | State:
    """Return the stage's artifact: built now, or as a Prefect state named Cached when the store has it whole.

    Raises what `launch` raises; nothing of a failed build is left in the store.
    """
    identity = stage.identity(placement)
    key = fingerprint(identity)
    if (hit := run.store.find(stage.name, key)) is not None:
        return cached(run, stage.name, hit)
    log.info("%s: runs (log: %s)", stage.name, run.work(stage.name) / "log.txt")
    tags = {"stage": stage.name, "fingerprint": key, "run_id": run.run_id}
    with (
        recorded(run, stage.name, key) as record,
        run.store.staging(stage.name, key) as staged,
        mlflow_runs.stage_run(run.profile.name, stage.name, tags, run.mlflow_run_id) as mlflow_run_id,
    ):
        record.mlflow_run_id = mlflow_run_id
        start = time.monotonic()
        _log_inputs(mlflow_run_id, identity, stage)
        result = _run_job(run, stage, placement, staged, mlflow_run_id)
        mlflow_runs.log_scalars(mlflow_run_id, {f"final/{name}": value for name, value in result.metrics.items()})
        artifact = Artifact(
            stage.name, str(staged), key, "", result.metrics, result.details, mlflow_run_id, round(time.monotonic() - start, 2)
        )
        artifact = run.store.commit(staged, artifact, identity)
        record.artifact, record.metrics = artifact.path, artifact.metrics
    log.info("%s: done in %.0f s%s", stage.name, record.seconds, headline(stage.name, artifact.metrics))
    return artifact


def cached(run: PipelineRun, stage: str, hit: Artifact) -> State:
    """Return the Prefect state Cached with the artifact, and record the hit."""
    run.record(cached_record(stage, hit))
    log.info("%s: cached%s", stage, headline(stage, hit.metrics))
    return Completed(name="Cached", message=f"{stage}/{hit.fingerprint} verified", data=hit)


def headline(stage: str, metrics: dict[str, float]) -> str:
    """Return the stage's key metric as `  name value`, or nothing."""
    name = KEY_METRIC.get(stage)
    return f"  {name} {metrics[name]:.3g}" if name in metrics else ""


def _log_inputs(mlflow_run_id: str, identity: dict[str, Any], stage: Stage) -> None:
    mlflow_runs.log_params(mlflow_run_id, _flat(identity["recipe"]))
    mlflow_runs.log_dict(mlflow_run_id, identity, "identity.json")
    for name, artifact in stage.inputs.items():
        if artifact.stage == "dataset":
            mlflow_runs.log_dataset(mlflow_run_id, name, artifact.path, artifact.digest, stage.name)


def _run_job(run: PipelineRun, stage: Stage, placement: StagePlacement, staged: Path, mlflow_run_id: str) -> JobResult:
    spec = JobSpec(
        stage=stage.name, module=stage.module, seed=stage.seed, config=stage.config, drift=stage.judged_by,
        inputs={name: artifact.path for name, artifact in stage.inputs.items()},
        output=staged, work=run.work(stage.name),
    )  # fmt: skip
    progress = Progress(stage.name)

    def on_metrics(lines: list[dict[str, Any]]) -> None:
        mlflow_runs.log_points(mlflow_run_id, lines)
        progress.show(lines)

    link = mlflow_runs.run_url(mlflow_run_id)
    create_link_artifact(link=link, link_text=f"{stage.name} in MLflow", key=f"mlflow-{_dashed(stage.name)}")
    result = launch(spec, placement, on_metrics)
    progress.end()
    return result


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
