"""Builds a stage's artifact once: a verified hit in the store, or one job whose result is committed whole."""

import dataclasses
import logging
from typing import Any

from prefect import State
from prefect.states import Completed

from profiles.schema import StagePlacement
from tasks.artifacts import Artifact
from tasks.attempts import cause_of, failed_attempts, pause, smaller_batches
from tasks.environment import home
from tasks.errors import BudgetExceeded, DriftHalted
from tasks.failures import TIMEOUT
from tasks.fingerprints import code_digest, fingerprint, library_versions
from tasks.follow_job import follow_job, headline, notes_of
from tasks.job_order import JobOrder
from tasks.launch import slot
from tasks.lease import lease
from tasks.ledger import refuse_next, seconds_left, spent
from tasks.local_job import ONE_PROCESS, job_python, num_processes, uses_cpu
from tasks.monitoring import mlflow_runs
from tasks.monitoring.drift import ALWAYS, HALT, replay
from tasks.pipeline_run import PipelineRun, recorded, write_json

log = logging.getLogger("posttrain")


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage is: its name, the job module that runs it, its part of the recipe and the artifacts it reads.

    `judged_by` is the drift block and `judged_on` what it reads; they are part of what the stage is only where a halt leaves
    another result (`judge_changes`), for otherwise it leaves none.
    """

    name: str
    module: str
    config: dict[str, Any]
    inputs: dict[str, Artifact]
    seed: int
    judged_by: dict[str, Any] = dataclasses.field(default_factory=dict)
    judged_on: dict[str, Artifact] = dataclasses.field(default_factory=dict)
    judge_changes: bool = False

    def identity(self, placement: StagePlacement) -> dict[str, Any]:
        """Return everything that can change the stage's result, and nothing else about where it runs."""
        inputs, judged = self.inputs, {}
        if self.judge_changes:
            inputs, judged = inputs | self.judged_on, {"drift": self.judged_by}
        return {
            "stage": self.name,
            "recipe": self.config | {"seed": self.seed} | judged,
            "inputs": {name: artifact.digest for name, artifact in inputs.items()},
            "code": code_digest(self.module),
            "libraries": library_versions(job_python(placement)),
            "num_processes": 1 if self.name in ONE_PROCESS else num_processes(placement),
        }


def build(run: PipelineRun, stage: Stage, placement: StagePlacement) -> Artifact | State:
    """Return the stage's artifact: built now, or as a Prefect state named Cached when the store has it whole.

    While another run builds the same one, this waits for it. Raises what `launch` raises, BudgetExceeded, and RunCancelled if
    the run is stopped meanwhile; nothing of a failed build is left in the store.
    """
    failed = failed_attempts(run, stage.name)
    pause(run, stage.name, failed, placement)
    identity = stage.identity(placement)
    key = fingerprint(identity)
    if (hit := run.store.find(stage.name, key)) is not None:
        return cached(run, stage.name, hit, stage.judged_by)
    with lease(run.store.root, stage.name, key, run.run_id, run.stop), slot(placement):
        if (hit := run.store.find(stage.name, key)) is not None:
            return cached(run, stage.name, hit, stage.judged_by)
        refuse_next(run, stage.name)
        artifact = build_now(run, stage, placement, identity, smaller_batches(stage.config, failed))
    return artifact


def build_now(
    run: PipelineRun, stage: Stage, placement: StagePlacement, identity: dict[str, Any], config: dict[str, Any]
) -> Artifact:
    """Launch the stage's job, with a run of its own in MLflow, and record what became of it and what it cost."""
    key, within = fingerprint(identity), within_budget(run, placement)
    tags = {"stage": stage.name, "fingerprint": key, "run_id": run.run_id}
    with (
        recorded(run, stage.name, key) as record,
        mlflow_runs.stage_run(run.profile.name, stage.name, tags, run.mlflow_run_id) as mlflow_run_id,
    ):
        log.info("%s: runs (log: %s)", stage.name, run.work(stage.name) / "log.txt")
        record.mlflow_run_id = mlflow_run_id
        write_json(run.work(stage.name) / "identity.json", identity)  # `why` reads it where nothing came of the build
        _log_inputs(mlflow_run_id, identity, stage)
        order = JobOrder(
            stage=stage.name, module=stage.module, seed=stage.seed, config=config, drift=stage.judged_by,
            digests={name: artifact.digest for name, artifact in (stage.inputs | stage.judged_on).items()},
            made_of={name: artifact.source for name, artifact in stage.inputs.items()},
            identity=identity, fingerprint=key, placement=within, store_id=run.store.id(), mlflow_run_id=mlflow_run_id,
            work=run.work(stage.name).relative_to(home()).as_posix(),
        )  # fmt: skip
        try:
            artifact = follow_job(run, order, stage.inputs | stage.judged_on)
        except Exception as error:
            record.cause = cause_of(error)
            if record.cause == TIMEOUT and within != placement:
                raise BudgetExceeded(f"budget.gpu_hours is used up, and {stage.name} was ended. {error}") from error
            raise
        finally:
            record.cost = spent(run.work(stage.name))
        record.artifact, record.metrics, record.notes = artifact.path, artifact.metrics, notes_of(artifact)
    log.info("%s: done in %.0f s%s", stage.name, record.seconds, headline(stage.name, artifact.metrics))
    return artifact


def within_budget(run: PipelineRun, placement: StagePlacement) -> StagePlacement:
    """Return the placement with the time limit that the budget leaves, where that is the shorter one."""
    left = seconds_left(run, 0 if uses_cpu(placement) else num_processes(placement))
    if left is None or left >= placement.timeout_seconds:
        return placement
    return placement.model_copy(update={"timeout_seconds": max(1, int(left))})


def judge_again(stage: str, hit: Artifact, drift: dict[str, Any]) -> None:
    """Judge a stored stage's curves by the corridors as they are now, if others judged it when it ran; raises DriftHalted."""
    if not drift or hit.details.get("judged_by") == fingerprint(drift):
        return
    names = {*ALWAYS, *drift["signals"], "canary/reward"}
    series = mlflow_runs.histories(hit.mlflow_run_id, sorted(names)) if hit.mlflow_run_id else {}
    if not series:
        log.warning("%s: its curves are not in MLflow any more, so the changed drift settings do not judge it", stage)
    halts = [finding for finding in replay(series, drift) if finding.severity == HALT]
    if halts:
        raise DriftHalted(
            f"{stage} is in the store, but by the drift settings as they are now it would have been halted: {halts[0]} "
            "Widen that corridor, or change the recipe."
        )


def cached(run: PipelineRun, stage: str, hit: Artifact, drift: dict[str, Any] | None = None) -> State:
    """Return the Prefect state Cached with the artifact, and record the hit; raises DriftHalted if `drift` condemns it now."""
    with recorded(run, stage, hit.fingerprint) as record:
        judge_again(stage, hit, drift or {})
        record.status, record.artifact, record.mlflow_run_id = "cached", hit.path, hit.mlflow_run_id
        record.metrics, record.notes = hit.metrics, notes_of(hit)
    log.info("%s: cached%s", stage, headline(stage, hit.metrics))
    return Completed(name="Cached", message=f"{stage}/{hit.fingerprint} verified", data=hit)


def _log_inputs(mlflow_run_id: str, identity: dict[str, Any], stage: Stage) -> None:
    mlflow_runs.log_params(mlflow_run_id, _flat(identity["recipe"]))
    mlflow_runs.log_dict(mlflow_run_id, identity, "identity.json")
    for name, artifact in stage.inputs.items():
        if artifact.stage == "dataset":
            mlflow_runs.log_dataset(mlflow_run_id, name, artifact.path, artifact.digest, stage.name)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level with dotted keys: MLflow compares runs by them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
