"""Do the detectors see a collapse, how soon, and do they spare healthy runs? Real GRPO runs of the quickstart's tiny model.

    .venv-job/bin/python benchmarks/drift.py                        all runs, two at a time: about half an hour
    .venv-job/bin/python benchmarks/drift.py --record FOLDER        and keep their series, which are test data
    .venv-job/bin/python benchmarks/drift.py --series tests/tasks/monitoring/series     the table alone, from what was kept
    .venv-job/bin/python benchmarks/drift.py --healthy 2 --seeds 1  a taste

Every run goes to its end, with the governor off; then the quickstart's drift block judges the recorded series step by step, as
it would have live. Each collapse has an honest cause that is there from the first step, so the delay is the step of the halt.
`damaged` is the first log step at which the moving average of the held-out reward is below half of where healthy runs begin: a
halt before it came in time.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from profiles.load import load  # noqa: E402
from profiles.schema import Drift  # noqa: E402
from tasks.job_spec import JobSpec  # noqa: E402
from tasks.monitoring.drift import HALT, Finding, Series, replay, smoothed, watched  # noqa: E402

NEAR = {"name": "near_answer", "weight": 1.0}
RECIPE = load("quickstart").recipe
KEPT = {"healthy": True, "collapsed": False}
NO_LIMITS = {"signals": {}, "reward_hacking": None, "kl_cusum": None}


@dataclass(frozen=True)
class Cause:
    """What is wrong with a run: other arguments, another reward, or a tokenizer that ends replies where the model does not."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    reward: str = "near_answer"
    wrong_end: bool = False


HEALTHY = Cause("healthy")
CAUSES = (
    Cause("learning rate 100 times too high", {"learning_rate": 2e-2}),
    Cause("no KL penalty, learning rate 25 times too high", {"learning_rate": 5e-3, "beta": 0.0}),
    Cause("no KL penalty, a reward for nines", {"learning_rate": 1e-3, "beta": 0.0}, reward="nines"),
    Cause("no KL penalty, a reward for length", {"learning_rate": 1e-3, "beta": 0.0}, reward="length"),
    Cause("a constant reward", reward="constant"),
    Cause("a learning rate of 1e30", {"learning_rate": 1e30, "max_grad_norm": 0.0}),
    Cause("a template whose end the model never learnt", wrong_end=True),
)


def nines(completions: list[Any], **_: Any) -> list[float]:
    """Reward the share of nines: it can be had without sorting anything."""
    texts = [completion[-1]["content"] for completion in completions]
    return [text.count("9") / max(len(text), 1) for text in texts]


def length(completions: list[Any], **_: Any) -> list[float]:
    return [len(completion[-1]["content"]) / 12 for completion in completions]


def constant(completions: list[Any], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", type=int, default=20, help="seeds of the healthy recipe")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of each cause")
    parser.add_argument("--record", type=Path, help="folder for healthy.jsonl and collapsed.jsonl")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--series", type=Path, help="judge what --record kept there, train nothing")
    asked = parser.parse_args()
    if asked.series:
        return table([json.loads(line) for name in KEPT for line in (asked.series / f"{name}.jsonl").open()])
    wanted = [(HEALTHY, seed) for seed in range(1, asked.healthy + 1)]
    wanted += [(cause, seed) for cause in CAUSES for seed in range(1, asked.seeds + 1)]
    with tempfile.TemporaryDirectory() as folder:
        made = prepare(Path(folder))
        context = multiprocessing.get_context("fork")  # torch and TRL are imported once
        with ProcessPoolExecutor(asked.processes, mp_context=context, max_tasks_per_child=None) as pool:
            runs = list(pool.map(recorded, [(made, cause, seed) for cause, seed in wanted]))
    if asked.record:
        record(asked.record, runs)
    table(runs)


def prepare(folder: Path) -> Path:
    """Make the quickstart's model and rows, and its SFT adapter, as the shipped profile has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tasks.jobs import grpo, sft  # noqa: F401  (grpo: imported before the fork)
    from tasks.jobs.make_quickstart import make

    make(folder, RECIPE.seed, {})
    for path in folder.glob("*.jsonl"):
        (folder / path.stem).mkdir()
        pq.write_table(pa.Table.from_pylist([json.loads(line) for line in path.open()]), folder / path.stem / "rows.parquet")
    stage = RECIPE.sft.model_dump()
    sft.main(spec(folder, "sft", "sft", RECIPE.seed, {}, stage))
    return folder


def spec(made: Path, name: str, rows: str, seed: int, inputs: dict[str, str], config: dict[str, Any]) -> JobSpec:
    output = made / "runs" / name / "output"
    output.mkdir(parents=True)
    given = {"base_model": str(made / "base_model"), "rows": str(made / rows)} | inputs
    config = {"dtype": "float32", "base_digest": "tiny"} | config
    return JobSpec(
        stage=name.split("-")[0], module="", seed=seed, inputs=given, config=config,
        output=output, work=output.parent, checkpoints=output.parent / "checkpoints",
    )  # fmt: skip


def recorded(job: tuple[Path, Cause, int]) -> dict[str, Any]:
    """Run one GRPO to its end and return its series; a run that dies of its NaN leaves what it logged until then."""
    made, cause, seed = job
    import torch

    from tasks.jobs import grpo, rewards

    torch.set_num_threads(1)
    for function in (nines, length, constant):
        setattr(rewards, function.__name__, function)
    start = made / "runs" / "sft" / "output"
    name = f"grpo-{CAUSES.index(cause) if cause in CAUSES else 'healthy'}-{seed}"
    policy = RECIPE.policy.model_dump(exclude={"method"})
    policy |= {"args": policy["args"] | cause.args, "rollouts": "transformers"}
    policy["reward_functions"] = [NEAR | {"name": cause.reward}]
    inputs = {"sft": str(wrong_end(start, made / f"{name}-sft") if cause.wrong_end else start), "canaries": str(made / "eval")}
    run = spec(made, name, "prompts", seed, inputs, policy)
    canaries = {"num_prompts": 32, "every": 1, "max_new_tokens": 12, "batch_size": 32, "scorer": "exact_answer"}
    run = run.model_copy(update={"drift": NO_LIMITS | {"canaries": canaries}})
    error = None
    try:
        grpo.main(run)
    except Exception as died:  # what a diverged run dies of, or halts on, is part of the picture
        error = f"{type(died).__name__}: {died}"[:200]
    series: Series = {}
    drift = load("quickstart").drift.model_dump()
    for line in map(json.loads, run.metrics_file.open()):
        for key, value in line["metrics"].items():
            if watched(key, drift) and "train_runtime" not in line["metrics"]:
                series.setdefault(key, []).append((line["step"], float(f"{value:.5g}")))
    print(f"{cause.name}, seed {seed}: {len(series.get('loss', []))} steps{f', died of {error}' if error else ''}", flush=True)
    return {"cause": cause.name, "seed": seed, "error": error, "series": series}


def wrong_end(adapter: Path, copy: Path) -> Path:
    """Copy the adapter with a tokenizer whose end-of-reply token is one that the model was never taught to write."""
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(adapter, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.eos_token = "<|unk|>"
    tokenizer.save_pretrained(copy)
    return copy


def record(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Keep the series: one run per line, values to five digits."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, healthy in KEPT.items():
        with (folder / f"{name}.jsonl").open("w") as file:
            for run in runs:
                if (run["cause"] == HEALTHY.name) is healthy:
                    file.write(json.dumps(run, separators=(",", ":")) + "\n")


def table(runs: list[dict[str, Any]]) -> None:
    """Print a line per cause: where the corridors of the quickstart and the defaults halt it, by what, and the damage."""
    quickstart, defaults = load("quickstart").drift.model_dump(), Drift().model_dump()
    print("\n| cause | runs | halted | by | at step | by the defaults | damaged at step |\n|---|---|---|---|---|---|---|")
    first = [run["series"]["canary/reward"][0][1] for run in runs if run["cause"] == HEALTHY.name]
    half = statistics.median(first) / 2 if first else 0.0
    for cause in dict.fromkeys(run["cause"] for run in runs):
        own = [run for run in runs if run["cause"] == cause]
        halts, others = ([halt_of(run["series"], drift) for run in own] for drift in (quickstart, defaults))
        by = ", ".join(sorted({f"`{halt.signal}` ({halt.detector})" for halt in halts if halt}))
        damage = ", ".join(str(damaged(run["series"], half)) for run in own) if cause != HEALTHY.name else ""
        halted = f"{sum(halt is not None for halt in halts)}"
        print(f"| {cause} | {len(own)} | {halted} | {by} | {steps(halts)} | {steps(others)} | {damage} |")
    healthy = [run["series"] for run in runs if run["cause"] == HEALTHY.name]
    warned = {name: sum(bool(replay(series, drift)) for series in healthy) for name, drift in
              (("the quickstart's corridors", quickstart), ("the defaults", defaults))}  # fmt: skip
    print(f"\n{len(healthy)} healthy runs, of which warned: " + ", ".join(f"{n} by {name}" for name, n in warned.items()))


def halt_of(series: Series, drift: dict[str, Any]) -> Finding | None:
    return next((finding for finding in replay(series, drift) if finding.severity == HALT), None)


def steps(halts: list[Finding | None]) -> str:
    return "none" if not any(halts) else ", ".join(str(halt.step) if halt else "none" for halt in halts)


def damaged(series: Series, half: float) -> int | str:
    """Return the first log step at which the held-out reward's moving average is below `half`, or `never`."""
    points = series.get("canary/reward", [])
    averages = smoothed([value for _, value in points], 0.3)
    return next((step for (step, _), average in zip(points, averages, strict=True) if average < half), "never")


if __name__ == "__main__":
    main()
