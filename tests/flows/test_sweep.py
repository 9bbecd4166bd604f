"""A run that died between its start in Prefect and its folder is ended by the next sweep, if nobody may still open it."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.pipeline_run import others_starting, starting

PROJECT = Path(__file__).resolve().parents[2]
BEGIN = """
from prefect.client.orchestration import get_client
from prefect.states import Running
from flows.post_training import post_training
with get_client(sync_client=True) as client:
    client.create_flow_run(post_training, parameters={"profile": "quickstart"}, state=Running())
"""


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-P", *arguments], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(240)
def test_run_without_a_folder_is_ended_once_no_living_process_is_about_to_open_it(home):
    python("-c", f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n{BEGIN}")
    with starting():
        assert "no run is dead" in python("-m", "flows.cli", "sweep")
    assert "died before it opened a run" in python("-m", "flows.cli", "sweep")
    with sqlite3.connect(home / ".prefect" / "prefect.db") as database:
        assert database.execute("select state_name from flow_run").fetchall() == [("Crashed",)]


def test_process_that_died_while_it_started_is_forgotten(home):
    dead = subprocess.run(
        [sys.executable, "-c", "import os\nfrom tasks.pipeline_run import starting\nwith starting(): os.kill(os.getpid(), 9)"],
        cwd=PROJECT,
    )
    assert dead.returncode == -9 and len(list((home / ".starting").iterdir())) == 1
    assert not others_starting() and not list((home / ".starting").iterdir())
    with starting():
        assert not others_starting()  # this process is no other
