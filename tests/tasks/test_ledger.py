"""The ledger adds up what the jobs used, names what was for nothing, and a budget refuses before money is spent."""

import json
import time
from pathlib import Path

import pytest

from profiles.load import load
from profiles.schema import Budget
from tasks.environment import home
from tasks.errors import BudgetExceeded
from tasks.ledger import estimate, ledger, refuse_before, refuse_next, seconds_left, spent
from tasks.pipeline_run import PipelineRun, StageRecord


def cost(wall: float, cpu: float = 0.0, gpu: float = 0.0) -> dict[str, float]:
    return {"wall_seconds": wall, "cpu_seconds": cpu, "gpu_seconds": gpu}


@pytest.fixture
def run():
    """A function that makes a run of the quickstart with these records and settings."""

    def make(*records: StageRecord, run_id: str = "r1", **budget: float) -> PipelineRun:
        profile = load("quickstart", [f"budget.{name}={value}" for name, value in budget.items()])
        made = PipelineRun(profile, run_id, home() / "quickstart" / run_id, "m", "f")
        made.folder.mkdir(parents=True)
        for record in records:
            made.record(record)
            time.sleep(0.001)  # records are ordered by the clock
        return made

    return make


def test_what_a_work_folders_jobs_used_is_the_sum_of_their_lines(tmp_path: Path):
    (tmp_path / "usage.jsonl").write_text("".join(json.dumps(cost(w, 2 * w, w)) + "\n" for w in (1.5, 2.5)))
    assert spent(tmp_path) == cost(4.0, 8.0, 4.0)
    assert spent(tmp_path / "nothing ran") == cost(0.0)


def test_waste_is_told_by_its_cause(run):
    made = run(
        StageRecord("sft", "failed", "k", reason="JobFailed: x", cause="out of memory", cost=cost(10, 20, 10)),
        StageRecord("sft", "failed", "k", reason="JobFailed: y", cause="died", cost=cost(1, 2, 1)),
        StageRecord("sft", "ran", "k", cost=cost(100, 200, 100)),
        StageRecord("grpo", "failed", "k", reason="DriftHalted: kl", cause="bug", cost=cost(5, 5, 5)),
    )
    found = ledger(made)
    assert found["total"] == cost(116, 227, 116)
    assert found["waste"] == {"out of memory": cost(10, 20, 10), "died": cost(1, 2, 1), "halted": cost(5, 5, 5)}


def test_groups_without_variance_are_waste_by_their_share_of_the_training(run):
    made = run(StageRecord("grpo", "ran", "k", cost=cost(100, 400)))
    (made.folder / "grpo").mkdir()
    lines = [{"step": i, "metrics": {"frac_reward_zero_std": share}} for i, share in enumerate((0.0, 0.5))]
    (made.folder / "grpo" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ledger(made)["waste"] == {"zero-variance groups": cost(25, 100)}


def test_estimate_is_the_median_of_what_was_built_and_nothing_else(run):
    assert estimate("quickstart", "sft") is None
    for number, wall in enumerate((10, 30, 90)):
        run(StageRecord("sft", "ran", "k", cost=cost(wall)), run_id=f"r{number}")
    run(StageRecord("sft", "failed", "k", cost=cost(5000)), StageRecord("sft", "cached", "k"), run_id="r9")
    assert estimate("quickstart", "sft") == cost(30)


def test_run_that_would_cost_more_than_its_budget_is_refused_with_both_numbers(run):
    run(StageRecord("sft", "ran", "k", cost=cost(3600, 7200)), StageRecord("grpo", "ran", "k", cost=cost(3600, 7200)))
    with pytest.raises(BudgetExceeded, match=r"budget\.cpu_hours is 3.* about 4 ") as refused:
        refuse_before("quickstart", Budget(cpu_hours=3), ["sft", "grpo"])
    assert refused.value.exit_code == 8
    refuse_before("quickstart", Budget(cpu_hours=3), ["sft"])
    refuse_before("quickstart", Budget(cpu_hours=5), ["sft", "grpo"])
    refuse_before("never run", Budget(cpu_hours=0.001), ["sft"])


def test_stage_that_the_rest_of_the_budget_does_not_cover_is_not_started(run):
    run(StageRecord("grpo", "ran", "k", cost=cost(3600, 3600, 3600)), run_id="r0")
    made = run(StageRecord("sft", "failed", "k", cause="died", cost=cost(1800, 1800, 1800)), gpu_hours=1.2)
    with pytest.raises(BudgetExceeded, match=r"budget\.gpu_hours is 1\.2.* used 0\.5 and grpo would cost about 1"):
        refuse_next(made, "grpo")
    refuse_next(made, "sft")
    assert seconds_left(made, num_gpus=2) == pytest.approx((1.2 - 0.5) * 3600 / 2)
    assert seconds_left(made, num_gpus=0) is None


def test_budget_of_nothing_is_no_profile():
    from profiles.load import InvalidProfile

    with pytest.raises(InvalidProfile, match=r"budget.cpu_hours"):
        load("quickstart", ["budget.cpu_hours=0"])
