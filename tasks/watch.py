"""Sees from inside a process that someone cancelled its run, or that the run it works for is gone: nobody else tells it.

Prefect signals only processes that a worker started, and never when the worker was replaced (docs/production.md).
"""

import contextvars
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from rich.console import Console

POLL_SECONDS = 5.0
REFUSALS = 3  # in a row, before a server is taken for dead
CANCELLED = (StateType.CANCELLING, StateType.CANCELLED)
DEAD = (StateType.CRASHED, StateType.FAILED)


log = logging.getLogger("posttrain")


def go_on_unread(console: Console) -> None:
    """Write no more: a worker that dies takes the reader of its runs' output with it, and rich would end the process then."""
    console.quiet = True


Console.on_broken_pipe = go_on_unread


@contextmanager
def watched(own: str, parent: str | None = None, stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """Yield an event that is set as soon as a flow run, or the one it works for, is being cancelled, or the latter has died.

    That its own state says Crashed means nothing: a server that was away for long calls living runs crashed when it is back.
    """
    stop, done = stop or threading.Event(), threading.Event()
    # the embedded server's address is known in this context only
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(_watch, own, parent, stop, done), daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        done.set()
        thread.join(1)  # a server that hangs must not hold up what is to be said


def called_off(own: str, parent: str | None) -> bool:
    """Tell whether a flow run is to end: cancelled, or its parent cancelled, dead or deleted."""
    return _state(own) in CANCELLED or (parent is not None and _state(parent) in (*CANCELLED, *DEAD))


def _state(flow_run_id: str) -> StateType | None:
    """Return a run's state; one that was deleted counts as cancelled, and a server that is away says nothing."""
    try:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(UUID(str(flow_run_id))).state.type
    except ObjectNotFound:
        return StateType.CANCELLED
    except (httpx.HTTPError, OSError):
        return None


def _watch(own: str, parent: str | None, stop: threading.Event, done: threading.Event) -> None:
    refused = 0
    while not done.wait(POLL_SECONDS):
        if called_off(own, parent):
            stop.set()
            return
        refused = refused + 1 if embedded_server_is_gone() else 0
        if refused == REFUSALS:
            # nothing of this run can be said to Prefect any more, and every call to it would be tried for minutes: the process
            # ends as if it were killed itself, its jobs save their checkpoints, and the command that started it sweeps it
            log.error("Prefect's embedded server died: the run ends here, and the next one goes on from the store")
            os.kill(os.getpid(), signal.SIGKILL)


def embedded_server_is_gone() -> bool:
    """Tell whether the server that runs inside this run refuses connections: nobody starts it again, unlike one elsewhere."""
    if PREFECT_API_URL.value():
        return False
    try:
        with get_client(sync_client=True) as client:
            client.hello()
    except httpx.ConnectError:
        return True
    except (httpx.HTTPError, OSError):
        pass
    return False
