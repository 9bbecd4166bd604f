"""A cron deployment of prefect.yaml really yields scheduled runs: with SQLAlchemy 2.1 it silently never would."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tasks.guard import guarded

PROJECT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


@pytest.fixture
def server(tmp_path):
    """A real Prefect server on its own database; its whole process tree ends with the fixture."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
    }
    command = guarded([sys.executable, "-m", "prefect", "server", "start"], 5)
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, start_new_session=True)
    end = time.monotonic() + 120
    while not answers(env["PREFECT_API_URL"] + "/health"):
        assert time.monotonic() < end and process.poll() is None, (tmp_path / "server.log").read_text()
        time.sleep(0.5)
    yield env
    process.stdin.close()
    process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def prefect(env: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments], cwd=PROJECT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prefect_yaml_deployed_yields_a_scheduled_run_of_the_nightly_deployment(server):
    prefect(server, "work-pool", "create", "orchestrator", "--type", "process")
    prefect(server, "deploy", "--all")
    end = time.monotonic() + 90
    listing = ["flow-run", "ls", "--flow-name", "post-training", "--output", "json"]
    while not (runs := json.loads(prefect(server, *listing))):
        assert time.monotonic() < end, "no scheduled run after 90 s"
        time.sleep(2)
    assert {run["state"]["type"] for run in runs} == {"SCHEDULED"}
