"""One GPU is never given to two jobs, whichever processes ask, and whatever becomes of them."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from profiles.schema import StagePlacement
from tasks import devices
from tasks.errors import RunCancelled
from tasks.local_job import uses_cpu

HOLD = """
import sys, threading, time
from tasks.devices import held
with held(sys.argv[1:], "the other job", threading.Event()):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def name() -> str:
    """A device of this test's own: the locks are the machine's."""
    return f"test-{os.getpid()}-{time.monotonic_ns()}"


@pytest.fixture
def other(name):
    """Another process that has the device."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, name], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def stop_after(seconds: float) -> threading.Event:
    stop = threading.Event()
    threading.Timer(seconds, stop.set).start()
    return stop


def test_device_of_another_job_is_waited_for_and_named(other, name, caplog):
    with pytest.raises(RunCancelled, match=name), devices.held([name], "mine", stop_after(1.5)):
        pytest.fail("two jobs have one GPU")
    assert "the other job" in caplog.text


def test_device_is_free_again_the_moment_its_job_is_killed(other, name):
    other.send_signal(signal.SIGKILL)
    other.wait()
    with devices.held([name], "mine", stop_after(5)) as descriptors:
        assert len(descriptors) == 1


def test_device_stays_held_while_a_process_that_inherited_the_lock_lives(name):
    """The launcher's process may die: the guard of its job has the lock too."""
    with devices.held([name], "mine", threading.Event()) as descriptors:
        heir = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=descriptors)
    try:
        with pytest.raises(RunCancelled), devices.held([name], "next", stop_after(1.2)):
            pytest.fail("the heir still has it")
    finally:
        heir.kill()
        heir.wait()
    with devices.held([name], "next", stop_after(5)):
        pass


@pytest.mark.parametrize(
    ("listed", "names"), [("0,1", ["0", "1"]), ("1, 0", ["0", "1"]), ("", []), ("-1", []), ("GPU-7f", ["GPU-7f"])]
)
def test_visible_devices_are_those_of_the_variable_in_one_order_for_all(listed, names):
    assert devices.visible({"CUDA_VISIBLE_DEVICES": listed}) == names


@pytest.mark.parametrize(("file", "cpu"), [("cpu", True), ("single_gpu", False), ("ddp_8", False)])
def test_job_that_stays_off_the_gpus_takes_no_lock(file, cpu):
    assert uses_cpu(StagePlacement(accelerate=file)) is cpu
