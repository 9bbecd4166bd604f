"""Runs one job where it was placed: the only flow that GPU pools know."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import State, flow
from prefect.runtime import flow_run
from prefect.states import Cancelled

from tasks.artifacts import Store
from tasks.errors import JobFailed, MachineUnfit, PipelineError, RunCancelled
from tasks.failures import BUG, PREEMPTED
from tasks.fingerprints import code_digest, library_versions
from tasks.guard import USAGE
from tasks.interrupts import interrupts
from tasks.job_order import JobOrder
from tasks.launch import build_here, work_folder
from tasks.local_job import Metrics, job_python
from tasks.pipeline_run import store, write_json
from tasks.pools import OUTCOME
from tasks.watch import called_off, watched

MIRROR_SECONDS = {"metrics.jsonl": 2.0, "log.txt": 20.0}
log = logging.getLogger("posttrain")


@flow(name="accelerate-job", persist_result=False)
def accelerate_job(order: dict[str, Any]) -> State | None:
    """Build what a pipeline run ordered, and leave the outcome beside the job's log.

    Args:
        order: a JobOrder; a pipeline run fills it in

    Raises what stopped the job; the run that ordered it raises the same.
    """
    wanted = JobOrder.model_validate(order)
    here, work = store(), work_folder(wanted)
    mirror = Mirror(here, wanted)
    outcome: dict[str, Any] = {"error": "JobFailed", "message": "a bug: the log of its run has the traceback", "cause": BUG}
    try:
        with ended_by_name(wanted.stage):
            refuse_other_machine(wanted, here)
            inputs = {name: here.resolve(ref, wanted.digests[name]) for name, ref in wanted.inputs.items()}
            with watched(flow_run.id, flow_run.parent_flow_run_id) as stop:
                build_here(wanted, inputs, here, mirror.hear, stop)
        outcome = {"error": None}
    except PipelineError as error:
        outcome = {"error": type(error).__name__, "message": str(error), "cause": getattr(error, "cause", BUG)}
        if isinstance(error, RunCancelled):
            return Cancelled(message=str(error))
        raise
    finally:
        write_json(work / OUTCOME, outcome)
        mirror.finish()
    return None


@contextmanager
def ended_by_name(stage: str) -> Iterator[None]:
    """Raise RunCancelled where someone cancelled the job or its run, JobFailed where the worker was stopped under it."""
    try:
        yield
    except (RunCancelled, *interrupts()) as error:
        if called_off(flow_run.id, flow_run.parent_flow_run_id):
            raise RunCancelled(str(error) or f"{stage} was cancelled") from None
        raise JobFailed(
            f"{stage} was ended because its worker was stopped. The next attempt goes on from its checkpoint.", PREEMPTED
        ) from None


def refuse_other_machine(order: JobOrder, here: Store) -> None:
    """Raise MachineUnfit if what is built here would not be what was ordered: another store, other code, other libraries."""
    if here.id() != order.store_id:
        raise MachineUnfit(
            f"this worker's store is {here.remote.url if here.remote else here.root}, the ordering run's is another "
            f"({order.store_id}). Give both the same POSTTRAIN_STORE, or the same POSTTRAIN_HOME on a common disk."
        )
    if code_digest(order.module) != order.identity["code"]:
        raise MachineUnfit(
            f"{order.module} on this worker is not the code of the ordering run: deploy the same commit to both."
        )
    python = job_python(order.placement)
    here_are, ordered = library_versions(python), order.identity["libraries"]
    other = [name for name in sorted(here_are | ordered) if here_are.get(name) != ordered.get(name)]
    if other:
        lines = [f"{name} {here_are.get(name, 'missing')} (ordered: {ordered.get(name, 'none')})" for name in other]
        raise MachineUnfit(f"the job environment {python} of this worker is not the ordering run's: {', '.join(lines)}.")


class Mirror:
    """Keeps the job's metrics and log in the remote store up to date; a store that hiccups costs the job nothing."""

    def __init__(self, here: Store, order: JobOrder):
        self.remote, self.order = here.remote, order
        self.done = dict.fromkeys(MIRROR_SECONDS, 0.0)

    def hear(self, lines: Metrics) -> None:
        for name, seconds in MIRROR_SECONDS.items():
            if time.monotonic() - self.done[name] > seconds:
                self._put(name)
                self.done[name] = time.monotonic()

    def finish(self) -> None:
        """Copy the last state of everything; the outcome goes last, because it ends the wait of the ordering run."""
        for name in (*MIRROR_SECONDS, USAGE, "result.json", OUTCOME):
            self._put(name)

    def _put(self, name: str) -> None:
        path = work_folder(self.order) / name
        if self.remote is not None and path.is_file():
            self.remote.put_work(self.order.work, path)
