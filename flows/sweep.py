"""Speaks for runs that died too hard to speak for themselves: SIGKILL, power, a lost node leave them Running everywhere."""

import fcntl
import json
import logging
import socket
from pathlib import Path
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Crashed, State

from flows.approval import UNANSWERED
from flows.reporting import summarise
from tasks.environment import home
from tasks.errors import GateFailed, PipelineError, RunCancelled, RunDied
from tasks.guard import MARKER, kill_marked
from tasks.monitoring import mlflow_runs
from tasks.pipeline_run import CLOSED, PROCESS, WAITING, is_alive, others_starting, run_of, write_json

log = logging.getLogger("posttrain")


@flow(name="sweep", persist_result=False)
def sweep() -> list[str]:
    """End what is left of dead runs and say everywhere that they died; returns a line per run."""
    return sweep_runs()


def sweep_runs() -> list[str]:
    """Sweep this home folder, one sweep at a time; returns a line per run that was found dead."""
    home().mkdir(parents=True, exist_ok=True)
    with (home() / ".sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        swept = [line for path in sorted(home().glob(f"*/*/{PROCESS}")) if (line := _try_sweep(path)) is not None]
        return swept + (_sweep_unopened() if not PREFECT_API_URL.value() else [])


def _sweep_unopened() -> list[str]:
    """End, on the embedded server, what died between its start and its folder; elsewhere missed heartbeats tell."""
    if others_starting():
        return []
    known = {json.loads(path.read_text())["flow_run_id"] for path in home().glob(f"*/*/{PROCESS}")} | {flow_run.id}
    unfinished = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_filter=FlowFilter(name={"any_": ["post-training"]}),
            flow_run_filter=FlowRunFilter(state={"type": {"any_": unfinished}}),
        )
        dead = [run for run in found if str(run.id) not in known]
        for run in dead:
            client.set_flow_run_state(run.id, Crashed(message="its process died before it opened a run"), force=True)
    return [f"{run.name}: its process died before it opened a run" for run in dead]


def _try_sweep(path: Path) -> str | None:
    """Sweep one run; what cannot be swept must not keep others from running."""
    try:
        return _sweep_run(path)
    except Exception as error:  # another version's files, a tracker of long ago, a server that is away
        log.warning("%s cannot be swept: %s: %s", path.parent, type(error).__name__, error)
        return None


def _sweep_run(path: Path) -> str | None:
    folder = path.parent
    if (folder / CLOSED).is_file():
        return None
    process = json.loads(path.read_text())
    state = _state(process["flow_run_id"])
    here = process["host"] == socket.gethostname()
    if here and is_alive(process):
        return None
    suspended = (folder / WAITING).is_file()
    if (suspended or not here) and (state is None or not state.is_final()):
        return None  # it waits for a person, or it is another machine's, and nothing says that it is dead
    if left := kill_marked(MARKER, str(folder)):
        log.warning("%s: processes %s of it cannot be killed; swept again next time", folder, left)
        return None
    gone = f"process {process['pid']} on {process['host']} is gone"
    why = gone if here and not suspended else f"Prefect says {state.name}: {state.message}"
    cancelled = state is not None and state.type in (StateType.CANCELLED, StateType.CANCELLING)
    unanswered = suspended and state.type == StateType.FAILED
    error: PipelineError = RunCancelled(why) if cancelled else GateFailed(UNANSWERED) if unanswered else RunDied(why)
    if state is not None and not state.is_final():
        ended = Cancelled(message=why) if cancelled else Crashed(message=why)
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(process["flow_run_id"]), ended, force=True)
    _close(folder, error)
    log.warning("%s/%s died: %s", folder.parent.name, folder.name, why)
    return f"{folder.parent.name}/{folder.name}: {why}"


def _close(folder: Path, error: PipelineError) -> None:
    """Close the run and its stages in MLflow, and write the summary that the run could not."""
    run = run_of(folder)
    mlflow_runs.close_family(run.mlflow_run_id, error)
    if (folder / WAITING).is_file() or not (folder / "summary.json").is_file():
        write_json(folder / "summary.json", summarise(run, error))
    (folder / CLOSED).touch()


def _state(flow_run_id: str) -> State | None:
    """Return the run's state, or None if this server never heard of it."""
    try:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(UUID(flow_run_id)).state
    except ObjectNotFound:
        return None
