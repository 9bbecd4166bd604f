"""The guard lets no descendant outlive the command or the caller, in whatever way each of them ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks import guard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard is a child subreaper, which is Linux")
GRACE_SECONDS = 0.3
SLEEPER = "import time; time.sleep(60)"
# each tells its process id before it does anything else
TELL = "import os, sys; open(sys.argv[1] + '/' + str(os.getpid()), 'w').close(); "
STUBBORN = TELL + "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER
PATIENT = TELL + SLEEPER


def guarded(*command: str, grace_seconds: float = GRACE_SECONDS) -> list[str]:
    return guard.guarded(list(command), grace_seconds)


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-S", "-E", "-c", code, *arguments]


def family(folder: Path, *, child: str, grandchild: str, detached: bool) -> list[str]:
    """Return a command that starts `grandchild`, in a session of its own if `detached`, and then is `child`."""
    born = f"subprocess.Popen([sys.executable, '-S', '-c', {grandchild!r}, sys.argv[1]], start_new_session={detached})"
    return python(f"import subprocess, sys; {born}; {child}", str(folder))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def pids(folder: Path, count: int) -> list[int]:
    """Return the processes that told of themselves, once there are `count`."""
    wait_for(lambda: len(list(folder.iterdir())) >= count)
    return [int(path.name) for path in folder.iterdir()]


@pytest.fixture
def told(tmp_path):
    """The folder in which processes tell of themselves; whatever a failed test leaves is ended."""
    folder = tmp_path / "told"
    folder.mkdir()
    yield folder
    for path in folder.iterdir():
        if is_alive(int(path.name)):
            os.kill(int(path.name), signal.SIGKILL)


@pytest.mark.parametrize("code", [0, 1, 5, 255])
def test_guard_passes_an_exit_code_on(code):
    process = start(guarded(*python(f"raise SystemExit({code})")))
    assert process.wait() == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_guard_reports_a_command_that_died_of_a_signal_as_a_shell_does(number):
    process = start(guarded(*python(f"import os; os.kill(os.getpid(), {int(number)})")))
    assert process.wait() == 128 + number


def test_guard_hands_its_output_and_environment_to_the_command():
    process = subprocess.Popen(
        guarded(*python("import os; print(os.environ['MARK'])")),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"MARK": "seen"},
    )
    assert process.stdout.read() == b"seen\n"
    assert process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_guard_that_is_asked_to_end_lets_the_command_finish_its_own_way(number, tmp_path):
    """The command gets TERM, not KILL, and time to save."""
    save = "def save(*_):\n    time.sleep(0.2)\n    open(sys.argv[1] + '/saved', 'w').close()\n    sys.exit(3)\n"
    code = f"import signal, sys, time\n{save}signal.signal(signal.SIGTERM, save)\n"
    code += f"open(sys.argv[1] + '/ready', 'w').close()\n{SLEEPER}"
    process = start(guarded(*python(code, str(tmp_path)), grace_seconds=10))
    wait_for((tmp_path / "ready").exists)
    process.send_signal(number)
    assert process.wait() == 3
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("detached", [False, True], ids=["same session", "own session"])
@pytest.mark.parametrize("grandchild", [PATIENT, STUBBORN], ids=["patient", "ignores TERM"])
def test_guard_whose_caller_closes_the_pipe_leaves_no_descendant(grandchild, detached, told):
    process = start(guarded(*family(told, child=STUBBORN, grandchild=grandchild, detached=detached)))
    tree = pids(told, 2)
    process.stdin.close()
    assert process.wait() == 128 + signal.SIGKILL
    assert [pid for pid in tree if is_alive(pid)] == []


def test_guard_whose_caller_is_killed_leaves_no_descendant(told, tmp_path):
    command = guarded(*family(told, child=STUBBORN, grandchild=STUBBORN, detached=True))
    note = tmp_path / "guard"
    code = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen({command!r}, stdin=subprocess.PIPE, start_new_session=True); "
        f"open(sys.argv[1], 'w').write(str(p.pid)); {SLEEPER}"
    )
    caller = subprocess.Popen(python(code, str(note)))
    tree = pids(told, 2)
    caller.kill()
    caller.wait()
    tree.append(int(note.read_text()))
    wait_for(lambda: not any(is_alive(pid) for pid in tree), seconds=GRACE_SECONDS + 10)


def test_guard_whose_command_ends_leaves_no_daemon_of_it(told):
    """A grandchild that detached by the double fork is an orphan at once: only a subreaper still finds it."""
    daemon = f"import os; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); {STUBBORN}"
    process = start(guarded(*family(told, child="sys.exit(0)", grandchild=daemon, detached=False)))
    assert process.wait() == 0
    assert [pid for pid in pids(told, 1) if is_alive(pid)] == []


def test_guard_does_not_wait_for_the_grace_when_all_end_by_themselves(told):
    began = time.monotonic()
    process = start(guarded(*python(PATIENT, str(told)), grace_seconds=60))
    pids(told, 1)
    process.stdin.close()
    assert process.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - began < 30
