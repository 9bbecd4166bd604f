"""Runs one JobSpec as an `accelerate launch` child of this process, wherever that is: the boundary to training."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from profiles.load import accelerate_file
from profiles.schema import StagePlacement
from tasks import devices
from tasks.artifacts import disk_errors
from tasks.errors import DriftHalted, JobFailed, MachineUnfit, RunCancelled
from tasks.failures import HANG, TIMEOUT, diagnose, forget
from tasks.fingerprints import PROJECT
from tasks.guard import MARKER, NUM_GPUS, guarded, kill_marked, marked
from tasks.interrupts import interrupts
from tasks.job_spec import JobResult, JobSpec

log = logging.getLogger("posttrain.job")
ALWAYS = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
ONE_PROCESS = ("prepare", "evaluate", "merge", "export")  # one model, one answer: more ranks would write the same files
POLL_SECONDS = 0.2
DUMP_SECONDS = 2.0  # for the stacks to reach the log
GRACE_SECONDS = 15.0  # Prefect kills a cancelled flow 30 s after asking: everything of ours must have ended by then
SHIPPED_LINES = 200  # log lines per second that reach Prefect; all of them are in the log file
Metrics = list[dict[str, Any]]


def num_processes(placement: StagePlacement) -> int:
    """Return how many ranks the accelerate file starts: each multiplies the global batch, so it is part of the identity."""
    return int(_accelerate_settings(placement)["num_processes"])


def uses_cpu(placement: StagePlacement) -> bool:
    """Tell whether the accelerate file keeps the job off the GPUs."""
    return bool(_accelerate_settings(placement).get("use_cpu"))


def _accelerate_settings(placement: StagePlacement) -> dict[str, Any]:
    return yaml.safe_load(accelerate_file(placement.accelerate).read_text())


def job_python(placement: StagePlacement) -> Path:
    """Return the job environment's interpreter; raises MachineUnfit with how to get one."""
    beside = Path(sys.prefix).with_name(Path(sys.prefix).name + "-job") / "bin" / "python"
    python = Path(placement.python or os.environ.get("POSTTRAIN_JOB_PYTHON") or beside)
    if not os.access(python, os.X_OK) or python.is_dir():
        raise MachineUnfit(
            f"no job environment: {python} is no interpreter that can be run. Run `make install`, or point placement.python or "
            "POSTTRAIN_JOB_PYTHON at an interpreter that has torch, trl and vllm."
        )
    return python.absolute()


def run_job(
    spec: JobSpec,
    placement: StagePlacement,
    on_metrics: Callable[[Metrics], None],
    stop: threading.Event,
    locks: Sequence[int] = (),
) -> JobResult:
    """Run the job to its end and return what it left; no descendant of it is alive afterwards.

    `on_metrics` gets the lines that rank 0 has logged since the last call, `{"step", "max_steps", "time", "metrics"}`.
    `stop` ends the job from another thread; `locks` are descriptors that the job holds to its end. Raises DriftHalted,
    JobFailed (with the root cause of the first failing rank and the log's path), MachineUnfit or RunCancelled.
    """
    with disk_errors(spec.work):
        forget(spec.work)
        (spec.work / "job.json").write_text(spec.model_dump_json(indent=1))
    log_file = spec.work / "log.txt"
    command, env = _command(spec, placement), job_environment(placement)
    gpus = [] if uses_cpu(placement) else devices.visible(env)
    env |= {MARKER: str(spec.work), NUM_GPUS: str(len(gpus))}
    try:
        with devices.held(gpus, str(spec.work), stop) as own, _child(command, env, log_file, [*own, *locks]) as (process, pump):
            code = _follow(process, pump, spec, placement, on_metrics, stop)
    except (Stopped, *interrupts()):
        raise RunCancelled(f"{spec.stage} was interrupted, and its job ended. Log: {log_file}") from None
    return _outcome(spec, code, log_file)


def _command(spec: JobSpec, placement: StagePlacement) -> list[str]:
    python, config = str(job_python(placement)), str(accelerate_file(placement.accelerate))
    accelerate = [python, "-m", "accelerate.commands.launch", "--config_file", config]
    alone = ["--num_processes", "1"] if spec.stage in ONE_PROCESS else []
    job = [*alone, "--module", spec.module, str(spec.work / "job.json")]
    return guarded([*accelerate, *job], GRACE_SECONDS, tell="children")


def job_environment(placement: StagePlacement) -> dict[str, str]:
    """Return the job's environment: ours, without what would make it load this environment's packages.

    From a checkout the job imports `tasks` from there; an installed project is installed in the job environment too. The
    working directory is not searched: a folder `tasks` or `datasets` of the user's would be imported for ours.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")}
    checkout = {"PYTHONPATH": str(PROJECT)} if (PROJECT / "pyproject.toml").is_file() else {}
    return kept | checkout | ALWAYS | placement.env


@contextmanager
def _child(
    command: list[str], env: dict[str, str], log_file: Path, locks: list[int]
) -> Iterator[tuple[subprocess.Popen, "_Pump"]]:
    """Start the guard with the command in a session of its own; on any way out, nothing of it stays alive.

    The guard inherits the locks, so they are held until the last process of the job is gone, whatever becomes of this one.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env,
        start_new_session=True, pass_fds=locks,
    )  # fmt: skip
    pump = _Pump(process.stdout, log_file)
    pump.start()
    try:
        yield process, pump
    finally:
        process.stdin.close()
        if process.wait() < 0:  # someone killed the guard itself
            kill_marked(MARKER, env[MARKER])
        pump.join()
        pump.ship()


def _follow(
    process: subprocess.Popen,
    pump: "_Pump",
    spec: JobSpec,
    placement: StagePlacement,
    on_metrics: Callable[[Metrics], None],
    stop: threading.Event,
) -> int:
    """Return the exit code; on the way, hand over metrics as they come and the log at most once a second."""
    start = shipped = time.monotonic()
    told = spec.metrics_file.stat().st_size if spec.metrics_file.is_file() else 0  # by the job that this one restarts
    reader, life = MetricsReader(spec.metrics_file, told), SignsOfLife(pump, spec.heartbeat_file)
    while process.poll() is None:
        if stop.wait(POLL_SECONDS):
            raise Stopped
        now = time.monotonic()
        if now - shipped >= 1:
            pump.ship()
            on_metrics(reader.new())
            shipped = now
        if now - start > placement.timeout_seconds:
            raise JobFailed(
                f"{spec.stage} ran longer than placement timeout_seconds {placement.timeout_seconds}; it was ended. "
                f"Log: {pump.path}. Raise the limit, or look there for what it waited for.",
                TIMEOUT,
            )
        if life.silent_seconds() > placement.hang_seconds:
            dump_stacks(spec.work)
            raise JobFailed(
                f"{spec.stage} hangs: no step for placement hang_seconds {placement.hang_seconds}; it was ended. The stack of "
                f"every rank is at the end of its log: {pump.path}",
                HANG,
            )
    on_metrics(reader.new())
    return process.returncode


def _outcome(spec: JobSpec, code: int, log_file: Path) -> JobResult:
    result = JobResult.model_validate_json(spec.result_file.read_text()) if spec.result_file.is_file() else None
    if result is not None and result.status == "halted":
        raise DriftHalted(f"{spec.stage} halted: {result.error}\nLog: {log_file}", result.details["last_good"])
    if code == 0 and result is not None and result.status == "done":
        return result
    cause, text = diagnose(spec.work, log_file)
    raise JobFailed(f"{spec.stage} exited with {code}: {text}\nLog: {log_file}", cause)


def dump_stacks(work: Path) -> None:
    """Let every rank of a job write the stacks of its threads to the job's log."""
    ours = set(marked(MARKER, str(work)))
    for path in work.glob("rank*.pid"):
        if (pid := int(path.read_text())) in ours:  # not another process that has its number now
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
    time.sleep(DUMP_SECONDS)


class SignsOfLife:
    """When a job last showed that it goes on: by a step, or, as long as it has taken none, by a line in its log."""

    def __init__(self, pump: "_Pump", heartbeat: Path):
        self.pump, self.heartbeat = pump, heartbeat
        self.last, self.seen = time.monotonic(), self._sign()

    def silent_seconds(self) -> float:
        if (sign := self._sign()) != self.seen:
            self.last, self.seen = time.monotonic(), sign
        return time.monotonic() - self.last

    def _sign(self) -> int:
        try:
            return self.heartbeat.stat().st_mtime_ns
        except FileNotFoundError:
            return self.pump.seen


class Stopped(Exception):
    """The run was stopped from another thread."""


class MetricsReader:
    """Reads the lines that were appended to a JSONL file since the last call; a half-written last line waits."""

    def __init__(self, path: Path, offset: int = 0):
        self.path, self.offset = path, offset

    def new(self) -> Metrics:
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class _Pump(threading.Thread):
    """Moves a child's output to its log file as it comes; only the newest lines are kept for the run's own log.

    The child never waits for a server: a flood costs dropped lines on the run's page, each counted there.
    """

    def __init__(self, stream: Any, path: Path):
        super().__init__(daemon=True)
        self.stream, self.path = stream, path
        self.lines: deque[str] = deque(maxlen=SHIPPED_LINES)
        self.seen = self.shipped = 0

    def run(self) -> None:
        with self.path.open("ab") as file:
            for line in self.stream:
                # on a full disk the log ends here, but the job's pipe is emptied on, or the job would wait for ever
                with contextlib.suppress(OSError):
                    file.write(line)
                    file.flush()
                self.lines.append(line.decode(errors="replace").rstrip().rsplit("\r", 1)[-1][:2000])
                self.seen += 1

    def ship(self) -> None:
        """Log the lines since the last call as one record."""
        fresh = self.seen - self.shipped
        self.shipped += fresh
        lines = [self.lines.popleft() for _ in range(min(fresh, len(self.lines)))]
        if dropped := fresh - len(lines):
            lines.insert(0, f"… {dropped} lines not shown here, see {self.path}")
        if lines:
            log.info("%s", "\n".join(lines))
