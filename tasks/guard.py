"""Runs one command and lets none of its descendants outlive it, or outlive the process that asked for it.

`python guard.py GRACE_SECONDS TELL -- COMMAND…`, started in a session of its own with a pipe as standard input. The guard is
the child subreaper of everything below it (Linux), so orphaned grandchildren become its children. End of file on the
pipe means that the asking process is gone, in whatever way, SIGKILL included. On that, or on TERM or INT, the command
gets TERM, then after the grace every descendant gets KILL until none is left. The command's exit code is passed on.
Standard library only: it starts in milliseconds, before anything heavy is imported.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

MARKER = "POSTTRAIN_JOB"  # the work folder of the job that a process belongs to
NUM_GPUS = "POSTTRAIN_NUM_GPUS"  # how many GPUs the job holds
USAGE = "usage.jsonl"  # in the work folder: a line per job that ran in it
PR_SET_CHILD_SUBREAPER = 36
KILL_SECONDS = 20.0
SETTLE_SECONDS = 2.0  # what a finished command's helpers get to end by themselves


def guarded(command: list[str], grace_seconds: float, tell: str = "command") -> list[str]:
    """Return the command line that runs `command` under the guard; start it with a pipe for standard input.

    `tell` is who gets TERM first: the "command" alone, or with it its "children": a launcher of one process passes none on.
    """
    return [sys.executable, "-S", "-E", __file__, str(grace_seconds), tell, "--", *command]


def main(grace_seconds: float, tell: str, command: list[str]) -> int:
    """Return the command's exit code, as a shell would report it, when no descendant is alive any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    start, stop = time.monotonic(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_watch_pipe, args=(stop,), daemon=True).start()
    while child.poll() is None and not stop.wait(0.1):
        pass
    if child.poll() is None:
        for pid in (*(_children(child.pid) if tell == "children" else []), child.pid):
            _signal(pid, signal.SIGTERM)
    _wait(child, grace_seconds if stop.is_set() else SETTLE_SECONDS)
    _kill_descendants()
    code = child.wait()
    if work := os.environ.get(MARKER):
        _tell_usage(work, time.monotonic() - start)
    return code if code >= 0 else 128 - code


def _watch_pipe(stop: threading.Event) -> None:
    while os.read(0, 1):
        pass
    stop.set()


def _wait(child: subprocess.Popen, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and (child.poll() is None or _descendants()):
        time.sleep(0.05)


def _kill_descendants() -> None:
    while alive := _descendants():
        for pid in alive:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.05)


def _tell_usage(work: str, seconds: float) -> None:
    """Add what the job cost to the ledger in its work folder, once every descendant is reaped and so counted."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    gpus = int(os.environ.get(NUM_GPUS, "0"))
    line = {"wall_seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "gpu_seconds": seconds * gpus}
    with contextlib.suppress(OSError), open(os.path.join(work, USAGE), "a") as file:
        file.write(json.dumps({name: round(value, 2) for name, value in line.items()}) + "\n")


def kill_marked(variable: str, value: str) -> list[int]:
    """Kill every process that has `variable=value`, or a path below that value, in its environment: where no guard is left.

    Returns who is still there: a process in a device's or a dead disk's wait cannot be killed.
    """
    end = time.monotonic() + KILL_SECONDS
    while (alive := marked(variable, value)) and time.monotonic() < end:
        for pid in alive:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.05)
    return alive


def marked(variable: str, value: str) -> list[int]:
    """Return the living processes that have `variable=value`, or a path below that value, in their environment."""
    entries = (f"{variable}={value}\0".encode(), f"{variable}={value}/".encode())
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and not _is_zombie(int(name)):
                with open(f"/proc/{name}/environ", "rb") as file:
                    environment = b"\0" + file.read() + b"\0"
                if any(b"\0" + entry in environment for entry in entries):
                    found.append(int(name))
    return [pid for pid in found if pid != os.getpid()]


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _descendants() -> list[int]:
    found: list[int] = []
    todo = _children(os.getpid())
    while todo:
        pid = todo.pop()
        if not _is_zombie(pid):
            found.append(pid)
        todo += _children(pid)
    return found


def _children(pid: int) -> list[int]:
    children: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                children += [int(child) for child in file.read().split()]
    except OSError:
        pass
    return children


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2], sys.argv[4:]))
