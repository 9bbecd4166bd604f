"""One GPU, one job: a lock per device, which the kernel frees when the last process that holds it is gone.

A worker owns the devices in its CUDA_VISIBLE_DEVICES; one without that variable owns all of the machine's.
"""

import contextlib
import fcntl
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from tasks.errors import RunCancelled

WAIT_SECONDS = 1.0
log = logging.getLogger("posttrain")


def visible(env: dict[str, str]) -> list[str]:
    """Return the names of the GPUs that a job with this environment sees, in an order that is the same for everyone."""
    listed = env.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return sorted({name.strip() for name in listed.split(",")} - {"", "-1"})


@contextmanager
def held(names: list[str], holder: str, stop: threading.Event) -> Iterator[list[int]]:
    """Yield the file descriptors of the devices' locks, once all are this job's; every process that inherits one holds it on.

    Waits while another job has one of them, and says which. Raises RunCancelled if the run is stopped meanwhile.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_lock_file(name)) for name in names]
        for name, file in zip(names, files, strict=True):
            _take(name, file, holder, stop)
        yield [file.fileno() for file in files]


def _lock_file(name: str) -> IO[str]:
    folder = Path("/run/lock")
    folder = folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    path = folder / f"posttrain-gpu-{name.replace('/', '-')}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's: a lock needs no right to write
        return path.open("r")
    with contextlib.suppress(PermissionError):
        os.fchmod(descriptor, 0o666)  # whatever the umask
    return os.fdopen(descriptor, "r+")


def _take(name: str, file: IO[str], holder: str, stop: threading.Event) -> None:
    said = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not said:
                file.seek(0)
                log.warning("%s waits for GPU %s, which %s has", holder, name, file.read().strip() or "another job")
                said = True
        if stop.wait(WAIT_SECONDS):
            raise RunCancelled(f"{holder} was stopped while it waited for GPU {name}")
    if file.writable():
        file.seek(0)
        file.truncate()
        file.write(f"{holder} (process {os.getpid()})")
        file.flush()
