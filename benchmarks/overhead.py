"""What a stage costs beside its job: its wall time in a run against the same job started by bare `accelerate launch`.

    .venv/bin/python benchmarks/overhead.py --rounds 3                 inline
    PREFECT_API_URL=… .venv/bin/python benchmarks/overhead.py --pool   through the pool `cpu`, whose worker polls every second

Each round trains the quickstart anew: another seed, no reward model, so that one job runs at a time, and a gate that ends it
before the merge. Then it runs each of its jobs bare, twice, from the same job.json, here. The quicker of the two counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
STAGES = ("sft", "grpo", "evaluate")
SMALL = ("recipe.sft.args.max_steps=60", "recipe.policy.args.max_steps=2", "gates.floors={accuracy: 0.999}")
ALONE = ("recipe.reward_model=null", "recipe.policy.reward_functions=[{name: near_answer}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pool", action="store_true", help="place the jobs on the pool with the tag cpu")
    asked = parser.parse_args()
    extra: dict[str, list[float]] = {stage: [] for stage in STAGES}
    ratio: dict[str, list[float]] = {stage: [] for stage in STAGES}
    with tempfile.TemporaryDirectory() as home:
        for number in range(asked.rounds):
            for stage, seconds, job in run(Path(home), seed=100 + number, pool=asked.pool):
                bare = min(run_bare(job), run_bare(job))
                extra[stage].append(seconds - bare)
                ratio[stage].append(seconds / bare)
    print(f"{'stage':14} {'extra seconds, median':>22} {'least':>7} {'most':>7} {'ratio, median':>14}")
    for stage, values in extra.items():
        row = (statistics.median(values), min(values), max(values), statistics.median(ratio[stage]))
        print(f"{stage:14} {row[0]:22.1f} {row[1]:7.1f} {row[2]:7.1f} {row[3]:14.2f}")


def run(home: Path, seed: int, pool: bool) -> list[tuple[str, float, Path]]:
    """Run the small quickstart; return each stage's seconds and its job.json."""
    sets = [f"recipe.seed={seed}", *SMALL, *ALONE, *(["placement.default.tags=[cpu]"] if pool else [])]
    command = [sys.executable, "-P", "-m", "flows.cli", "run", "quickstart", "--json"]
    command += [part for setting in sets for part in ("--set", setting)]
    env = os.environ if pool else os.environ | {"POSTTRAIN_HOME": str(home)}
    done = subprocess.run(command, cwd=PROJECT, env=env, stdout=subprocess.PIPE, text=True)
    summary = json.loads(done.stdout)
    folder = Path(summary["report"]).parent
    return [(s["stage"], s["seconds"], folder / s["stage"] / "job.json") for s in summary["stages"] if s["stage"] in STAGES]


def run_bare(job: Path) -> float:
    """Run the job of a job.json again, without anything of ours around it; return its seconds."""
    spec = json.loads(job.read_text())
    with tempfile.TemporaryDirectory() as folder:
        for name in ("output", "work", "checkpoints"):
            (Path(folder) / name).mkdir()
            spec[name] = str(Path(folder) / name)
        own = Path(folder) / "job.json"
        own.write_text(json.dumps(spec))
        python = os.environ.get("POSTTRAIN_JOB_PYTHON", str(PROJECT / ".venv-job" / "bin" / "python"))
        command = [
            python,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            PROJECT / "profiles" / "accelerate" / "cpu.yaml",
        ]
        env = os.environ | {"PYTHONPATH": str(PROJECT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        subprocess.run([*command, "--module", spec["module"], own], env=env, check=True, capture_output=True)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
