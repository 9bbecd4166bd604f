"""MLflow: one parent run per pipeline run, one child per stage that really ran, opened and closed by the Prefect side.

The job writes its metrics to a file; this side replays them in batches. So no training step ever waits for the tracker,
only one process writes, and a killed job cannot leave a run that says FINISHED or RUNNING. The only import of mlflow.
"""

import fcntl
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tasks.environment import home
from tasks.errors import MachineUnfit, PipelineError, RunCancelled
from tasks.interrupts import interrupts, suspension
from tasks.monitoring.drift import add_point

log = logging.getLogger("posttrain")
BATCH = 1000  # MLflow's own limit per call
LOCAL_UI = "http://127.0.0.1:5000"
TRAINING_PAGES = "custom_model_development"  # else MLflow opens the experiment on its pages for traces and prompts
FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"


def tracking_uri() -> str:
    """Return the user's MLFLOW_TRACKING_URI, else SQLite under the home folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / '.mlflow' / 'mlflow.db'}"


def artifact_root() -> Path:
    return home() / ".mlflow" / "artifacts"


def run_url(run_id: str) -> str:
    """Return a run's page: on the tracking server, else where `posttrain ui` serves the local database by default."""
    return f"{pages()}/#/experiments/{client().get_run(run_id).info.experiment_id}/runs/{run_id}"


def pages() -> str:
    """Return where MLflow's pages are."""
    uri = tracking_uri()
    return uri if uri.startswith("http") else LOCAL_UI


def client():
    """Return the client of the tracker and its model registry; a local database is made first if there is none."""
    return _client(tracking_uri())


@cache
def _client(uri: str):
    from mlflow import MlflowClient

    if not uri.startswith("sqlite:///"):
        return MlflowClient(uri)
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    for chatty in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Two processes that create the same fresh database at once corrupt it for good (mlflow/mlflow#19299).
    with (database.parent / ".create.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():
            _create(database)
        local = MlflowClient(uri)
        local.search_experiments(max_results=1)
    return local


def _create(database: Path) -> None:
    """Create the tables in a file beside it, then rename: a process that dies among MLflow's migrations leaves no database."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for leftover in database.parent.glob(f".{database.name}.*"):
        leftover.unlink()
    beside = database.with_name(f".{database.name}.{os.getpid()}")
    SqlAlchemyStore(f"sqlite:///{beside}", artifact_root().as_uri()).engine.dispose()
    beside.rename(database)


def prepare_database() -> None:
    """Create the local database if there is none yet."""
    client()


def _experiment(name: str) -> str:
    tracker = client()
    found = tracker.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":  # in MLflow's pages; its name stays taken
            tracker.restore_experiment(found.experiment_id)
        return found.experiment_id
    local = tracking_uri().startswith("sqlite:///")
    location = (artifact_root() / name).as_uri() if local else None
    return tracker.create_experiment(name, artifact_location=location, tags={"mlflow.experimentKind": TRAINING_PAGES})


def open_run(experiment: str, name: str, tags: dict[str, str], parent: str | None = None) -> str:
    """Open a run, as a child of `parent` if given, and return its id."""
    from mlflow.exceptions import MlflowException

    nested = {"mlflow.parentRunId": parent} if parent else {}
    own = {"mlflow.user": "posttrain", "mlflow.source.name": "posttrain"}
    try:
        return client().create_run(_experiment(experiment), run_name=name, tags={**own, **tags, **nested}).info.run_id
    except MlflowException as error:
        raise MachineUnfit(
            f"MLflow at {tracking_uri()} does not take a run: {error}. Start it; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD if it asks who you are; or unset MLFLOW_TRACKING_URI."
        ) from error


@contextmanager
def stage_run(experiment: str, name: str, tags: dict[str, str], parent: str) -> Iterator[str]:
    """Open a stage's run, and close it with what really happened."""
    run_id = open_run(experiment, name, tags, parent)
    with closing(run_id):
        yield run_id


@contextmanager
def closing(run_id: str) -> Iterator[None]:
    """Close a run with what really happened in the block: FINISHED, FAILED, or KILLED when cancelled; not if it goes on."""
    try:
        yield
    except suspension():
        raise
    except BaseException as error:
        close(run_id, error)
        raise
    client().set_terminated(run_id, FINISHED)


def close(run_id: str, error: BaseException) -> None:
    """Close a run with what an error means."""
    status, tags = verdict(error)
    set_tags(run_id, tags)
    client().set_terminated(run_id, status)


def close_family(run_id: str, error: BaseException) -> None:
    """Close a run that died, and those of its stages that still say RUNNING."""
    experiment = client().get_run(run_id).info.experiment_id
    stages = client().search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    for stage in (run for run in stages if run.info.status == "RUNNING"):
        close(stage.info.run_id, error)
    close(run_id, error)


def verdict(error: BaseException) -> tuple[str, dict[str, str]]:
    """Return the MLflow status and tags that an error means."""
    name = type(error).__name__
    tags = {"error": name, "error.message": clean(error)[:5000]}
    if isinstance(error, (RunCancelled, *interrupts())):
        return KILLED, tags
    if name == "GateFailed":
        return FINISHED, tags | {"gate": "inconclusive" if error.inconclusive else "failed"}
    if name == "DriftHalted":
        return FAILED, tags | {"drift.halted": "true"}
    return FAILED, tags if isinstance(error, PipelineError) else tags | {"bug": "true"}


def log_points(run_id: str, lines: Iterable[dict[str, Any]]) -> None:
    """Log metric lines `{"step", "time", "metrics"}` under their own names, in as few calls as MLflow takes."""
    from mlflow.entities import Metric

    points = [
        Metric(key, float(value), int(line["time"] * 1000), line["step"])
        for line in lines
        for key, value in line["metrics"].items()
        if isinstance(value, int | float) and not math.isinf(value)
    ]
    for start in range(0, len(points), BATCH):
        client().log_batch(run_id, metrics=points[start : start + BATCH])


def log_scalars(run_id: str, metrics: dict[str, float]) -> None:
    log_points(run_id, [{"step": 0, "time": time.time(), "metrics": metrics}])


def log_params(run_id: str, params: dict[str, Any]) -> None:
    """Log settings once, each cut to MLflow's 6,000 characters."""
    from mlflow.entities import Param

    entities = [Param(key, clean(value)[:6000]) for key, value in params.items()]
    for start in range(0, len(entities), 100):
        client().log_batch(run_id, params=entities[start : start + 100])


def set_tags(run_id: str, tags: dict[str, Any]) -> None:
    for key, value in tags.items():
        client().set_tag(run_id, key, clean(value)[:8000])


def log_dict(run_id: str, content: Any, name: str) -> None:
    client().log_dict(run_id, content, name)


def log_file(run_id: str, path: Path) -> None:
    client().log_artifact(run_id, str(path))


def log_folder(run_id: str, folder: Path) -> None:
    """Log every file of a folder as an artifact of the run."""
    client().log_artifacts(run_id, str(folder))


def log_dataset(run_id: str, name: str, path: str, digest: str, kind: str) -> None:
    """Link a dataset to a run under our own digest: MLflow's is the same for any conversational data."""
    from mlflow.data.filesystem_dataset_source import FileSystemDatasetSource  # noqa: F401  (registers the resolver)
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = '{"uri": "file://' + path + '"}'
    entity = Dataset(name=name, digest=digest[:36], source_type="local", source=source)
    client().log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", kind)])])


def history(run_id: str, key: str) -> list[tuple[int, float]]:
    """Return a metric's (step, value) pairs in order; what a restart did again takes the place of what it did before."""
    points: list[tuple[int, float]] = []
    for metric in sorted(client().get_metric_history(run_id, key), key=lambda metric: (metric.timestamp, metric.step)):
        add_point(points, metric.step, metric.value)
    return points


def histories(run_id: str, keys: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Return the series of those metrics that the run logged; nothing if the tracker does not have the run any more."""
    from mlflow.exceptions import MlflowException

    try:
        logged = client().get_run(run_id).data.metrics
    except MlflowException:
        return {}
    return {key: history(run_id, key) for key in keys if key in logged}


def accepted_runs(experiment: str, but: str) -> list[dict[str, Any]]:
    """Return what `pipeline_runs` does of a profile's accepted runs whose policy is another than `but`, the newest first."""
    return pipeline_runs(experiment, f"tags.accepted = 'true' and tags.`policy.fingerprint` != '{but}'", 1000)


def pipeline_runs(experiment: str, condition: str, limit: int) -> list[dict[str, Any]]:
    """Return `{"run_id", "started", "status", "tags", "metrics"}` of a profile's pipeline runs, the newest first."""
    found = client().get_experiment_by_name(experiment)
    if found is None:
        return []
    runs = client().search_runs([found.experiment_id], condition, max_results=limit, order_by=["attributes.start_time DESC"])
    return [
        {
            "run_id": run.info.run_id,
            "started": run.info.start_time / 1000,
            "status": run.info.status,
            "tags": run.data.tags,
            "metrics": run.data.metrics,
        }
        for run in runs
    ]


def clean(value: Any) -> str:
    """Return text that every MLflow backend takes: no NUL, no lone surrogates."""
    return str(value).replace("\x00", "\\0").encode("utf-8", "replace").decode()
