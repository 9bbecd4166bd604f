"""Kills a pipeline run at random until N kills are done, and looks for what must never be: other results, orphans, half-truths.

    .venv/bin/python benchmarks/chaos.py --kills 100 --seed 1
    .venv/bin/python benchmarks/chaos.py --kills 100 --seed 1 --pool

One undisturbed run of the profile comes first. Then, round after round, a fresh home folder: the run is started, random
processes of its tree get random signals at random times, and what has ended is started again, until it is done. Each round's
artifacts must be the undisturbed run's to the last byte; when a run has ended no process of it may live on; and at the end of a
round MLflow and Prefect may call nothing running, and no half-written folder may lie in the store.

With --pool there is a Prefect server, which lives, and a worker, which may be killed like everything else and is started again
with the run; its pool runs every job of the run.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# small stages, a checkpoint every few seconds, and short waits: what is tested is the dying
SETTINGS = [
    "recipe.prepare.config.pretrain_steps=200",
    "recipe.policy.args.max_steps=30",
    "recipe.policy.rollouts=transformers",
    "placement.default.checkpoint_seconds=2",
    "placement.default.retry_delay_seconds=1",
    "gates.better_than=[]",
    "gates.not_worse={accuracy: null}",
    "release.promote=false",
]
URL = "PREFECT_API_URL"
DEATHS = (1, 4, 130, 137, 143, 129, -9, -15, -2, -1)  # what a run that was killed, or whose job was, may exit with
GONE_SECONDS, RUN_SECONDS, TRUTH_SECONDS, STARTS = 60, 1200, 300, 60
KINDS = {
    "guard": ("tasks/guard.py",), "vllm": ("vllm", "VLLM"), "launcher": ("accelerate.commands.launch",),
    "rank": ("tasks.jobs.",), "server": ("prefect.server", "uvicorn"), "worker": ("prefect worker",),
    "pool run": ("prefect.engine",), "run": ("flows.cli", "posttrain run"),
}  # fmt: skip


@dataclass
class Tally:
    """What was killed by what, and everything that was found wrong."""

    kills: Counter = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    rounds: int = 0

    @property
    def num_kills(self) -> int:
        return sum(self.kills.values())


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"POSTTRAIN_HOME": str(home), "NO_COLOR": "1"}


def processes(home: Path) -> dict[int, str]:
    """Return pid and command line of every living process that works for this home folder."""
    mark, found = f"POSTTRAIN_HOME={home}".encode(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                text = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if text:
                    found[int(folder.name)] = text
        except OSError:
            continue
    return found


def kind_of(text: str) -> str:
    return next((kind for kind, signs in KINDS.items() if any(sign in text for sign in signs)), "helper")


def posttrain(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "flows.cli", *arguments]


def begin(command: list[str], home: Path, log: Path) -> subprocess.Popen:
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=PROJECT, env=environment(home), stdout=file, stderr=file, start_new_session=True)


def kill_one(home: Path, rng: random.Random, tally: Tally) -> None:
    """Send a random signal to a random process of the run; the many threads and helpers of one kind count as one."""
    by_kind: dict[str, list[int]] = {}
    for pid, text in processes(home).items():
        by_kind.setdefault(kind_of(text), []).append(pid)
    if not by_kind:
        return
    kind = rng.choice(sorted(by_kind))
    number = rng.choice(SIGNALS)
    try:
        os.kill(rng.choice(by_kind[kind]), number)
    except ProcessLookupError:
        return
    tally.kills[f"{kind} by {number.name}"] += 1


def finish_round(profile: str, home: Path, rng: random.Random, tally: Tally, wanted: int, seconds: float) -> bool:
    """Start the run again and again until it is done, killing on the way; return whether it came to its end."""
    log, worker = home.with_suffix(".log"), None
    settings = [*SETTINGS, *(["placement.default.tags=[cpu]"] if URL in os.environ else [])]
    command = posttrain("run", profile, *(part for setting in settings for part in ("--set", setting)))
    for _ in range(STARTS):
        if URL in os.environ and (worker is None or worker.poll() is not None):
            worker = begin([sys.executable, "-m", "prefect", "worker", "start", "--pool", "cpu"], home, log)
        run, end = begin(command, home, log), time.monotonic() + RUN_SECONDS
        while run.poll() is None and tally.num_kills < wanted and time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(rng.uniform(0, seconds))
                break
            kill_one(home, rng, tally)
        try:
            code = run.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            tally.findings.append(f"{home.name}: a run did not end within {RUN_SECONDS} s; log {log}")
            os.killpg(run.pid, signal.SIGKILL)
            return False
        expect_nobody(home, tally, but=worker)
        print(f"round {tally.rounds}: kill {tally.num_kills}, exit {code}, {len(tally.findings)} findings", flush=True)
        if code == 0:
            end_worker(worker)
            expect_nobody(home, tally)
            return True
        if code not in DEATHS:
            tally.findings.append(f"{home.name}: exit {code}; log {log}")
    tally.findings.append(f"{home.name}: not done after {STARTS} starts; log {log}")
    end_worker(worker)
    return False


def end_worker(worker: subprocess.Popen | None) -> None:
    if worker is not None and worker.poll() is None:
        worker.terminate()
        worker.wait()


def expect_nobody(home: Path, tally: Tally, but: subprocess.Popen | None = None) -> None:
    """Wait until no process of the run is alive; one that stays is a finding, and is killed."""
    end, known = time.monotonic() + GONE_SECONDS, {but.pid} if but else set()
    while (left := {pid: text for pid, text in processes(home).items() if pid not in known}) and time.monotonic() < end:
        time.sleep(0.2)
    tally.findings += [f"{home.name}: {pid} lives on: {text[:120]}" for pid, text in left.items()]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def digests(home: Path) -> dict[str, str]:
    """Return each stage's fingerprint and digest; equal ones are equal bytes."""
    found = {}
    for path in (home / ".store").glob("[!.]*/[!.]*/manifest.json"):
        artifact = json.loads(path.read_text())["artifact"]
        found[f"{artifact['stage']}/{artifact['fingerprint']}"] = artifact["digest"]
    return found


def compare(home: Path, undisturbed: dict[str, str], tally: Tally) -> None:
    mine = digests(home)
    for name in sorted(undisturbed.keys() | mine.keys()):
        if mine.get(name) != undisturbed.get(name):
            tally.findings.append(f"{home.name}: {name} is {mine.get(name)}, undisturbed {undisturbed.get(name)}")


def expect_truth(home: Path, tally: Tally) -> None:
    """Look for what still calls itself running, and for half-written folders.

    A server notices by missed heartbeats that a process of a worker is gone, which takes minutes.
    """
    prefect = Path(os.environ.get("PREFECT_HOME", home / ".prefect"))
    running = {
        home / ".mlflow" / "mlflow.db": "select 'MLflow run ' || run_uuid from runs where status = 'RUNNING'",
        prefect / "prefect.db": "select 'Prefect run ' || name || ' ' || state_name from flow_run "
        "where state_type in ('RUNNING', 'PENDING', 'CANCELLING')",
    }  # fmt: skip
    end = time.monotonic() + (TRUTH_SECONDS if URL in os.environ else 0)
    while (said := [row for database, query in running.items() for row in ask(database, query)]) and time.monotonic() < end:
        time.sleep(5)
    tally.findings += [f"{home.name}: still running: {what}" for what in said]
    stray = [*(home / ".store").glob("*/.*"), *(home / ".checkpoints").glob("*/*/checkpoint-*")]
    tally.findings += [f"{home.name}: left behind: {path.relative_to(home)}" for path in stray]


def ask(database: Path, query: str) -> list[str]:
    with closing(sqlite3.connect(database)) as connection:
        return [row[0] for row in connection.execute(query)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--profile", default="quickstart")
    parser.add_argument("--seconds", type=float, default=60, help="from one kill to the next, at most")
    parser.add_argument("--pool", action="store_true", help="jobs run on a work pool, whose worker is a victim too")
    parser.add_argument("--keep", action="store_true", help="keep the homes of rounds without a finding, too")
    asked = parser.parse_args()
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_"))]:
        del os.environ[name]  # of nobody else's server
    rng, tally = random.Random(asked.seed), Tally()
    folder = Path(tempfile.mkdtemp(prefix="posttrain-chaos-"))
    with server(folder) if asked.pool else contextlib.nullcontext():
        rounds(asked, folder, rng, tally)
    print(f"\n{tally.num_kills} kills in {tally.rounds} rounds, {len(tally.findings)} findings (seed {asked.seed})")
    print("\n".join(f"  {count:4} {what}" for what, count in sorted(tally.kills.items())))
    print("\n".join(f"FINDING {finding}" for finding in tally.findings))
    sys.exit(1 if tally.findings else 0)


@contextmanager
def server(folder: Path) -> Iterator[None]:
    """Start a Prefect server with the shipped pools and deployments, which this process and its children then use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_API_PORT": port,
        URL: f"http://127.0.0.1:{port}/api",
    }
    os.environ["PREFECT_WORKER_QUERY_SECONDS"] = "2"
    process = begin([sys.executable, "-m", "prefect", "server", "start"], folder / "server", folder / "server.log")
    try:
        for command in (posttrain("pools"), [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]):
            while subprocess.run(command, cwd=PROJECT, env=environment(folder / "server"), capture_output=True).returncode:
                time.sleep(2)
        yield
    finally:
        process.terminate()
        process.wait()


def rounds(asked: argparse.Namespace, folder: Path, rng: random.Random, tally: Tally) -> None:
    undisturbed = folder / "undisturbed"
    finish_round(asked.profile, undisturbed, rng, tally, 0, 0)
    wanted = digests(undisturbed)
    while tally.num_kills < asked.kills and len(tally.findings) < 20:
        tally.rounds += 1
        before = len(tally.findings)
        home = folder / f"round-{tally.rounds}"
        if finish_round(asked.profile, home, rng, tally, asked.kills, asked.seconds):
            compare(home, wanted, tally)
            expect_truth(home, tally)
        if len(tally.findings) == before and not asked.keep:
            shutil.rmtree(home)


if __name__ == "__main__":
    main()
