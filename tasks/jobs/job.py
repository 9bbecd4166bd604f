"""What every job does around its work: reads job.json, leaves result.json, and says on which rank it died of what."""

import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.job_spec import JobResult, JobSpec

HALT_EXIT_CODE = 5
TERMINATED_EXIT_CODE = 143


class Halted(Exception):
    """A signal left its corridor; every rank has stopped at the same step."""

    def __init__(self, finding: dict[str, Any], last_good: dict[str, Any] | None):
        kept = f"that of step {last_good['step']}" if last_good else "none was saved"
        super().__init__(f"{finding['text']} Last checkpoint inside the corridors: {kept}.")
        self.details = {"finding": finding, "last_good": last_good}


class Interrupted(Exception):
    """The job was told to end, and saved what it had at a step's end."""

    def __init__(self):
        super().__init__("told to end by SIGTERM; it saved a checkpoint")


def run(main: Callable[[JobSpec], JobResult]) -> None:
    """Run `main` on the spec that the command line names, and exit as the pipeline expects."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED_EXIT_CODE))  # so that servers the job started are ended
    spec = JobSpec.model_validate_json(Path(sys.argv[1]).read_text())
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # who sees that the job hangs asks every rank for its stack
    (spec.work / f"rank{rank}.pid").write_text(str(os.getpid()))
    print(f"{spec.stage}: rank {rank}, world size {world_size}", flush=True)
    try:
        result = main(spec)
    except Halted as halt:
        print(f"{spec.stage}: rank {rank} halts at step {halt.details['finding']['step']}", flush=True)
        if rank == 0:
            _leave(spec.result_file, JobResult(status="halted", error=str(halt), details=halt.details))
        sys.exit(HALT_EXIT_CODE)
    except BaseException as error:
        failure = JobResult(status="failed", error=_cause(error), rank=rank)
        _leave(spec.work / f"failure.rank{rank}.json", failure)
        if isinstance(error, Interrupted):
            sys.exit(TERMINATED_EXIT_CODE)
        raise
    if rank == 0:
        _leave(spec.result_file, result)


def done(metrics: dict[str, float], **details: Any) -> JobResult:
    """Return the result of a job that did its work."""
    return JobResult(status="done", metrics=metrics, details=details)


def _cause(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/tasks/jobs/" in f.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _leave(path: Path, result: JobResult) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(result.model_dump(mode="json"), indent=1))
    os.replace(beside, path)
