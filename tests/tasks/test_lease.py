"""Of two processes that want to build the same artifact the second waits, and a dead one's lease is free at once."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.errors import RunCancelled
from tasks.lease import lease

PROJECT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, threading, time
from pathlib import Path
from tasks.lease import lease
with lease(Path(sys.argv[1]), "sft", "abc", "run-1", threading.Event()):
    print("has it", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(store: Path, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, store, str(seconds)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "has it\n"
    return process


def test_second_build_waits_for_the_first_and_says_for_whom(tmp_path, caplog):
    first = holder(tmp_path, 2)
    start = time.monotonic()
    with lease(tmp_path, "sft", "abc", "run-2", threading.Event()):
        assert first.wait(5) == 0
    assert time.monotonic() - start > 1
    assert "run run-1" in caplog.text and f"process {first.pid}" in caplog.text


def test_killed_holders_lease_is_free(tmp_path):
    first = holder(tmp_path, 600)
    first.send_signal(signal.SIGKILL)
    first.wait()
    start = time.monotonic()
    with lease(tmp_path, "sft", "abc", "run-2", threading.Event()):
        assert time.monotonic() - start < 5


def test_builds_of_other_artifacts_and_in_other_stores_do_not_wait(tmp_path):
    never = threading.Event()
    first = holder(tmp_path / "a", 600)
    start = time.monotonic()
    with lease(tmp_path / "a", "sft", "abd", "run-2", never), lease(tmp_path / "b", "sft", "abc", "run-2", never):
        assert time.monotonic() - start < 1
    first.kill()
    first.wait()


def test_run_that_is_stopped_waits_no_longer(tmp_path):
    first = holder(tmp_path, 600)
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(RunCancelled, match="run-1"), lease(tmp_path, "sft", "abc", "run-2", stop):
        pytest.fail("two have it")
    first.kill()
    first.wait()
