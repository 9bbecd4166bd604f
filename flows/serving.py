"""`posttrain serve`: an export, found and verified, served by vLLM exactly as its parity test served it, until Ctrl-C."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.web_pages import refuse_taken
from profiles.schema import Placement, StagePlacement
from tasks.artifacts import damage
from tasks.champion import export_of
from tasks.environment import home
from tasks.errors import MachineUnfit, ProfileError
from tasks.guard import guarded
from tasks.local_job import job_environment, job_python
from tasks.monitoring import registry
from tasks.monitoring.registry import Version
from tasks.pipeline_run import store
from tasks.remote_store import MANIFEST
from tasks.served_model import models_at, served_name
from tasks.vllm_server import HOST, server_command, server_environment

GRACE_SECONDS = 15.0
POLL_SECONDS = 0.5
FOLLOW_SECONDS = 5.0
CHAMPION = "@champion"


@dataclass(frozen=True)
class Export:
    """A verified export: its folder, what its manifest says of it, and which interpreter and environment serve it."""

    folder: Path
    profile: str
    fingerprint: str
    flags: list[str]
    startup_timeout_seconds: int
    placement: StagePlacement

    @property
    def names(self) -> list[str]:
        """Return the names a client may ask for: the profile's, which moves on, and this very export's."""
        return [self.profile, served_name(self.profile, self.fingerprint)]


def serve(what: str, port: int, follow: bool = False) -> None:
    """Serve an export on 127.0.0.1, print a request that works once it answers, and end it with all its processes.

    With `follow`, `what` is `PROFILE@champion`, and each new champion takes the place of the one that is served, once its files
    are verified; one that does not start gives way to the one before. A registry that does not answer changes nothing. Raises
    ProfileError if `what` names no export, MachineUnfit if its files are not those of its manifest, the port is taken or vLLM
    does not start.
    """
    if follow and not what.endswith(CHAMPION):
        raise ProfileError(f"--follow goes with PROFILE{CHAMPION}: {what} names one export, which never changes.")
    refuse_taken("--port", port)
    export, before, refused = find_export(what), None, set()
    while export is not None:
        try:
            export, before = serve_one(export, port, partial(newer, what, refused=refused) if follow else None), export
        except MachineUnfit as error:
            if before is None or not follow:
                raise
            print(f"{error}\n{export.names[1]} does not start: serving {before.names[1]} again", file=sys.stderr, flush=True)
            refused.add(export.fingerprint)
            export, before = before, None


def serve_one(export: Export, port: int, next_one: Callable[[Export], Export | None] | None) -> Export | None:
    """Serve one export until told to stop, then return None, or until `next_one` has another, then return that."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the stop of the one before this ignored both
        signal.signal(number, signal.default_int_handler)
    server = start(export, port)
    try:
        wait_until_served(server, export, port)
        print(f"{export.names[1]} from {export.folder}\n{example(export, port)}\nCtrl-C stops it.", flush=True)
        while server.poll() is None:
            time.sleep(FOLLOW_SECONDS if next_one else POLL_SECONDS)
            if next_one and (found := next_one(export)):
                print(f"another champion: serving {found.names[1]} instead", flush=True)
                return found
        raise MachineUnfit(f"vLLM ended by itself with {server.returncode}; see {log_of(port)}")
    except KeyboardInterrupt:
        print("stopping")
        return None
    finally:
        stop(server)


def newer(what: str, served: Export, refused: set[str]) -> Export | None:
    """Return the champion's export, its files verified, if it is another one than is served; whatever fails, that one stays."""
    try:
        fingerprint = champion_of(what).fingerprint
        return None if fingerprint in (served.fingerprint, *refused) else find_export(what)
    except Exception as error:  # a registry that is away, a damaged export: no reason to end what serves
        warn_once(f"{served.names[1]} is served on: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None


@cache
def warn_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def champion_of(what: str) -> Version:
    """Return the champion of `PROFILE@champion`; raises ProfileError if there is none."""
    name = what.removesuffix(CHAMPION)
    version = registry.at(name, registry.CHAMPION)
    if version is None:
        raise ProfileError(f"{name} has no champion in MLflow's registry here. Make one: posttrain run {name}")
    return version


def find_export(what: str) -> Export:
    """Return the export of a profile's newest finished run or its champion, of a run id, or in a folder, its files verified.

    Raises ProfileError if there is none, MachineUnfit if a file was altered, added or lost since.
    """
    if what.endswith(CHAMPION):
        version = champion_of(what)
        found = export_of(version, store())
        return read(Path(found.path), placement_of(home() / version.name / version.tags["run_id"]))
    if (Path(what) / MANIFEST).is_file():
        return read(Path(what).resolve(), StagePlacement())
    if os.sep in what or what in (".", ".."):
        raise ProfileError(
            f"{what} has no {MANIFEST}: it is no export of this store. Name the folder that `posttrain run` printed."
        )
    runs = sorted(home().glob(f"*/{what}/summary.json")) or sorted((home() / what).glob("*/summary.json"), reverse=True)
    summaries = [(path.parent, json.loads(path.read_text())) for path in runs]
    is_run = any(folder.name == what for folder, _ in summaries)
    for folder, summary in summaries:
        if summary["export"] and (is_run or summary["exit_code"] == 0):
            return of_run(folder, summary)
    raise ProfileError(_nothing_to_serve(what, is_run, bool(summaries)))


def of_run(folder: Path, summary: dict[str, Any]) -> Export:
    """Return the export that a run's summary names."""
    key = next(stage["fingerprint"] for stage in summary["stages"] if stage["stage"] == "export")
    return stored(key, placement_of(folder))


def placement_of(run: Path) -> StagePlacement:
    """Return where a run's export was tested; the default where the run was on another machine."""
    file = run / "profile.json"
    if not file.is_file():
        return StagePlacement()
    try:  # the rest of an older profile may be what this version knows no more
        return Placement.model_validate(json.loads(file.read_text()).get("placement", {})).of("export")
    except ValidationError as error:
        raise MachineUnfit(f"the placement in {file} is of another version of posttrain: {error}") from None


def stored(key: str, placement: StagePlacement) -> Export:
    """Return an export of the store, brought here if it is only in the remote one."""
    here = store().place("export", key)
    if not here.exists():
        found = store().find("export", key)
        if found is None:
            raise MachineUnfit(f"{here} is gone from the store. `posttrain run` of its profile builds it again.")
        here = Path(store().fetch(found).path)
    return read(here, placement)


def read(folder: Path, placement: StagePlacement) -> Export:
    """Return the export in a folder once every file has the size and hash of its manifest; else raises MachineUnfit."""
    if problem := damage(folder):
        raise MachineUnfit(
            f"{folder} is not the export that was tested ({problem}), so it is not served. Run its profile again."
        )
    manifest = json.loads((folder / MANIFEST).read_text())
    artifact = manifest["artifact"]
    if artifact["stage"] != "export":
        raise ProfileError(f"{folder} holds a {artifact['stage']}, which was never served and compared. Name an export.")
    recipe = manifest["identity"]["recipe"]
    flags = shlex.split(artifact["details"]["serve"])
    return Export(
        folder, recipe["card"]["profile"], artifact["fingerprint"], flags, recipe["startup_timeout_seconds"], placement
    )


def start(export: Export, port: int) -> subprocess.Popen:
    """Start vLLM under the guard: whatever happens to this process, no process of the server outlives it."""
    command = server_command(job_python(export.placement), export.folder, export.names, port, export.flags)
    environment = server_environment(job_environment(export.placement))
    with log_of(port).open("wb") as log:
        return subprocess.Popen(
            guarded(command, GRACE_SECONDS),
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip


def wait_until_served(server: subprocess.Popen, export: Export, port: int) -> None:
    """Return when the server says that it serves this very export; raises MachineUnfit if it does not come to that."""
    end = time.monotonic() + export.startup_timeout_seconds
    while time.monotonic() < end and server.poll() is None:
        if export.names == models_at(f"http://{HOST}:{port}"):
            return
        time.sleep(POLL_SECONDS)
    what = (
        f"exited with {server.returncode}"
        if server.poll() is not None
        else f"did not answer in {export.startup_timeout_seconds} s"
    )
    tail = "\n".join(log_of(port).read_text(errors="replace").splitlines()[-8:])
    raise MachineUnfit(f"vLLM {what}. The end of {log_of(port)}:\n{tail}")


def stop(server: subprocess.Popen) -> None:
    """End the server; returns when no process of it is alive, whatever signals come meanwhile."""
    server.stdin.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    server.wait()


def example(export: Export, port: int) -> str:
    """Return a request that a shell can make."""
    hello = {"messages": [{"role": "user", "content": "Hello"}]} if _converses(export.folder) else {"prompt": "Hello"}
    where = "chat/completions" if "messages" in hello else "completions"
    body = json.dumps({"model": export.profile, **hello, "max_tokens": 16})
    return f"curl http://{HOST}:{port}/v1/{where} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def log_of(port: int) -> Path:
    """Return where the server on a port writes."""
    return home() / f".vllm-{port}.log"


def _converses(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (file.is_file() and "chat_template" in json.loads(file.read_text()))


def _nothing_to_serve(what: str, is_run: bool, is_known: bool) -> str:
    if is_run:
        return f"the run {what} left no export: its report in {home()}/*/{what} says what stopped it."
    if is_known:
        return f"no run of the profile {what} has finished with an export in {home()}. Start one: posttrain run {what}"
    return f"{what!r} is no profile that has run in {home()}, no run id there, and no folder of an export. See posttrain run."
