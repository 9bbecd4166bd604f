"""`posttrain doctor`: what this machine has against what a run needs; each line is ok, or says what to do."""

import base64
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from profiles.schema import StagePlacement
from tasks.environment import home
from tasks.errors import MachineUnfit
from tasks.fingerprints import PROJECT
from tasks.local_job import job_python

FREE_GB = 5


@dataclass(frozen=True)
class Check:
    """One line of the doctor's: `remedy` says what to do where it is not ok."""

    ok: bool
    what: str
    remedy: str = ""


def checks() -> list[Check]:
    """Return every check of this machine."""
    return [*environments(), *hardware(), *disk(), *servers()]


def environments() -> Iterator[Check]:
    """Hold the versions of both environments against the pinned sets."""
    yield versions("orchestrator", Path(sys.executable), "orchestrator.txt")
    try:
        python = job_python(StagePlacement())
    except MachineUnfit as error:
        yield Check(False, "job environment", str(error))
        return
    yield versions("job environment", python, "job-gpu.txt" if has_gpu() else "job-cpu.txt")


def versions(name: str, python: Path, lock: str) -> Check:
    """Compare an environment's installed versions with a lock file of requirements/."""
    folders = [str(path) for path in (python.parent.parent / "lib").glob("python3*/site-packages")]
    installed = {normal(d.name): d.version.split("+")[0] for d in distributions(path=folders) if d.name}
    pins = dict(line.split(" ")[0].split("==") for line in lock_lines(lock))
    wrong = [f"{n} {installed.get(normal(n), 'absent')} (pinned {v})" for n, v in pins.items() if installed.get(normal(n)) != v]
    if not wrong:
        return Check(True, f"{name}: {len(pins)} packages as pinned ({python})")
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return Check(False, f"{name}: {', '.join(wrong[:5])}{more}", f"make clean install{' JOB=gpu' if 'gpu' in lock else ''}")


def lock_lines(lock: str) -> list[str]:
    path = PROJECT / "requirements" / lock
    return (
        [line for line in path.read_text().splitlines() if "==" in line and not line.startswith("#")] if path.is_file() else []
    )


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def hardware() -> Iterator[Check]:
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    enough = memory_gb >= 7
    yield Check(enough, f"{os.cpu_count()} CPU cores, {memory_gb:.0f} GiB memory", "the quickstart wants 8 GiB")
    if not has_gpu():
        yield Check(True, "no GPU: profiles with accelerate: cpu run here")
        return
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    yield Check(found.returncode == 0, found.stdout.strip() or "nvidia-smi fails", "the GPU driver does not answer")


def disk() -> Iterator[Check]:
    folder = home()
    while not folder.exists():
        folder = folder.parent
    free_gb = shutil.disk_usage(folder).free / 2**30
    remedy = f"free {FREE_GB} GiB there, or set POSTTRAIN_HOME to another disk"
    yield Check(free_gb >= FREE_GB, f"{free_gb:.0f} GiB free for {home()}", remedy)
    yield Check(os.access(folder, os.W_OK), f"{folder} can be written", "set POSTTRAIN_HOME to a folder of yours")


def servers() -> Iterator[Check]:
    """Ask the servers that the environment names what only a known user is told; without one, runs use the embedded ones."""
    env = os.environ
    mlflow_user = f"{env.get('MLFLOW_TRACKING_USERNAME', '')}:{env.get('MLFLOW_TRACKING_PASSWORD', '')}".strip(":")
    yield server(
        "Prefect", "PREFECT_API_URL", "/admin/version", env.get("PREFECT_API_AUTH_STRING", ""), "PREFECT_API_AUTH_STRING"
    )
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    yield server("MLflow", "MLFLOW_TRACKING_URI", path, mlflow_user, "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")


def server(name: str, variable: str, path: str, user: str, settings: str) -> Check:
    """Check one server; `user` is `name:password`, which `settings` hold."""
    address = os.environ.get(variable, "")
    if not address.startswith("http"):
        return Check(True, f"{name}: {variable} is not set, runs use {name}'s embedded mode")
    headers = {"Authorization": "Basic " + base64.b64encode(user.encode()).decode()} if user else {}
    remedy = f"start it, or unset {variable} to use the embedded mode"
    try:
        with urllib.request.urlopen(urllib.request.Request(address.rstrip("/") + path, headers=headers), timeout=5):
            return Check(True, f"{name} at {address}", remedy)
    except urllib.error.HTTPError as error:
        refused = error.code in (401, 403)
        what = f"{name} at {address} answers {error.code}"
        return Check(False, what, f"set {settings}" if refused else f"look at the log of {name}'s server")
    except OSError:
        return Check(False, f"{name} at {address}", remedy)
