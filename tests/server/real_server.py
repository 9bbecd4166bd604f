"""A real Prefect server, real workers in processes of their own, the command line on them, and who is alive."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.guard import guarded

PROJECT = Path(__file__).resolve().parents[2]
BIN = Path(sys.prefix) / "bin"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(what: Callable[[], Any], seconds: float, or_else: Callable[[], Any] = lambda: "") -> Any:
    """Return the first true value of `what()`; fail with `or_else()` when it takes longer."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, or_else()
        time.sleep(0.2)
    return found


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


class Server:
    """A Prefect server on its own database, a home folder, and what runs against them."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.port = folder, port
        self.home = folder / "home"
        self.url = f"http://127.0.0.1:{port}/api"
        self.env = os.environ | {
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_API_URL": self.url,
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            # On SQLite, Prefect 3.8.8's marking of late runs meets the workers' polls, and then locked everybody out for 60 s.
            "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
            "POSTTRAIN_HOME": str(self.home),
        }
        self.processes: list[subprocess.Popen] = []
        self.process = self.start_server()

    def start_server(self) -> subprocess.Popen:
        process = self.start("server", [BIN / "prefect", "server", "start"], {})
        wait_until(lambda: answers(self.url + "/health"), 120, (self.folder / "server.log").read_text)
        return process

    def start(self, name: str, command: list[Any], env: dict[str, str], alone: bool = False) -> subprocess.Popen:
        """Start a process under the guard: its whole tree ends with the pipe, whatever happens to this test.

        One that is started `alone` has no guard: what it started lives on when it is killed.
        """
        command = [str(part) for part in command]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command if alone else guarded(command, 5), stdin=subprocess.PIPE, stdout=log, stderr=log,
                env=self.env | env, start_new_session=True, cwd=PROJECT,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def worker(self, pool: str, alone: bool = False, **env: str) -> subprocess.Popen:
        """Start a worker and wait until the server knows that its pool has a live one."""
        number = sum(1 for _ in self.folder.glob(f"worker-{pool}-*.log"))
        command = [BIN / "prefect", "worker", "start", "--pool", pool, "--name", f"{pool}-{number}"]
        process = self.start(f"worker-{pool}-{number}", command, env, alone)
        log = self.folder / f"worker-{pool}-{number}.log"
        wait_until(lambda: "started!" in log.read_text(), 60, log.read_text)
        return process

    def prefect(self, *arguments: str, cwd: Path = PROJECT) -> str:
        command = [BIN / "prefect", "--no-prompt", *arguments]
        done = subprocess.run(command, cwd=cwd, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def posttrain(self, *arguments: str, **env: str) -> subprocess.CompletedProcess:
        command = [BIN / "posttrain", *arguments]
        return subprocess.run(command, cwd=PROJECT, env=self.env | env, capture_output=True, text=True)

    def api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return what the server's API answers: a GET, or a POST of `body`."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")

    def flow_runs(self, name_contains: str = "", **kwargs: Any) -> list[dict[str, Any]]:
        runs = self.api("/flow_runs/filter", {"limit": 200, "sort": "START_TIME_ASC"} | kwargs)
        return [run for run in runs if name_contains in run["name"] and run["state_type"] != "SCHEDULED"]

    def flow_run(self, flow_run_id: str) -> dict[str, Any]:
        return self.api(f"/flow_runs/{flow_run_id}")

    def stop(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.stdin.close()
                process.terminate()
        for process in self.processes:
            process.wait()


JOB = re.compile(rb"POSTTRAIN_JOB=([^\0]*)")


def job_processes(home: Path) -> dict[int, str]:
    """Return the living processes of jobs of this home folder: pid -> its command line."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        folder = Path("/proc") / name
        with contextlib.suppress(OSError):
            marker = JOB.search((folder / "environ").read_bytes())
            if marker and marker.group(1).decode().startswith(str(home)) and is_alive(int(name)):
                found[int(name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
