"""Sees from inside a process that someone cancelled its run, or that the run it works for is gone: nobody else tells it.

Prefect signals only processes that a worker started, and never when the worker was replaced (facts in docs/production.md).
"""

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType

POLL_SECONDS = 5.0
OVER = (StateType.CANCELLING, StateType.CANCELLED, StateType.CRASHED, StateType.FAILED)


@contextmanager
def watched(flow_run_ids: list[str | None], stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """Yield an event that is set as soon as one of the flow runs is being cancelled or has died; None ids are left out."""
    stop, done = stop or threading.Event(), threading.Event()
    # the embedded server's address is known in this context only
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(_watch, flow_run_ids, stop, done), daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        done.set()
        thread.join()


def any_over(flow_run_ids: list[str | None]) -> bool:
    """Tell whether one of the flow runs is being cancelled or has died; a server that is away says nothing about any."""
    with suppress(httpx.HTTPError, OSError), get_client(sync_client=True) as client:
        return any(client.read_flow_run(UUID(str(run_id))).state.type in OVER for run_id in flow_run_ids if run_id)
    return False


def _watch(flow_run_ids: list[str | None], stop: threading.Event, done: threading.Event) -> None:
    while not done.wait(POLL_SECONDS):
        if any_over(flow_run_ids):
            stop.set()
            return
