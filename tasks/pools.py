"""Places a job on a work pool. Prefect's pools carry no tags: each has one deployment of `accelerate-job` that carries them.

The job's truth is on disk (store and work folder), not in Prefect: the server may be away for a while, and nothing is lost.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import StateType, WorkPoolStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling, State

from tasks import errors
from tasks.artifacts import Artifact, Store
from tasks.environment import home
from tasks.failures import DIED
from tasks.guard import USAGE
from tasks.job_order import JobOrder
from tasks.local_job import Metrics, MetricsReader

FLOW = "accelerate-job"
OUTCOME = "outcome.json"
POLL_SECONDS = 1.0
CANCEL_SECONDS = 12  # who waits here is killed itself after 25 s or 30 s; the job watches its run and ends in any case
UNFINISHED = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED]
log = logging.getLogger("posttrain")


@dataclass(frozen=True)
class Pool:
    """A work pool as a stage sees it: the tags of its deployment, and why no job can be sent there now, if so."""

    name: str
    deployment_id: UUID
    tags: frozenset[str]
    num_unfinished: int
    obstacle: str | None = None


def choose(stage: str, tags: list[str], pools: list[Pool]) -> Pool:
    """Return the pool with all the tags, a live worker and the fewest unfinished runs; the first by name among equals.

    Raises MachineUnfit with what was asked, what there is, and what each pool lacks.
    """
    lacking = {pool: sorted(set(tags) - pool.tags) for pool in pools}
    fit = [pool for pool in pools if not lacking[pool] and pool.obstacle is None]
    if fit:
        return min(fit, key=lambda pool: (pool.num_unfinished, pool.name))
    lines = [
        f"  {pool.name} [{', '.join(sorted(pool.tags))}]: "
        + (f"lacks {', '.join(lacking[pool])}" if lacking[pool] else str(pool.obstacle))
        for pool in sorted(pools, key=lambda pool: pool.name)
    ]
    there = "\n".join(lines) or "  none: this server has no deployment of accelerate-job (`prefect deploy --all` makes them)"
    raise errors.MachineUnfit(
        f"placement of {stage} asks for tags [{', '.join(tags)}], and no work pool can take it. Pools here:\n{there}\n"
        "Start a worker, change placement.tags, or use tags: [local] to run it as a child process of this run."
    )


def read_pools() -> list[Pool]:
    """Return every work pool that has a deployment of accelerate-job."""
    wanted = filters.FlowFilter(name=filters.FlowFilterName(any_=[FLOW]))
    with get_client(sync_client=True) as client:
        deployments = client.read_deployments(flow_filter=wanted)
        return [_read_pool(client, deployment) for deployment in deployments if deployment.work_pool_name]


def build_on_pool(order: JobOrder, store: Store, on_metrics: Callable[[Metrics], None], stop: threading.Event) -> Artifact:
    """Send the order to a pool, follow it to its end, and return what it committed to the store.

    Raises what the worker raised, under the same class; RunCancelled if someone cancelled the job or this run.
    """
    pool = choose(order.stage, order.placement.tags, read_pools())
    flow_run = run_deployment(
        pool.deployment_id, parameters={"order": order.model_dump(mode="json")}, timeout=0,
        flow_run_name=f"{order.stage}-{order.fingerprint}", tags=[*order.placement.tags, f"stage:{order.stage}"],
        work_queue_name=order.placement.queue,
    )  # fmt: skip
    log.info("%s: sent to pool %s as run %s", order.stage, pool.name, flow_run.name)
    try:
        state = _follow(flow_run.id, pool, order, store, on_metrics, stop)
    except BaseException:
        cancel(flow_run.id)
        raise
    _raise_outcome(order, store, pool, state)
    artifact = store.find(order.stage, order.fingerprint)
    if artifact is None:
        raise errors.JobFailed(
            f"{order.stage} ended on pool {pool.name}, but {order.stage}/{order.fingerprint} is not in the store of this run, "
            f"{store.remote.url if store.remote else store.root}."
        )
    return artifact


def cancel(flow_run_id: UUID) -> None:
    """Ask for the end of a run on a pool and wait for it; a server that does not answer is left to the worker's own watch."""
    with _server_may_be_away(), suppress(ObjectNotFound), get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, Cancelling())
        end = time.monotonic() + CANCEL_SECONDS
        while time.monotonic() < end and not client.read_flow_run(flow_run_id).state.is_final():
            time.sleep(POLL_SECONDS)


def _follow(
    flow_run_id: UUID,
    pool: Pool,
    order: JobOrder,
    store: Store,
    on_metrics: Callable[[Metrics], None],
    stop: threading.Event,
) -> State | None:
    """Return the last state of the run on the pool, once it ended; hand over its metrics as they come.

    It has ended when its outcome is there, whatever the server says: a worker that is stopped leaves its runs Running.
    """
    reader = MetricsReader(home() / order.work / "metrics.jsonl")
    seen = None
    while True:
        if stop.wait(POLL_SECONDS):
            raise errors.RunCancelled(f"{order.stage} was interrupted on pool {pool.name}, and its job was told to end")
        state = _state(flow_run_id)
        bring_work(order, store, "metrics.jsonl", OUTCOME)
        on_metrics(reader.new())
        if (home() / order.work / OUTCOME).is_file():
            return state
        if state is None:
            continue
        if state.is_final():
            return state
        if state.name != seen:
            log.info("%s: %s on pool %s", order.stage, state.name.lower(), pool.name)
            seen = state.name


def bring_work(order: JobOrder, store: Store, *names: str) -> None:
    """Bring files of the job's work folder here, if it ran on a machine without a common disk."""
    if store.remote is not None:
        for name in names:
            store.remote.get_work(order.work, home() / order.work / name)


def _raise_outcome(order: JobOrder, store: Store, pool: Pool, state: State | None) -> None:
    """Raise what stopped the job over there; a job whose process died too hard to say so is told from Prefect's state."""
    bring_work(order, store, "log.txt", USAGE)
    outcome = home() / order.work / OUTCOME
    if outcome.is_file():
        content = json.loads(outcome.read_text())
        if content["error"] is not None:
            error = getattr(errors, content["error"], errors.JobFailed)
            told = f"on pool {pool.name}: {content['message']}"
            raise error(told, content["cause"]) if issubclass(error, errors.JobFailed) else error(told)
        return
    if state.is_completed():  # its artifact tells, even where its outcome could not be copied
        return
    if state.is_cancelled():
        raise errors.RunCancelled(f"{order.stage} was cancelled on pool {pool.name}: {state.message}")
    raise errors.JobFailed(
        f"{order.stage} on pool {pool.name} ended as {state.name} without a word of its own: {state.message}. "
        f"Its log, if any: {home() / order.work / 'log.txt'}",
        DIED,
    )


def _state(flow_run_id: UUID) -> State | None:
    """Return a run's state; None from a server that is away. One that was deleted is cancelled: its worker sees it so, too."""
    try:
        with _server_may_be_away(), get_client(sync_client=True) as client:
            return client.read_flow_run(flow_run_id).state
    except ObjectNotFound:
        return Cancelled(message="someone deleted the run")
    return None


@contextmanager
def _server_may_be_away() -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, OSError) as error:
        log.warning("Prefect does not answer (%s); the job goes on", type(error).__name__)


def _read_pool(client: SyncPrefectClient, deployment: Any) -> Pool:
    name, tags = deployment.work_pool_name, frozenset(deployment.tags)
    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        return Pool(name, deployment.id, tags, 0, "there is no such work pool")
    runs = client.read_flow_runs(
        work_pool_filter=filters.WorkPoolFilter(name=filters.WorkPoolFilterName(any_=[name])),
        flow_run_filter=filters.FlowRunFilter(
            state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=UNFINISHED))
        ),
        limit=200,
    )
    obstacle = None
    if pool.is_paused or deployment.paused:
        obstacle = "is paused"
    elif pool.status != WorkPoolStatus.READY:
        obstacle = "no live worker polls it"
    return Pool(name, deployment.id, tags, len(runs), obstacle)
