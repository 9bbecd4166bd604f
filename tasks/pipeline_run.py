"""One run of the pipeline: where its files are, and what each of its stages came to."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from profiles.schema import Profile
from tasks.artifacts import Store, disk_errors
from tasks.environment import home
from tasks.monitoring import mlflow_runs
from tasks.remote_store import RemoteStore

log = logging.getLogger("posttrain")
CLOCK_SLACK = timedelta(minutes=1)
PROCESS = "process.json"
CLOSED = "closed"  # the last thing a run writes; without it, a run whose process is gone is swept
STARTING = ".starting"
WAITING = "waiting"  # the run was suspended for an approval: it has no process, and is not dead


@dataclass
class StageRecord:
    """One row of the summary: what became of a stage in this run."""

    stage: str
    status: Literal["ran", "cached", "failed", "skipped"]
    fingerprint: str | None = None
    seconds: float = 0.0
    artifact: str | None = None
    mlflow_run_id: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    cause: str | None = None
    cost: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PipelineRun:
    """A run's identity, its folder `<home>/<profile>/<run-id>`, and its parent run in MLflow."""

    profile: Profile
    run_id: str
    folder: Path
    mlflow_run_id: str
    flow_run_id: str
    stop: threading.Event = field(default_factory=threading.Event)  # ends every job of the run, in whatever thread it is

    @property
    def store(self) -> Store:
        return store()

    @property
    def was_suspended(self) -> bool:
        """Tell whether all stages are done, and the run has been waiting for a person since."""
        return (self.folder / WAITING).is_file()

    def work(self, stage: str) -> Path:
        """Return the folder of a stage's log, metrics and checkpoints, made empty by its first caller."""
        folder = self.folder / stage
        with disk_errors(self.folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def record(self, record: StageRecord) -> None:
        """Keep what became of a stage on disk, so that any process of the run can add to the summary.

        Files are numbered, not timed: of two attempts the later one counts, also where the clock was set back between them.
        """
        done = self.folder / "stages"
        with disk_errors(self.folder):
            done.mkdir(exist_ok=True)
            number = 1 + max((int(path.name.split("-")[0]) for path in done.glob("*.json")), default=0)
            write_json(done / f"{number:04}-{record.stage}.json", asdict(record))

    def records(self) -> list[StageRecord]:
        """Return the stages so far, in the order in which they ended."""
        return [StageRecord(**json.loads(path.read_text())) for path in sorted((self.folder / "stages").glob("*.json"))]


def store() -> Store:
    """Return the store of all runs; POSTTRAIN_STORE names the part of it that machines without a common disk share."""
    url = os.environ.get("POSTTRAIN_STORE")
    return Store(home() / ".store", RemoteStore(url) if url else None)


def open_pipeline_run(profile: Profile, flow_run_id: str) -> PipelineRun:
    """Make the run's folder, named by the time so that folders sort, and its parent run in MLflow."""
    run_id = f"{_after_all_others(profile.name):%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"
    mlflow_run_id = mlflow_runs.open_run(profile.name, run_id, {"run_id": run_id, "profile": profile.name})
    folder = home() / profile.name / run_id
    run = PipelineRun(profile, run_id, folder, mlflow_run_id, flow_run_id)
    with disk_errors(folder):
        folder.mkdir(parents=True)
        write_json(folder / "profile.json", profile.model_dump(mode="json"))
        _claim(run)
    return run


def _after_all_others(profile: str) -> datetime:
    """Return the time, or the second after the newest run's where the clock was set back: the newest is what is served."""
    now, newest = datetime.now(UTC).replace(microsecond=0), datetime.min.replace(tzinfo=UTC)
    for folder in (home() / profile).glob(f"*/{PROCESS}"):
        with contextlib.suppress(ValueError):
            newest = max(newest, datetime.strptime(folder.parent.name[:15], "%Y%m%d-%H%M%S").replace(tzinfo=UTC))
    if newest < now:
        return now
    if newest - now > CLOCK_SLACK:
        log.warning("the clock says %s, and the newest run of %s is of %s: this one is named after it", now, profile, newest)
    return newest + timedelta(seconds=1)


def suspended_run(flow_run_id: str) -> PipelineRun | None:
    """Return the run that was suspended under this Prefect run, now this process's; None if there is none.

    Its profile is the one that it ran with: the file may have changed while it waited.
    """
    for waiting in home().glob(f"*/*/{WAITING}"):
        folder = waiting.parent
        process = json.loads((folder / PROCESS).read_text())
        if process["flow_run_id"] == flow_run_id and not (folder / CLOSED).is_file():
            run = run_of(folder)
            _claim(run)
            return run
    return None


def run_of(folder: Path) -> PipelineRun:
    """Return the run that a folder is of, from what it wrote when it was opened."""
    process = json.loads((folder / PROCESS).read_text())
    profile = Profile.model_validate_json((folder / "profile.json").read_text())
    return PipelineRun(profile, folder.name, folder, process["mlflow_run_id"], process["flow_run_id"])


@contextmanager
def starting() -> Iterator[None]:
    """Say that this process is about to open a run, of which Prefect may know before there is a folder."""
    file = home() / STARTING / f"{os.getpid()}.json"
    with disk_errors(home()):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, _myself())
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def others_starting() -> bool:
    """Tell whether another living process is about to open a run; what dead ones left is removed."""
    opened = [json.loads(path.read_text()) for path in home().glob(f"*/*/{PROCESS}")]
    found = False
    for file in (home() / STARTING).glob("[!.]*.json"):
        process = json.loads(file.read_text())
        if process["host"] == socket.gethostname() and not is_alive(process):
            file.unlink(missing_ok=True)
        elif process != _myself() and not any(process.items() <= run.items() for run in opened):
            found = True
    return found


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}


def _claim(run: PipelineRun) -> None:
    """Say that this very process is the run's: while it lives, the run is not dead."""
    process = _myself()
    ids = {"flow_run_id": run.flow_run_id, "mlflow_run_id": run.mlflow_run_id}
    write_json(run.folder / PROCESS, process | ids)


def is_alive(process: dict[str, Any]) -> bool:
    """Tell whether the process that a run's process.json names is still there, and not another one with its number."""
    return _born(process["pid"]) == process["born"]


def _born(pid: int) -> str | None:
    """Return the moment of a process's start, in clock ticks since boot, with the boot's id; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if fields[0] in "ZX" else f"{fields[19]} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    except OSError:
        return None


@contextmanager
def recorded(run: PipelineRun, stage: str, key: str) -> Iterator[StageRecord]:
    """Record a stage as what really became of it: the record of a block that raises says failed, and why."""
    record = StageRecord(stage, "ran", key)
    start = time.monotonic()
    try:
        yield record
    except BaseException as error:
        record.status, record.reason = "failed", f"{type(error).__name__}: {error}"
        raise
    finally:
        record.seconds = 0.0 if record.status == "cached" else round(time.monotonic() - start, 2)
        run.record(record)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that no reader ever sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def last_manifests(profile: str, stage: str, folder: str) -> Iterator[dict[str, Any]]:
    """Yield the manifest of what each run of a profile had for a stage, of those still in the store, the newest run first."""
    for path in sorted((home() / profile).glob(f"*/stages/*-{stage}.json"), reverse=True):
        record = json.loads(path.read_text())
        if record["stage"] == stage and (manifest := store().manifest(folder, record["fingerprint"])):
            yield manifest
