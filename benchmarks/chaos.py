"""Kills a pipeline run at random until N kills are done, and looks for what must never be: other results, orphans, half-truths.

    .venv/bin/python benchmarks/chaos.py --kills 100 --seed 1

One undisturbed run of the profile comes first. Then, round after round, a fresh home folder: the run is started, a random
process of its tree gets a random signal at a random time, and what is left is started again, until it is done. Each round's
artifacts must be the undisturbed run's to the last byte; after each kill no process of the run may live on; and at the end of a
round MLflow and Prefect may call nothing running, and no half-written folder may lie in the store.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
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
GONE_SECONDS = 60
KINDS = {
    "guard": ("tasks/guard.py", "flows.cli"), "vllm": ("vllm", "VLLM"), "launcher": ("accelerate.commands.launch",),
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
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return kept | {"POSTTRAIN_HOME": str(home), "NO_COLOR": "1"}


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


def start(profile: str, home: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-P", "-m", "flows.cli", "run", profile]
    command += [part for setting in SETTINGS for part in ("--set", setting)]
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=PROJECT, env=environment(home), stdout=file, stderr=file, start_new_session=True)


def kill_one(run: subprocess.Popen, home: Path, rng: random.Random, tally: Tally) -> None:
    """Send a random signal to a random process of the run; the many threads and helpers of one kind count as one."""
    by_kind: dict[str, list[int]] = {}
    for pid, text in processes(home).items():
        by_kind.setdefault(kind_of(text), []).append(pid)
    if not by_kind or run.poll() is not None:
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
    log = home.with_suffix(".log")
    for _ in range(60):
        run = start(profile, home, log)
        if tally.num_kills < wanted:
            end = time.monotonic() + rng.uniform(0, seconds)
            while run.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
            kill_one(run, home, rng, tally)
        try:
            code = run.wait(1200)
        except subprocess.TimeoutExpired:
            tally.findings.append(f"{home.name}: a run did not end within 20 minutes; log {log}")
            os.killpg(run.pid, signal.SIGKILL)
            return False
        expect_nobody(home, tally)
        print(f"round {tally.rounds}: kill {tally.num_kills}, exit {code}, {len(tally.findings)} findings", flush=True)
        if code == 0:
            return True
        if code not in (1, 4, 130, 137, 143, 129, -9, -15, -2, -1):
            tally.findings.append(f"{home.name}: exit {code}; log {log}")
    tally.findings.append(f"{home.name}: not done after 60 starts; log {log}")
    return False


def expect_nobody(home: Path, tally: Tally) -> None:
    end = time.monotonic() + GONE_SECONDS
    while (left := processes(home)) and time.monotonic() < end:
        time.sleep(0.2)
    tally.findings += [f"{home.name}: {pid} lives on: {text[:120]}" for pid, text in left.items()]
    for pid in left:
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
    """Look for what still calls itself running, and for half-written folders."""
    running = {
        home / ".mlflow" / "mlflow.db": "select 'MLflow run ' || run_uuid from runs where status = 'RUNNING'",
        home / ".prefect" / "prefect.db": "select 'Prefect run ' || name || ' ' || state_name from flow_run "
        "where state_type in ('RUNNING', 'PENDING', 'CANCELLING')",
    }  # fmt: skip
    for database, query in running.items():
        with closing(sqlite3.connect(database)) as connection:
            tally.findings += [f"{home.name}: still running: {row[0]}" for row in connection.execute(query)]
    stray = [*(home / ".store").glob("*/.*"), *(home / ".checkpoints").glob("*/*/checkpoint-*")]
    tally.findings += [f"{home.name}: left behind: {path.relative_to(home)}" for path in stray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--profile", default="quickstart")
    parser.add_argument("--seconds", type=float, default=60, help="a kill comes at a random time before this one")
    parser.add_argument("--keep", action="store_true", help="keep the homes of rounds without a finding, too")
    asked = parser.parse_args()
    rng, tally = random.Random(asked.seed), Tally()
    folder = Path(tempfile.mkdtemp(prefix="posttrain-chaos-"))
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
    print(f"\n{tally.num_kills} kills in {tally.rounds} rounds, {len(tally.findings)} findings (seed {asked.seed})")
    print("\n".join(f"  {count:4} {what}" for what, count in sorted(tally.kills.items())))
    print("\n".join(f"FINDING {finding}" for finding in tally.findings))
    sys.exit(1 if tally.findings else 0)


if __name__ == "__main__":
    main()
