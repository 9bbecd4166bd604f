"""Where each test keeps its state, and which tests each of the two environments runs.

The job environment (torch, no prefect) runs `tests/jobs` and nothing else; the orchestrator's runs the rest.
"""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
JOB_TESTS = PROJECT / "tests" / "jobs"
HAS_TORCH = importlib.util.find_spec("torch") is not None
HAS_PREFECT = importlib.util.find_spec("prefect") is not None

# tests/ mirrors the tree, so its folders are called profiles, tasks and flows too: ours must be found first.
sys.path.insert(0, str(PROJECT))
# `import tasks` and `import prefect` read these once, before any fixture runs; no test may ever see a real run's folder.
os.environ["POSTTRAIN_HOME"] = tempfile.mkdtemp(prefix="posttrain-tests-")
os.environ["PREFECT_HOME"] = os.environ["POSTTRAIN_HOME"] + "/.prefect"
atexit.register(shutil.rmtree, os.environ["POSTTRAIN_HOME"], ignore_errors=True)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what this environment cannot import; None lets pytest decide."""
    is_job_test = collection_path == JOB_TESTS or JOB_TESTS in collection_path.parents
    if is_job_test:
        return None if HAS_TORCH else True
    if collection_path in JOB_TESTS.parents or HAS_PREFECT:
        return None
    return True


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a store, databases and runs of its own, and no server of the developer's."""
    folder = tmp_path / "home"
    monkeypatch.setenv("POSTTRAIN_HOME", str(folder))
    monkeypatch.setenv("PREFECT_HOME", str(folder / ".prefect"))
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "POSTTRAIN_GUARDED"):
        monkeypatch.delenv(name, raising=False)
    return folder
