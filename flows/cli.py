"""The `posttrain` command: run, plan, why, lineage, gc, validate, drift, serve, champion, promote, rollback, ui, pools, …"""

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Annotated, Any

import typer

from tasks.environment import refuse_full_disk
from tasks.errors import MachineUnfit, PipelineError, RunCancelled
from tasks.guard import guarded, kill_marked
from tasks.interrupts import interrupts

GUARDED = "POSTTRAIN_GUARDED"  # set in the process that the guard runs, and in all that it starts
GRACE_SECONDS = 25  # a job's own grace is 15 s, then the run still writes what became of it

app = typer.Typer(no_args_is_help=True, add_completion=True, help=__doc__, pretty_exceptions_enable=False)
ProfileName = Annotated[str, typer.Argument(help="a shipped profile's name, or the path of a YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="override one setting; repeatable")
]


@app.command()
def run(
    profile: ProfileName,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="print summary.json last on standard output")] = False,
    deployment: Annotated[str | None, typer.Option(help="run it on the server, through this deployment")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="with --deployment: wait, and exit with the run's own code")] = False,
) -> None:
    """Take a profile to an export that vLLM serves; stages whose work is in the store are not run again."""
    if wait and not deployment:
        raise typer.BadParameter("--wait goes with --deployment: a run here is always waited for")
    if not deployment and GUARDED not in os.environ:
        sys.exit(_run_guarded())  # before anything is imported here: the guarded process imports it all
    from flows import terminal
    from tasks.check_profile import load_profile

    load_profile(profile, overrides)  # a wrong setting must not cost the start of a server
    if deployment:
        sys.exit(_run_there(deployment, profile, overrides, wait))
    refuse_full_disk()
    with terminal.attached():
        stop: PipelineError | None = None
        try:
            summary = _run_here(profile, overrides)
        except PipelineError as error:
            stop, summary = error, _summary_of(error)
    if summary:
        terminal.show_summary(summary)
    if stop:
        terminal.show_error(stop)
    if summary and as_json:
        print(json.dumps(summary, indent=1))
    sys.exit(stop.exit_code if stop else summary["exit_code"])


@app.command()
def plan(profile: ProfileName, overrides: Overrides = None) -> None:
    """Say for each stage whether it would run or is in the store, and which fields differ from the last time."""
    from flows import plan as planning
    from flows import terminal
    from tasks.check_profile import check_profile, load_profile

    loaded = load_profile(profile, overrides)
    check_profile(loaded)
    terminal.show_plan(planning.plan(loaded))


@app.command()
def why(
    stage: Annotated[str, typer.Argument(help="a stage as the summary names it: sft, reward_model, grpo, validate-eval, …")],
    profile: Annotated[str, typer.Argument(help="the profile whose runs are compared")] = "quickstart",
    run_id: Annotated[
        str | None, typer.Option("--run", help="the later run; default: the newest that came to the stage")
    ] = None,
    against: Annotated[str | None, typer.Option(help="the earlier run; default: the one before")] = None,
) -> None:
    """Say why a stage's result differs between two runs: the fields that differ, and what its metrics did."""
    from flows import terminal
    from flows import why as comparing

    terminal.show_comparison(comparing.why(stage, profile, against, run_id))


@app.command()
def lineage(
    what: Annotated[str, typer.Argument(help="a run's id, a profile's name for its newest, or a folder that is served")],
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Walk from what is served back to rows, base, code and versions, and check on the way that all of it is whole."""
    from dataclasses import asdict

    from flows import lineage as tracing
    from flows import terminal

    found = tracing.lineage(what)
    print(json.dumps(asdict(found), indent=1)) if as_json else terminal.show_lineage(found)
    if any(node.state not in ("whole", "not here") for node in tracing.roots(found)):
        sys.exit(1)


@app.command()
def gc(
    keep: Annotated[int, typer.Option(min=1, help="how many of each profile's newest runs keep their artifacts")] = 5,
    delete: Annotated[bool, typer.Option("--delete", help="remove what is shown")] = False,
) -> None:
    """Show what no release, no recent run and no living process needs; with --delete, free it."""
    from flows import cleaning, terminal

    found = cleaning.unneeded(keep)
    if delete:
        cleaning.free(found)
    terminal.show_freed(found, delete)


@app.command()
def validate(
    profile: Annotated[str | None, typer.Argument(help="a profile, whose datasets are all held to their contracts")] = None,
    overrides: Overrides = None,
    kind: Annotated[str | None, typer.Option(help="kind of rows, with --data")] = None,
    data: Annotated[str | None, typer.Option(help="a file, a folder or hub:OWNER/NAME@REVISION, instead of a profile")] = None,
    layout: Annotated[str, typer.Option(help="trl, sharegpt or alpaca, with --data")] = "trl",
    columns: Annotated[str, typer.Option(help="the kind's columns by the source's, OURS=THEIRS,…, with --data")] = "",
    model: Annotated[Path | None, typer.Option(help="a model whose tokenizer and template read the rows, with --data")] = None,
) -> None:
    """Hold datasets to their contracts; nothing is trained. Leaves a report and every bad row in runs/.validations/."""
    from flows import terminal, validation

    if (profile is None) == (data is None) or (kind is None) != (data is None):
        raise typer.BadParameter("give a profile, or --kind together with --data")
    if profile is not None:
        verdicts = validation.of_profile(profile, overrides)
    else:
        verdicts = validation.of_file(data, kind, layout, validation.column_names(columns), model, overrides)
    terminal.show_verdicts(verdicts)


@app.command()
def drift(
    profile: Annotated[str | None, typer.Argument(help="a profile's name; with --series, whose drift block judges")] = None,
    overrides: Overrides = None,
    last: Annotated[int, typer.Option(min=1, help="how many runs")] = 20,
    series: Annotated[Path | None, typer.Option(help="judge this metrics.jsonl, CSV or JSON file; exit 5 if it halts")] = None,
) -> None:
    """Show a profile's last runs by their canaries, or run the detectors over recorded series."""
    from flows import drift_history, terminal
    from profiles.schema import Drift
    from tasks.check_profile import load_profile

    if series is None:
        if profile is None:
            raise typer.BadParameter("give a profile's name, or --series FILE")
        return terminal.show_history(profile, drift_history.history(profile, last))
    judged = load_profile(profile, overrides).drift if profile else Drift()
    sys.exit(terminal.show_findings(drift_history.judge_file(series, judged)))


@app.command()
def champion(
    profile: Annotated[str, typer.Argument(help="a profile's name")],
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Show what is released of a profile: the champion, the release before it, and the newest candidate."""
    from flows import releases, terminal

    found = releases.rows(profile)
    print(json.dumps(found, indent=1)) if as_json else terminal.show_releases(profile, found)


@app.command()
def promote(
    what: Annotated[str, typer.Argument(help="a run's id, or a profile's name for its newest export")],
    force: Annotated[
        str | None,
        typer.Option(metavar="REASON", help="also of a run that was not accepted, or a release taken back; recorded"),
    ] = None,
) -> None:
    """Make the export of a run that passed every gate the champion; the former champion is kept as `previous`."""
    from flows import releases

    releases.promote(what, force)


@app.command()
def rollback(
    profile: Annotated[str, typer.Argument(help="a profile's name")],
    reason: Annotated[str, typer.Option(help="why; it is recorded, and keeps the release from being promoted again")],
) -> None:
    """Make the previous release the champion again; the one taken back is not promoted again by itself."""
    from flows import releases

    releases.rollback(profile, reason)


@app.command()
def serve(
    what: Annotated[str, typer.Argument(help="a profile's name (its newest export), PROFILE@champion, a run id, or a folder")],
    port: Annotated[int, typer.Option(help="port on 127.0.0.1")] = 8000,
    follow: Annotated[bool, typer.Option("--follow", help="with PROFILE@champion: serve each new champion instead")] = False,
) -> None:
    """Verify an export's files and serve it by vLLM as it was tested, on 127.0.0.1, until Ctrl-C."""
    from flows import serving

    serving.serve(what, port, follow)


@app.command()
def ui(
    prefect_port: Annotated[int, typer.Option(help="port of Prefect's page")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="port of MLflow's page")] = 5000,
) -> None:
    """Serve Prefect's and MLflow's pages on this store, on 127.0.0.1, until Ctrl-C."""
    from flows.web_pages import serve

    serve(prefect_port, mlflow_port)


@app.command()
def pools(
    file: Annotated[Path, typer.Option(help="the prefect.yaml whose definitions.pools are created")] = Path("prefect.yaml"),
) -> None:
    """Create or update the server's work pools, their queues, and the automation for runs that died."""
    from flows.server_setup import set_up

    print("\n".join(set_up(file)))


@app.command()
def sweep() -> None:
    """Say everywhere that runs of this home folder are dead whose process is gone, and end what is left of them."""
    from flows.sweep import sweep_runs

    print("\n".join(sweep_runs()) or "no run is dead")


@app.command()
def doctor() -> None:
    """Check this machine: versions against the pinned set, hardware, disk, servers. Each line is ok or says what to do."""
    from flows import doctor as checks
    from flows import terminal

    sys.exit(terminal.show_checks(checks.checks()))


def _run_guarded() -> int:
    """Run this same command under the guard, in a session of its own, and return its exit code.

    The terminal's Ctrl-C goes to every process of the foreground group, and would end Prefect's embedded server before the
    run could say that it was cancelled. So it only reaches this process, which asks once, and the second time kills. However
    this process dies, the guard ends the run, its server and its jobs.
    """
    command = guarded([sys.executable, "-P", "-m", "flows.cli", *sys.argv[1:]], GRACE_SECONDS)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    mark = uuid.uuid4().hex
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | {GUARDED: mark}, start_new_session=True)
    try:
        return _wait_for(process)
    except KeyboardInterrupt:
        process.terminate()
    try:
        return _wait_for(process)
    except KeyboardInterrupt:
        kill_marked(GUARDED, mark)
        return RunCancelled.exit_code


def _wait_for(process: subprocess.Popen) -> int:
    """Return the run's exit code; if it was killed, and could not say so anywhere, a sweep says it."""
    code = process.wait()
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        subprocess.run([sys.executable, "-P", "-m", "flows.cli", "sweep"], stdout=sys.stderr)
    return code


def _run_there(deployment: str, profile: str, overrides: list[str] | None, wait: bool) -> int:
    """Start the run on the server; with `wait` return its own exit code, else 0 once it is accepted."""
    from flows import remote_run, terminal

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with terminal.attached():
        flow_run = remote_run.start(deployment, profile, overrides)
        print(f"{flow_run.name}  {remote_run.page(flow_run)}", flush=True)
        if not wait:
            return 0
        end = remote_run.wait(flow_run)
    print(f"{flow_run.name}  {end['state']}  run {end['run_id']}  exit {end['exit_code']}")
    if end["exit_code"]:
        print(end["message"], file=sys.stderr)
    return int(end["exit_code"])


def _run_here(profile: str, overrides: list[str] | None) -> dict[str, Any]:
    """Run the flow in this process; on the guard's SIGTERM it ends its job, says so everywhere, and stops."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # the terminal has its own lines
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    from flows.post_training import post_training
    from tasks.pipeline_run import starting

    # nobody listens to heartbeats on the embedded server, and Prefect's thread for them takes up to a second to end
    unheard = {} if PREFECT_API_URL.value() else {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with starting(), temporary_settings(unheard):
        state = post_training(profile, overrides or [], return_state=True)
    return state.result(raise_on_failure=not state.is_cancelled())


def _summary_of(error: PipelineError) -> dict[str, Any] | None:
    path = getattr(error, "summary_file", None)
    return json.loads(path.read_text()) if path else None


def main() -> None:
    """Run the command; a deliberate stop prints its text and exits with its own code, a bug keeps its traceback."""
    try:
        app()
    except PipelineError as error:
        from flows import terminal

        terminal.show_error(error)
        sys.exit(error.exit_code)
    except interrupts():
        sys.exit(RunCancelled.exit_code)
    except Exception as error:
        from tasks.attempts import cause_of
        from tasks.failures import HICCUP

        if cause_of(error) != HICCUP:
            raise
        text = f"MLflow or Prefect does not answer: {str(error).splitlines()[0]}"
        print(f"{text}\nSee `posttrain doctor`; MLFLOW_TRACKING_URI and PREFECT_API_URL say where they are.", file=sys.stderr)
        sys.exit(MachineUnfit.exit_code)


if __name__ == "__main__":
    main()
