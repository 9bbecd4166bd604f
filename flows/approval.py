"""A person's yes before a release: asked on the run's page in Prefect, kept for the export that it was given for."""

import contextvars
import logging
import queue
import threading
import time
from datetime import UTC, datetime
from typing import Any, Literal

from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment
from prefect.settings import PREFECT_UI_URL
from prefect.variables import Variable
from pydantic import Field

from flows.report import approval_text, estimate_text, gate_lines
from flows.reporting import summarise, write_report
from tasks.errors import GateFailed, RunCancelled
from tasks.monitoring import mlflow_runs
from tasks.pipeline_run import WAITING, PipelineRun, write_json

POLL_SECONDS = 2
GRACE_SECONDS = 3600  # once Prefect's own timeout is over, it overrules what the run says of itself
UNANSWERED = "nobody approved the release within gates.approval_timeout_seconds; run it again to ask again."
LOCAL_UI = "http://127.0.0.1:4200"
log = logging.getLogger("posttrain")


class Decision(RunInput):
    """The form behind `Resume` on the run's page; the server holds an answer to it."""

    decision: Literal["approve", "refuse"]
    reviewer: str = Field(min_length=1, max_length=100, description="who decides")
    reason: str = Field(min_length=1, max_length=2000, description="why; it is recorded with the release")


def require_approval(run: PipelineRun) -> None:
    """Return once a person has approved this run's export; the decision stands for every later run of the same export.

    A run of a deployment is suspended: its process ends, and a worker starts it again when someone answers. One without
    waits in its process. Raises GateFailed when the release is refused or nobody answers, RunCancelled when it is cancelled.
    """
    export = next(record for record in run.records() if record.stage == "export").fingerprint
    name = f"posttrain-approval-{export}"
    decision = Variable.get(name)
    if decision is None:
        decision = ask(run).model_dump()
        decision |= {"export": export, "run_id": run.run_id, "at": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
        decision = kept(name, decision)
    write_json(run.folder / "approval.json", decision)
    mlflow_runs.set_tags(run.mlflow_run_id, {"approval": decision["decision"], "approval.by": decision["reviewer"]})
    mlflow_runs.set_tags(run.mlflow_run_id, {"approval.reason": decision["reason"]})
    told = f"the release was {approval_text(decision)}"
    log.info("%s", told)
    if decision["decision"] == "refuse":
        raise GateFailed(f"{told}\nTo be asked again about this very export, delete Prefect's variable {name}.")


def kept(name: str, decision: dict[str, Any]) -> dict[str, Any]:
    """Keep the decision, and return the one that stands: of two runs that asked about the same export, the first answer."""
    try:
        Variable.set(name, decision)
    except ValueError:  # it is there by now
        log.warning("another run asked about the same export, and was answered first: that answer stands")
        return Variable.get(name)
    return decision


def ask(run: PipelineRun) -> Decision:
    """Publish what the run came to, then wait for the answer; in a suspended run this raises Prefect's Pause."""
    waiting = {"status": "waiting", "exit_code": GateFailed.exit_code}  # what it stays at if nobody ever answers
    summary = summarise(run, None) | waiting
    mlflow_runs.set_tags(run.mlflow_run_id, {"approval": "waiting"})
    form = Decision.with_initial_data(description=question(run, summary))
    page = f"{PREFECT_UI_URL.value() or LOCAL_UI}/runs/flow-run/{run.flow_run_id}"
    if run.was_suspended:  # someone answered: the server hands the answer over
        return suspend_flow_run(form, key="approval")
    write_report(run, summary)
    log.info("waiting for approval: `Resume` on %s", page)
    timeout = run.profile.gates.approval_timeout_seconds
    if deployment.id is None:
        return wait_here(run, form, timeout)
    (run.folder / WAITING).touch()
    return suspend_flow_run(form, timeout=timeout, key="approval")


def wait_here(run: PipelineRun, form: type[Decision], timeout: int) -> Decision:
    """Wait in this process. Prefect's own loop does not see that its run was cancelled, so it goes on in a thread."""
    answers: queue.Queue[Decision | BaseException] = queue.Queue()

    def listen() -> None:
        try:
            answers.put(pause_flow_run(form, timeout=timeout + GRACE_SECONDS, poll_interval=POLL_SECONDS, key="approval"))
        except BaseException as error:
            answers.put(error)

    threading.Thread(target=contextvars.copy_context().run, args=(listen,), daemon=True).start()
    end = time.monotonic() + timeout
    while not run.stop.is_set():
        try:
            answer = answers.get(timeout=POLL_SECONDS)
        except queue.Empty:
            if time.monotonic() > end:
                raise GateFailed(UNANSWERED) from None
            continue
        if isinstance(answer, BaseException):
            raise answer
        return answer
    raise RunCancelled("the run was cancelled while it waited for approval")


def question(run: PipelineRun, summary: dict[str, Any]) -> str:
    """Return what the reviewer reads above the form."""
    lines = [f"## Release {run.profile.name}?", f"Run `{run.run_id}`: every stage and every check is done.", ""]
    for metric, models in summary["metrics"].items():
        lines += [f"- **{metric}** " + " → ".join(f"{name} {estimate_text(e)}" for name, e in models.items())]
    lines += ["", *gate_lines(summary["gate"])] if summary["gate"] else []
    lines += [f"- [report, curves and metrics in MLflow]({mlflow_runs.run_url(run.mlflow_run_id)})", ""]
    return "\n".join([*lines, "The export, to try it:", "", f"```\n{summary['serve']}\n```"])
