"""What a job died of: the class decides whether another attempt can mend it, the text is the root cause that a person reads.

Told from what the ranks left in the work folder: each writes `rank<n>.pid` when it starts and `failure.rank<n>.json` when an
error ends it. A rank that started and left neither a failure nor a result was killed from outside, or crashed below Python.
"""

import re
from pathlib import Path

from tasks.job_spec import JobResult

OUT_OF_MEMORY, HANG, PREEMPTED, DIED = "out of memory", "hang", "preempted", "died"
COLLECTIVE, HICCUP, TIMEOUT, BUG = "collective", "hiccup", "timeout", "bug"
# by the error's own text, for each is raised by several libraries under several classes
SIGNS = (
    (OUT_OF_MEMORY, r"OutOfMemoryError|MemoryError|CUDA out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED"),
    (PREEMPTED, r"^(Interrupted|SystemExit)\b"),
    (COLLECTIVE, r"NCCL|DistBackendError|DistNetworkError|DistStoreError|[Gg]loo|Connection (closed|reset) by peer"),
    (HICCUP, r"(Connect|Connection|ReadTimeout|RemoteProtocol)\w*Error|ConnectTimeout|ReadTimeout|name resolution"),
)


def forget(work: Path) -> None:
    """Remove what an earlier attempt in the same folder left to be diagnosed."""
    for pattern in ("rank*.pid", "failure.rank*.json", "result.json", "heartbeat"):
        for path in work.glob(pattern):
            path.unlink()


def diagnose(work: Path, log_file: Path) -> tuple[str, str]:
    """Return the class and the root cause of a job that ended without a result."""
    started = {int(path.stem[4:]) for path in work.glob("rank*.pid")}
    failures = {int(path.stem[12:]): path for path in work.glob("failure.rank*.json")}
    silent = sorted(started - set(failures))
    first = min(failures.values(), key=lambda path: path.stat().st_mtime, default=None)
    if first is not None:
        failure = JobResult.model_validate_json(first.read_text())
        cause = classify(failure.error or "")
        if not (cause == COLLECTIVE and silent):  # a rank that was killed makes the others lose their connection to it
            return cause, f"rank {failure.rank}: {failure.error}"
    if silent:
        ranks = ", ".join(map(str, silent))
        return (
            DIED,
            f"rank {ranks} ended without a word: killed (by the kernel for its memory?) or crashed\n{tail(log_file)}",
        )
    return BUG, f"it left no result; its last lines:\n{tail(log_file)}"


def classify(error: str) -> str:
    """Return the class of an error's text, `Class: message`."""
    return next((cause for cause, signs in SIGNS if re.search(signs, error)), BUG)


def tail(log_file: Path, lines: int = 8) -> str:
    return "\n".join(f"  {line}" for line in log_file.read_text(errors="replace").splitlines()[-lines:])
