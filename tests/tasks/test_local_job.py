"""One job through the launcher, with a small program in the place of the job environment's interpreter."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from profiles.schema import StagePlacement
from tasks import local_job as launcher
from tasks.errors import DriftHalted, JobFailed, MachineUnfit, RunCancelled
from tasks.job_spec import JobResult, JobSpec
from tasks.local_job import MetricsReader, job_environment, run_job

# Called as `python -m accelerate.commands.launch --config_file FILE --module MODULE job.json`, like the real one.
HEAD = """#!{python} -SE
import json, os, subprocess, sys, time
from pathlib import Path
spec = json.loads(Path(sys.argv[-1]).read_text())
work, output = Path(spec["work"]), Path(spec["output"])
def leave(name, **result):
    (work / name).write_text(json.dumps(result))
def log(step, **metrics):
    with (work / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({{"step": step, "max_steps": 3, "time": 1.0, "metrics": metrics}}) + "\\n")
"""


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    for name in ("work", "output"):
        (tmp_path / name).mkdir()
    return JobSpec(
        stage="sft", module="tasks.jobs.sft", seed=1, inputs={"rows": "/store/rows"}, config={"args": {}},
        output=tmp_path / "output", work=tmp_path / "work", checkpoints=tmp_path / "checkpoints",
    )  # fmt: skip


@pytest.fixture
def run(spec: JobSpec, tmp_path: Path) -> Callable[..., tuple[JobResult, list]]:
    """Launch a job that does `body`; return its result and every batch of metrics that was handed over."""

    def launch_fake(body: str, on_metrics: Callable | None = None, **placement) -> tuple[JobResult, list]:
        python = tmp_path / "python"
        python.write_text(HEAD.format(python=sys.executable) + body)
        python.chmod(0o755)
        batches: list = []
        settings = StagePlacement(python=str(python), **placement)
        return run_job(spec, settings, on_metrics or batches.append, threading.Event()), batches

    return launch_fake


def log_of(spec: JobSpec) -> str:
    return (spec.work / "log.txt").read_text()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_job_that_is_done_returns_what_it_left(run, spec):
    body = """
(output / "weights").write_text("w")
print("training", flush=True)
leave("result.json", status="done", metrics={"loss": 0.5}, details={"rows": 3})
"""
    result, _ = run(body)
    assert (result.status, result.metrics, result.details) == ("done", {"loss": 0.5}, {"rows": 3})
    assert (spec.output / "weights").is_file()
    assert "training" in log_of(spec)


def test_job_is_started_by_accelerate_as_a_module_with_its_spec(run, spec):
    run('leave("result.json", status="done", details={"argv": sys.argv[1:], "spec": spec})')
    details = json.loads(spec.result_file.read_text())["details"]
    launch_module, arguments = details["argv"][:2], details["argv"][2:]
    assert launch_module == ["-m", "accelerate.commands.launch"]
    assert Path(arguments[arguments.index("--config_file") + 1]).name == "cpu.yaml"
    assert arguments[-3:] == ["--module", "tasks.jobs.sft", str(spec.work / "job.json")]
    assert JobSpec.model_validate(details["spec"]) == spec


def test_job_environment_has_ours_and_the_placements_but_not_this_environments_packages(monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    monkeypatch.setenv("SEEN", "from outside")
    env = job_environment(StagePlacement(env={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}))
    assert "PYTHONHOME" not in env and "VIRTUAL_ENV" not in env
    assert (env["SEEN"], env["OMP_NUM_THREADS"], env["TOKENIZERS_PARALLELISM"]) == ("from outside", "1", "true")
    assert Path(env["PYTHONPATH"]) == Path(__file__).parents[2]  # from a checkout, the job imports `tasks` from there


def test_job_in_a_folder_with_a_tasks_of_its_own_imports_ours(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("raise SystemExit('the wrong tasks')")
    command = [sys.executable, "-m", "tasks.job_spec"]
    done = subprocess.run(command, cwd=tmp_path, env=job_environment(StagePlacement()), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_job_that_takes_no_step_for_too_long_leaves_every_ranks_stack_in_its_log(run, spec):
    body = """
import faulthandler, signal
faulthandler.register(signal.SIGUSR1, all_threads=True)
(work / "rank0.pid").write_text(str(os.getpid()))
(work / "heartbeat").touch()
def waits_for_a_lock_that_nobody_frees():
    time.sleep(60)
print("the log alone is no step", flush=True)
waits_for_a_lock_that_nobody_frees()
"""
    start = time.monotonic()
    with pytest.raises(JobFailed, match="hang_seconds 2") as failed:
        run(body, hang_seconds=2, timeout_seconds=50)
    assert failed.value.cause == "hang" and time.monotonic() - start < 30
    assert "waits_for_a_lock_that_nobody_frees" in log_of(spec)


def test_job_that_still_loads_shows_by_its_log_that_it_lives(run, spec):
    body = """
for _ in range(5):
    print("reading shard", flush=True)
    time.sleep(0.8)
leave("result.json", status="done")
"""
    result, _ = run(body, hang_seconds=2)
    assert result.status == "done"


def test_job_counts_what_it_costs_with_all_its_descendants(run, spec):
    body = """
burn = "import time\\nend = time.process_time() + 0.6\\nwhile time.process_time() < end: pass"
subprocess.run([sys.executable, "-S", "-c", burn])
subprocess.Popen([sys.executable, "-S", "-c", burn], start_new_session=True)
time.sleep(1.2)
leave("result.json", status="done")
"""
    run(body)
    [line] = [json.loads(line) for line in (spec.work / "usage.jsonl").read_text().splitlines()]
    assert line["cpu_seconds"] > 1.1 and line["wall_seconds"] > 1.1 and line["gpu_seconds"] == 0


def test_job_that_fails_names_the_error_of_the_rank_that_failed_first(run, spec):
    """The other ranks die of the first one's death; accelerate itself ends with 1 whatever they did."""
    body = """
leave("failure.rank1.json", status="failed", error="OutOfMemoryError: 80 GiB (training.py:48)", rank=1)
time.sleep(0.05)
leave("failure.rank0.json", status="failed", error="DistBackendError: peer is gone", rank=0)
sys.exit(7)
"""
    with pytest.raises(JobFailed) as failed:
        run(body)
    text = str(failed.value)
    assert failed.value.exit_code == 4 and not isinstance(failed.value, MachineUnfit)
    assert "rank 1" in text and "OutOfMemoryError: 80 GiB" in text and "peer is gone" not in text
    assert "sft" in text and "7" in text and str(spec.work / "log.txt") in text


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(3)", "3"), ("os.kill(os.getpid(), 9)", "137"), ("", "0")], ids=["exit", "killed", "clean exit"]
)
def test_job_that_leaves_no_result_fails_with_the_end_of_its_log(end, code, run, spec):
    with pytest.raises(JobFailed) as failed:
        run(f"for n in range(50):\n    print('line', n, 'end', flush=True)\n{end}")
    text = str(failed.value)
    assert "line 49 end" in text and "line 0 end" not in text
    assert code in text.split("line", 1)[0] and str(spec.work / "log.txt") in text


def test_job_that_fails_after_it_left_a_result_has_failed(run):
    with pytest.raises(JobFailed):
        run('leave("result.json", status="done")\nsys.exit(1)')


@pytest.mark.parametrize("last_good", [None, {"checkpoint": "checkpoint-8", "step": 8, "left": 4}], ids=["none kept", "kept"])
def test_job_that_halted_raises_drift_halted_with_the_finding_and_the_last_good_checkpoint(last_good, run, spec):
    body = f"""
details = {{"finding": {{"signal": "kl"}}, "last_good": {last_good!r}}}
leave("result.json", status="halted", error="kl averaged 0.9 at step 12, above its limit 0.5", details=details)
sys.exit(5)
"""
    with pytest.raises(DriftHalted) as halted:
        run(body)
    assert halted.value.exit_code == 5
    assert halted.value.last_good == last_good
    assert "kl averaged 0.9 at step 12" in str(halted.value) and str(spec.work / "log.txt") in str(halted.value)


HANGING = """
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
(work / "pids").write_text(f"{os.getpid()} {child.pid}")
print("waiting for a rank that never comes", flush=True)
time.sleep(60)
"""


def test_job_that_takes_too_long_is_ended_with_its_whole_tree(run, spec, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.3)  # a setting; what ends the tree is the real guard
    began = time.monotonic()
    with pytest.raises(JobFailed) as failed:
        run(HANGING, timeout_seconds=1)
    assert time.monotonic() - began < 30
    assert "timeout_seconds 1" in str(failed.value) and str(spec.work / "log.txt") in str(failed.value)
    assert "waiting for a rank" in log_of(spec)
    assert [pid for pid in (spec.work / "pids").read_text().split() if is_alive(int(pid))] == []


def test_job_whose_metrics_cannot_be_taken_is_ended_with_its_whole_tree(run, spec, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.3)

    def refuse(lines):
        raise ConnectionError("the tracker is gone")

    with pytest.raises(ConnectionError):
        run(HANGING, on_metrics=refuse)
    assert [pid for pid in (spec.work / "pids").read_text().split() if is_alive(int(pid))] == []


def test_job_interrupted_by_ctrl_c_is_ended_with_its_whole_tree_and_cancelled(run, spec, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.3)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it
    with pytest.raises(RunCancelled) as cancelled:
        run(HANGING, on_metrics=lambda lines: os.kill(os.getpid(), signal.SIGINT))
    signal.signal(signal.SIGINT, before)
    assert cancelled.value.exit_code == 130
    assert "sft" in str(cancelled.value) and str(spec.work / "log.txt") in str(cancelled.value)
    assert [pid for pid in (spec.work / "pids").read_text().split() if is_alive(int(pid))] == []


def test_job_that_floods_its_output_is_not_slowed_and_all_of_it_is_in_the_log(run, spec):
    body = """
began = time.monotonic()
for block in range(200):
    print("\\n".join(f"line {block * 1000 + n} of a library that talks" for n in range(1000)))
leave("result.json", status="done", details={"seconds": time.monotonic() - began})
"""
    result, _ = run(body)
    lines = log_of(spec).splitlines()
    assert len(lines) == 200_000
    assert [line.split()[1] for line in lines[::20_000]] == [str(n) for n in range(0, 200_000, 20_000)]
    assert result.details["seconds"] < 30


def test_job_that_writes_no_text_still_has_its_bytes_in_the_log(run, spec):
    run('sys.stdout.buffer.write(b"\\xff\\xfe 50%\\r100%\\n")\nleave("result.json", status="done")')
    assert (spec.work / "log.txt").read_bytes() == b"\xff\xfe 50%\r100%\n"


def test_metrics_of_a_job_are_handed_over_once_each_and_while_it_runs(run):
    body = """
log(1, kl=0.1)
time.sleep(1.6)
log(2, kl=0.2)
log(3, kl=0.3)
leave("result.json", status="done")
"""
    _, batches = run(body)
    lines = [line for batch in batches for line in batch]
    assert [(line["step"], line["metrics"]) for line in lines] == [(1, {"kl": 0.1}), (2, {"kl": 0.2}), (3, {"kl": 0.3})]
    assert lines[0] in batches[0] and lines[2] not in batches[0]


def test_metrics_of_a_job_that_fails_are_handed_over(run):
    taken: list = []
    with pytest.raises(JobFailed):
        run("log(1, kl=0.1)\nsys.exit(1)", on_metrics=taken.extend)
    assert [line["step"] for line in taken] == [1]


def test_metrics_of_the_job_that_is_restarted_are_not_handed_over_again(run, spec):
    spec.metrics_file.write_text('{"step": 1, "max_steps": 3, "time": 1.0, "metrics": {"kl": 0.1}}\n')
    _, batches = run('log(2, kl=0.2)\nleave("result.json", status="done")')
    assert [line["step"] for batch in batches for line in batch] == [2]
    assert len(spec.metrics_file.read_text().splitlines()) == 2  # and none is lost


def test_metrics_line_that_is_half_written_waits_for_its_end(tmp_path):
    reader = MetricsReader(tmp_path / "metrics.jsonl")
    assert reader.new() == []  # the file is not there yet
    with reader.path.open("wb", buffering=0) as file:
        file.write(b'{"step": 1}\n{"step"')
        assert reader.new() == [{"step": 1}]
        assert reader.new() == []
        file.write(b': 2, "text": "\xc3')  # inside a character of two bytes
        assert reader.new() == []
        file.write(b'\xa9"}\n')
        assert reader.new() == [{"step": 2, "text": "é"}]
    assert reader.new() == []


def test_job_environment_that_is_missing_is_refused_with_the_way_out(spec, tmp_path):
    placement = StagePlacement(python=str(tmp_path / "gone" / "python"))
    with pytest.raises(MachineUnfit) as refused:
        run_job(spec, placement, lambda lines: None, threading.Event())
    text = str(refused.value)
    assert str(tmp_path / "gone" / "python") in text
    assert "make install" in text and "placement.python" in text and "POSTTRAIN_JOB_PYTHON" in text


def test_job_environment_of_the_machine_is_used_where_the_profile_names_none(run, tmp_path, monkeypatch, spec):
    run('leave("result.json", status="done")')  # makes the program
    os.remove(spec.result_file)
    monkeypatch.setenv("POSTTRAIN_JOB_PYTHON", str(tmp_path / "python"))
    assert run_job(spec, StagePlacement(), lambda lines: None, threading.Event()).status == "done"


def test_job_environment_that_cannot_be_executed_is_refused_with_the_way_out(spec, tmp_path):
    (tmp_path / "python").write_text("no program")
    with pytest.raises(MachineUnfit):
        run_job(spec, StagePlacement(python=str(tmp_path / "python")), lambda lines: None, threading.Event())
