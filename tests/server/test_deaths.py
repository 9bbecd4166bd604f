"""Every kind of death, really died: no process left, one truth in Prefect, MLflow and the exit code, and a re-run that goes on.

The victim is always the SFT of the quickstart, told to train for hours, in the middle of its steps.
"""

import json
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from real_server import BIN, PROJECT, Server, children, job_processes, wait_until

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
ENDLESS = ["recipe.sft.args.max_steps=50000", "recipe.policy.args.max_steps=2", "placement.sft.timeout_seconds=3600"]
ENDLESS += ["placement.default.retries=0"]  # a death is the end of its run; what comes after it has tests of its own
AGAIN = ["placement.default.retries=1", "placement.default.retry_delay_seconds=0", "placement.default.checkpoint_seconds=1"]
GONE_SECONDS = 45
ZOMBIE_SECONDS = 270  # five heartbeats of 30 s, and what the server takes to see it


@pytest.fixture(scope="module")
def pool(server: Server) -> Server:
    server.worker("orchestrator")
    return server


class Run:
    """A pipeline run that is in the middle of its SFT, or, if it does not train, has just begun."""

    def __init__(self, server: Server, *arguments: str, trains: bool = True):
        self.server = server
        known = set((server.home / "quickstart").glob("*"))
        command = [BIN / "posttrain", "run", "quickstart", *arguments]
        self.output = (server.folder / f"run-{len(known)}.log").open("w+")
        self.process = subprocess.Popen(
            command, cwd=PROJECT, env=server.env, stdout=self.output, stderr=self.output, start_new_session=True
        )
        self.folder = wait_until(lambda: self._folder(known), 120, self.said)
        if trains:
            wait_until(lambda: self.num_steps() >= 5, 120, self.said)

    def _folder(self, known: set[Path]) -> Path | None:
        assert self.process.poll() is None, self.said()
        new = set((self.server.home / "quickstart").glob("*")) - known
        return next((path for path in new if (path / "process.json").is_file()), None)

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def steps(self) -> list[int]:
        path = self.folder / "sft" / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()[:-1]] if path.is_file() else []

    def num_steps(self) -> int:
        return len(self.steps())

    def pid(self, part: str) -> int:
        """Return the pid of the one job process of this run with `part`, and nothing of the launcher, in its command."""
        found = self.pids(part)
        assert len(found) == 1, job_processes(self.folder)
        return found[0]

    def pids(self, part: str) -> list[int]:
        kinds = {"guard": "guard.py", "launcher": "-m accelerate.commands.launch", "rank": "-m tasks.jobs.sft"}
        order = list(kinds)
        named = {pid: next((k for k in order if kinds[k] in text), "other") for pid, text in job_processes(self.folder).items()}
        return [pid for pid, kind in named.items() if kind == part]

    def died(self, seconds: float = GONE_SECONDS + 30, after: float = 0) -> int:
        """Wait for the end of every process of its jobs, then of the command; return the exit code.

        `after` is how long the death itself is in coming.
        """
        wait_until(lambda: not job_processes(self.folder), after + GONE_SECONDS, self.said)
        return self.process.wait(seconds)

    def truth(self) -> tuple[str, str, set[str]]:
        """Return what Prefect says of the run, and MLflow of it and of its SFT."""
        process = json.loads((self.folder / "process.json").read_text())
        with sqlite3.connect(self.server.home / ".mlflow" / "mlflow.db") as database:
            status = database.execute("select status from runs where run_uuid = ?", [process["mlflow_run_id"]]).fetchone()[0]
            query = "select status from runs r join tags t using (run_uuid) where t.key = 'mlflow.parentRunId' and t.value = ?"
            stages = {row[0] for row in database.execute(query, [process["mlflow_run_id"]])}
        return self.server.flow_run(process["flow_run_id"])["state_name"], status, stages - {"FINISHED"}


def here(server: Server, *overrides: str, trains: bool = True) -> Run:
    return Run(server, *(part for override in [*ENDLESS, *overrides] for part in ("--set", override)), trains=trains)


def there(server: Server, *overrides: str) -> Run:
    return here(server, "placement.sft.tags=[cpu]", *overrides)


def deployed(server: Server) -> Run:
    sets = [part for override in [*ENDLESS, "placement.sft.tags=[cpu]"] for part in ("--set", override)]
    return Run(server, "--deployment", "ci", "--wait", *sets)


CANCELLED = (130, "Cancelled", "KILLED", {"KILLED"})
FAILED = (4, "Failed", "FAILED", {"FAILED"})


@pytest.mark.parametrize(
    ("who", "number", "end"),
    [
        ("launcher", signal.SIGKILL, FAILED),
        ("rank", signal.SIGKILL, FAILED),
        ("guard", signal.SIGKILL, FAILED),
        ("guard", signal.SIGTERM, FAILED),
    ],
)
def test_death_of_a_process_of_the_job_here(who, number, end, server):
    run = here(server)
    os.kill(run.pid(who), number)
    assert (run.died(), *run.truth()) == end


def test_one_of_two_ranks_killed_ends_both(server):
    run = here(
        server, "placement.sft.accelerate=cpu_ddp_2", "placement.sft.env={ACCELERATE_USE_CPU: 'true', OMP_NUM_THREADS: '1'}"
    )
    ranks = run.pids("rank")
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert (run.died(), *run.truth()) == FAILED


def test_rank_that_hangs_is_ended_by_the_stage_timeout_which_is_named(server):
    run = here(server, "placement.sft.timeout_seconds=40")
    os.kill(run.pid("rank"), signal.SIGSTOP)
    assert (run.died(after=40), *run.truth()) == FAILED
    assert "timeout_seconds 40" in run.said()


def test_rank_killed_is_tried_again_and_goes_on_from_its_checkpoint(server):
    run = here(server, *AGAIN)
    saved = run.server.home / ".checkpoints" / "sft"
    wait_until(lambda: list(saved.glob("*/checkpoint-*/saved")), 60, run.said)
    os.kill(run.pid("rank"), signal.SIGKILL)
    log = run.folder / "sft" / "log.txt"
    wait_until(lambda: "resume proven" in log.read_text(), 120, run.said)
    last = run.steps()[-1]
    wait_until(lambda: run.steps()[-1] > last + 8, 60, run.said)
    assert "attempt 2 of 2" in run.said() and "died" in run.said()
    os.killpg(run.process.pid, signal.SIGINT)
    assert (run.died(), *run.truth()) == (130, "Cancelled", "KILLED", {"FAILED", "KILLED"})
    [sft] = [record for record in json.loads((run.folder / "summary.json").read_text())["stages"] if record["stage"] == "sft"]
    assert "an attempt failed (died): JobFailed: sft exited with" in sft["notes"][0]
    waste = json.loads((run.folder / "summary.json").read_text())["cost"]["waste"]
    assert waste["died"]["wall_seconds"] > 0 and waste["died"]["cpu_seconds"] > 0


def test_rank_that_takes_no_step_hangs_and_is_ended(server):
    run = here(server, "placement.sft.hang_seconds=15")
    os.kill(run.pid("rank"), signal.SIGSTOP)
    assert (run.died(after=15), *run.truth()) == FAILED
    assert "hang_seconds 15" in run.said()


def test_two_runs_share_one_build_and_the_second_goes_on_where_the_first_was_stopped(server):
    first = here(server)
    second = here(server, trains=False)
    wait_until(lambda: f"waits for run {first.folder.name}" in second.said(), 120, second.said)
    assert second.num_steps() == 0
    os.killpg(first.process.pid, signal.SIGINT)
    assert first.died() == 130
    log = second.folder / "sft" / "log.txt"
    wait_until(lambda: log.is_file() and "resume proven" in log.read_text(), 120, second.said)
    os.killpg(second.process.pid, signal.SIGINT)
    assert second.died() == 130


def test_ctrl_c_once_saves_a_checkpoint_and_the_next_run_goes_on_from_it(server):
    run = here(server)
    os.killpg(run.process.pid, signal.SIGINT)
    assert (run.died(), *run.truth()) == CANCELLED
    last = run.steps()[-1]
    again = here(server)
    # the curve of the first run is there from its first step, and goes on without a gap; the profile logs every fourth
    steps = wait_until(lambda: max(again.steps(), default=0) > last + 8 and again.steps(), 60, again.said)
    assert steps == list(range(4, 4 * len(steps) + 1, 4))
    assert "goes on from" in (again.folder / "sft" / "log.txt").read_text()
    os.killpg(again.process.pid, signal.SIGINT)
    assert again.died() == 130


def test_ctrl_c_twice_kills_at_once_and_is_swept(server):
    run = here(server)
    os.kill(run.pid("rank"), signal.SIGSTOP)  # it cannot save anything: the first Ctrl-C would wait out the grace
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(1)
    start = time.monotonic()
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.died() == 130 and time.monotonic() - start < 10
    assert server.posttrain("sweep").returncode == 0
    assert run.truth() == ("Crashed", "FAILED", {"FAILED"})


def test_run_process_killed_is_swept_by_the_command_that_started_it(server):
    run = here(server)
    guard = children(run.process.pid)[0]
    os.kill(children(guard)[0], signal.SIGKILL)
    assert run.died() == 137
    assert run.truth() == ("Crashed", "FAILED", {"FAILED"})
    assert json.loads((run.folder / "summary.json").read_text())["status"] == "crashed"


def test_command_and_all_killed_is_swept_by_the_next_run(server):
    run = here(server)
    guard = children(run.process.pid)[0]
    for pid in (run.process.pid, guard, *children(guard)):
        os.kill(pid, signal.SIGKILL)
    run.process.wait()
    wait_until(lambda: not job_processes(run.folder), GONE_SECONDS, run.said)
    following = here(server)
    assert run.truth() == ("Crashed", "FAILED", {"FAILED"})
    os.killpg(following.process.pid, signal.SIGINT)
    assert following.died() == 130


def test_cancelled_in_the_ui_ends_the_job_on_its_pool_and_saves_a_checkpoint(pool):
    worker = pool.worker("cpu")
    run = deployed(pool)
    process = json.loads((run.folder / "process.json").read_text())
    state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
    pool.api(f"/flow_runs/{process['flow_run_id']}/set_state", state)
    assert (run.died(), *run.truth()) == CANCELLED
    assert list((pool.home / ".checkpoints" / "sft").glob("*/checkpoint-*/saved"))
    assert pool.flow_runs("sft-")[-1]["state_name"] == "Cancelled"
    worker.stdin.close()
    worker.wait()


def test_worker_terminated_fails_the_run_and_the_next_goes_on_from_the_checkpoint(pool):
    worker = pool.worker("cpu")
    run = there(pool)
    os.kill(children(worker.pid)[0], signal.SIGTERM)
    # Prefect's worker kills its runs when it is told to stop, and leaves them Running: the automation sees it by the heartbeat
    assert (run.died(ZOMBIE_SECONDS), *run.truth()) == FAILED
    assert "ended as Crashed" in run.said()
    assert list((pool.home / ".checkpoints" / "sft").glob("*/checkpoint-*/saved"))
    worker.wait()


def test_worker_killed_lets_its_job_go_on_and_it_can_still_be_cancelled(pool):
    worker = pool.worker("cpu", alone=True)
    run = there(pool)
    os.kill(worker.pid, signal.SIGKILL)
    before = run.num_steps()
    wait_until(lambda: run.num_steps() > before + 5, 60, run.said)
    os.killpg(run.process.pid, signal.SIGINT)
    assert (run.died(), *run.truth()) == CANCELLED
    worker.wait()


def test_flow_process_of_the_job_killed_fails_the_run(pool):
    worker = pool.worker("cpu")
    run = there(pool)
    guard = run.pid("guard")
    os.kill(int(Path(f"/proc/{guard}/stat").read_text().rsplit(")", 1)[1].split()[1]), signal.SIGKILL)
    assert (run.died(), *run.truth()) == FAILED
    worker.stdin.close()
    worker.wait()


def test_flow_process_of_the_run_killed_ends_the_job_on_its_pool(pool):
    worker = pool.worker("cpu")
    run = deployed(pool)
    process = json.loads((run.folder / "process.json").read_text())
    os.kill(process["pid"], signal.SIGKILL)
    assert run.died() == 1
    assert pool.posttrain("sweep").returncode == 0
    assert run.truth() == ("Crashed", "FAILED", {"FAILED"})
    worker.stdin.close()
    worker.wait()
