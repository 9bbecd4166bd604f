"""The detectors over real runs: `benchmarks/drift.py --record` made them, healthy ones and planted collapses."""

import json
from pathlib import Path
from typing import Any

import pytest

from profiles.load import load
from profiles.schema import Drift
from tasks.monitoring.drift import HALT, Finding, judge, replay

SERIES = Path(__file__).with_name("series")
JUDGES = {"quickstart": load("quickstart").drift.model_dump(), "defaults": Drift().model_dump()}


def recorded(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SERIES / f"{name}.jsonl").open()]


def halts(run: dict[str, Any], judged_by: str) -> list[Finding]:
    return [finding for finding in replay(run["series"], JUDGES[judged_by]) if finding.severity == HALT]


def named(run: dict[str, Any]) -> str:
    return f"{run['cause']}-{run['seed']}"


@pytest.mark.parametrize("judged_by", JUDGES)
def test_healthy_runs_are_left_alone(judged_by):
    runs = recorded("healthy")
    assert len(runs) >= 20
    assert {named(run): halts(run, judged_by) for run in runs if halts(run, judged_by)} == {}


@pytest.mark.parametrize("judged_by", JUDGES)
@pytest.mark.parametrize("run", recorded("collapsed"), ids=named)
def test_planted_collapse_is_halted(run, judged_by):
    assert halts(run, judged_by)


def test_collapses_cover_each_way_to_fail():
    """Entropy, KL, reward hacking, zero variance, length and NaN: each is seen by its own detector in some run."""
    seen = {(halt.signal, halt.detector) for run in recorded("collapsed") for halt in every_halt(run)}
    expected = {
        ("entropy", "level"), ("kl", "level"), ("canary/reward", "reward_hacking"), ("frac_reward_zero_std", "level"),
        ("completions/clipped_ratio", "level"), ("canary/kl", "not_finite"),
    }  # fmt: skip
    assert expected <= seen


def every_halt(run: dict[str, Any]) -> list[Finding]:
    """What the detectors see when nobody stops the run."""
    found = replay(run["series"], JUDGES["quickstart"], stop_at_halt=False)
    return [finding for finding in found if finding.severity == HALT]


def test_run_judged_live_halts_where_it_does_afterwards():
    run = recorded("collapsed")[0]
    halt = halts(run, "quickstart")[0]
    before = {name: [p for p in points if p[0] < halt.step] for name, points in run["series"].items()}
    at = {name: [p for p in points if p[0] <= halt.step] for name, points in run["series"].items()}
    assert not [finding for finding in judge(before, JUDGES["quickstart"]) if finding.severity == HALT]
    assert halt in judge(at, JUDGES["quickstart"])
