"""One build of an artifact at a time: of two runs that want the same one, the second waits and takes what the first made.

A lease is a file lock in the store's folder, so it also holds between machines that share that folder. The kernel is its
heartbeat: the lock is freed with its holder, and a file server frees that of a machine which is gone (NFSv4: after 90 s).
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.artifacts import disk_errors
from tasks.errors import RunCancelled

POLL_SECONDS = 1.0
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
log = logging.getLogger("posttrain")


@contextmanager
def lease(store: Path, stage: str, key: str, holder: str, stop: threading.Event) -> Iterator[None]:
    """Hold the one right to build `stage/key` in this store; waits for who has it, and says who that is.

    Raises RunCancelled if the run is stopped meanwhile. On a file system without locks there is no lease, with a warning: of
    two equal builds the first to end is kept.
    """
    path = store / ".leases" / f"{stage}-{key}"
    with disk_errors(store):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with os.fdopen(descriptor, "r+") as file:
        waits = False
        while not _taken(file.fileno(), path):
            if not waits:
                log.warning("%s: waits for %s, which builds it already", stage, _holder(path))
            waits = True
            if stop.wait(POLL_SECONDS):
                raise RunCancelled(f"{stage} was stopped while it waited for the build of {_holder(path)}")
        file.seek(0)
        file.truncate()
        json.dump({"holder": holder, "host": socket.gethostname(), "pid": os.getpid()}, file)
        file.flush()
        yield


def _taken(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        log.warning("%s cannot be locked (%s): two runs may build the same artifact at once", path, error.strerror)
    return True


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text())
        return f"run {who['holder']} (process {who['pid']} on {who['host']})"
    except (OSError, ValueError, KeyError):  # it has just taken it
        return "another run"
