"""`posttrain run --deployment`: start a run on a server and wait for it, with the pipeline's own exit code."""

import logging
import time
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL
from prefect.states import Cancelling

from tasks.errors import MachineUnfit, ProfileError, RunCancelled
from tasks.interrupts import interrupts

POLL_SECONDS = 2.0
CRASHED_EXIT_CODE = 1
log = logging.getLogger("posttrain")


def start(deployment: str, profile: str, overrides: list[str] | None) -> FlowRun:
    """Start a run of `post-training/<name>`; raises ProfileError if the server refuses, MachineUnfit if there is none."""
    if not PREFECT_API_URL.value():
        raise MachineUnfit("--deployment needs a Prefect server: set PREFECT_API_URL (prefect config set PREFECT_API_URL=…).")
    name = deployment if "/" in deployment else f"post-training/{deployment}"
    try:
        return run_deployment(name, parameters={"profile": profile, "overrides": overrides or []}, timeout=0, as_subflow=False)
    except ObjectNotFound:
        raise ProfileError(
            f"--deployment is {deployment!r}: the server has no {name}. `prefect deployment ls` lists them."
        ) from None
    except PrefectHTTPStatusError as error:
        if error.response.is_server_error:
            raise MachineUnfit(f"the Prefect server at {PREFECT_API_URL.value()} is not well: {error}") from None
        raise ProfileError(f"the server refuses the run: {error.response.text}") from None
    except httpx.HTTPError as error:
        raise MachineUnfit(f"the Prefect server at {PREFECT_API_URL.value()} does not answer: {error}") from None


def page(flow_run: FlowRun) -> str:
    return f"{PREFECT_UI_URL.value() or ''}/runs/flow-run/{flow_run.id}"


def wait(flow_run: FlowRun) -> dict[str, Any]:
    """Return `{"state", "message", "exit_code", "run_id", "status"}` of the run's end; Ctrl-C or TERM cancels it.

    The code is the one that the run put on itself; one that ended without (a crash, a cancel in the queue) has none of its own.
    """
    try:
        flow_run = _until_final(flow_run.id)
    except interrupts():
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run.id, Cancelling())
        raise RunCancelled(f"{flow_run.name} was told to stop; its page says what became of it: {page(flow_run)}") from None
    labels = {key.removeprefix("posttrain."): value for key, value in flow_run.labels.items() if key.startswith("posttrain.")}
    if labels.get("status") == "waiting" and not flow_run.state.is_failed():
        labels = {}  # it ended while it waited for an approval, and not because nobody gave it
    without = RunCancelled.exit_code if flow_run.state.is_cancelled() else CRASHED_EXIT_CODE
    known = {"exit_code": without, "run_id": None, "status": None} | labels
    return known | {"state": flow_run.state.name, "message": flow_run.state.message}


def _until_final(flow_run_id: UUID) -> FlowRun:
    seen = None
    while True:
        try:
            with get_client(sync_client=True) as client:
                flow_run = client.read_flow_run(flow_run_id)
        except httpx.HTTPError as error:
            log.warning("Prefect does not answer (%s); waiting on", type(error).__name__)
        else:
            if flow_run.state.is_final():
                return flow_run
            if flow_run.state.name != seen:
                asked = f": answer `Resume` on {page(flow_run)}" if flow_run.state.is_paused() else ""
                log.info("%s: %s%s", flow_run.name, flow_run.state.name.lower(), asked)
                seen = flow_run.state.name
        time.sleep(POLL_SECONDS)
