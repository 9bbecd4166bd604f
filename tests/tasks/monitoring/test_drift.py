"""A signal that leaves its corridor and stays out is found: live, after the fact and after a resume alike."""

import copy
import json
import math
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import theilslopes

from profiles.drift import Corridor, Cusum, Drift, RewardHacking
from tasks.monitoring.drift import (
    ALWAYS,
    HALT,
    WARN,
    Finding,
    closeness,
    corridors,
    cusum,
    is_inside,
    judge,
    limits,
    replay,
    slope,
    smoothed,
    watched,
)

FINITE = st.floats(-1e6, 1e6)
PLAIN = {"smoothing": 1.0, "patience": 3, "reference_steps": 4, "window": 5}
UNHURRIED = settings(deadline=None)  # the machine may have other work


def corridor(**given) -> dict:
    """One corridor as a job reads it; without smoothing, unless said otherwise."""
    return Corridor(**(PLAIN | given)).model_dump()


def drift(signals: dict[str, dict | None], *, hacking: dict | None = None, sums: dict | None = None) -> dict:
    """The drift block as a job reads it, with these corridors and no other."""
    block = Drift(signals={}, reward_hacking=hacking and RewardHacking(**hacking), kl_cusum=sums and Cusum(**sums)).model_dump()
    return block | {"signals": {name: None if own is None else corridor(**own) for name, own in signals.items()}}


def series(values: list[float], first_step: int = 1) -> list[tuple[int, float]]:
    return list(enumerate(values, start=first_step))


def live(played: dict, block: dict) -> list[list[Finding]]:
    """What is found at each step by one who gets the points as they come."""
    known: dict = {}
    found = []
    for step in sorted({step for points in played.values() for step, _ in points}):
        for name, points in played.items():
            if new := [point for point in points if point[0] == step]:
                known.setdefault(name, []).extend(new)
        found.append(judge(known, block))
    return found


def first(played: dict, block: dict, severity: str = HALT) -> Finding | None:
    """Return the first finding of that severity."""
    return next((f for findings in live(played, block) for f in findings if f.severity == severity), None)


# --- the moving average -----------------------------------------------------------------------------------------------------


@UNHURRIED
@given(st.lists(FINITE, min_size=1, max_size=12), st.floats(0.01, 1))
def test_smoothing_is_the_exponentially_weighted_mean(values, weight):
    """Closed form: the newest value weighs w, each older one (1-w) times as much, and the first what is left over."""
    n = len(values) - 1
    weights = [(1 - weight) ** n] + [weight * (1 - weight) ** (n - i) for i in range(1, n + 1)]
    assert math.isclose(sum(weights), 1)
    expected = math.fsum(w * v for w, v in zip(weights, values, strict=True))
    assert smoothed(values, weight)[-1] == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_smoothing_by_one_leaves_a_series_as_it_is():
    assert smoothed([3.0, 1.0, 2.0], 1.0) == [3.0, 1.0, 2.0]


# --- levels -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "beyond"), [([2, 2, 2], True), ([2, 2], False), ([2, 1, 2], False), ([1, 2, 2], False), ([0, 2, 2, 2], True)]
)
@pytest.mark.parametrize("severity", [HALT, WARN])
def test_limit_is_passed_when_each_of_the_last_values_lies_beyond_it(severity, last, beyond):
    above = judge({"kl": series(last)}, drift({"kl": {f"{severity}_max": 1.0}}))
    below = judge({"kl": series([-v for v in last])}, drift({"kl": {f"{severity}_min": -1.0}}))
    assert [f.severity for f in above] == [f.severity for f in below] == [severity] * beyond


def test_kl_above_its_limit_halts_at_the_step_where_patience_ends():
    """No smoothing: steps 3, 4, 5 are the first three in a row above 0.5."""
    found = first({"kl": series([0.1, 0.1, 0.6, 0.7, 0.8, 0.9])}, drift({"kl": {"halt_max": 0.5}}))
    assert found == Finding("kl", "level", HALT, 5, 0.8, 0.5, 3)


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_kl_above_its_limit_from_the_start_halts_after_just_its_patience(patience):
    found = first({"kl": series([0.9] * 9)}, drift({"kl": {"halt_max": 0.5, "patience": patience}}))
    assert (found.step, found.patience) == (patience, patience)


@pytest.mark.parametrize("values", [[0.9, 0.9, 0.1] * 10, [0.5] * 10], ids=["back inside in time", "on its limit"])
def test_kl_that_does_not_stay_above_its_limit_halts_nothing(values):
    assert first({"kl": series(values)}, drift({"kl": {"halt_max": 0.5}})) is None


def test_kl_spike_is_smoothed_away_but_a_rise_is_not():
    """One 1.2 among 0.1 with weight 0.3: 0.3*1.2 + 0.7*0.1 = 0.43 < 0.5. A lasting 1.2 from step 4 on gives
    0.43, 0.661, 0.8227, 0.9359: above at steps 5, 6, 7, so it halts at 7."""
    block = drift({"kl": {"halt_max": 0.5, "smoothing": 0.3}})
    assert first({"kl": series([0.1, 0.1, 0.1, 1.2, 0.1, 0.1, 0.1, 0.1, 0.1])}, block) is None
    found = first({"kl": series([0.1, 0.1, 0.1] + [1.2] * 6)}, block)
    average = 0.1
    for _ in range(4):
        average = 0.3 * 1.2 + 0.7 * average
    assert found.step == 7
    assert found.value == pytest.approx(average)


@pytest.mark.parametrize("signals", [{}, {"kl": None}, {"kl": {}}], ids=["no corridor", "taken away", "no limits"])
def test_kl_without_a_limit_is_never_found(signals):
    assert replay({"kl": series([1e6] * 20)}, drift(signals)) == []


def test_signal_that_the_trainer_does_not_log_is_never_found():
    assert replay({"reward": series([0.0] * 20)}, drift({"kl": {"halt_max": 0.5}, "entropy": {"halt_min": 1.0}})) == []


def test_signal_that_leaves_warns_before_it_halts():
    """Above 0.5 from step 2 on, above 1.0 from step 5 on, each for 3 steps: 4 and 7; between them it still warns."""
    block = drift({"kl": {"warn_max": 0.5, "halt_max": 1.0}})
    found = live({"kl": series([0.1, 0.6, 0.6, 0.6, 1.2, 1.2, 1.2])}, block)
    assert [[(f.severity, f.limit) for f in findings] for findings in found] == [
        *[[]] * 3,
        *[[(WARN, 0.5)]] * 3,
        [(HALT, 1.0)],  # and does not warn of the same once more
    ]


def test_halts_come_first_whatever_order_the_signals_have():
    block = drift({"grad_norm": {"warn_max": 1.0}, "kl": {"halt_max": 0.5}, "reward": {"warn_min": 0.5}})
    for names in (["grad_norm", "kl", "reward"], ["reward", "grad_norm", "kl"]):
        found = judge({name: series([{"reward": 0.1}.get(name, 2.0)] * 3) for name in names}, block)
        assert [f.severity for f in found] == [HALT, WARN, WARN]
        assert found[0].signal == "kl" and {f.signal for f in found[1:]} == {"grad_norm", "reward"}


def test_finding_names_the_step_that_was_logged_and_not_its_place_in_the_series():
    [found] = judge({"kl": [(step, 0.9) for step in (10, 20, 30)]}, drift({"kl": {"halt_max": 0.5}}))
    assert found.step == 30


# --- ratios to the first steps ----------------------------------------------------------------------------------------------


def test_entropy_below_its_share_of_the_first_steps_halts():
    """Reference: the median of the first four, of which one is wild: median(2, 2, 50, 2) = 2, floor 0.25 * 2 = 0.5.
    Steps 6, 7, 8 lie below."""
    values = [2.0, 2.0, 50.0, 2.0, 0.6, 0.4, 0.4, 0.4]
    found = first({"entropy": series(values)}, drift({"entropy": {"halt_ratio_min": 0.25}}))
    assert found == Finding("entropy", "level", HALT, 8, 0.4, 0.25 * median(values[:4]), 3)


def test_length_above_its_multiple_of_the_first_steps_warns():
    """Reference 10, limit 3 * 10: steps 6, 7, 8 lie above."""
    values = [10.0] * 4 + [30.0, 31.0, 31.0, 31.0]
    found = first({"length": series(values)}, drift({"length": {"warn_ratio_max": 3.0}}), WARN)
    assert (found.step, found.limit) == (8, 30.0)


def test_entropy_at_its_floor_does_not_halt():
    assert first({"entropy": series([2.0] * 4 + [0.5] * 10)}, drift({"entropy": {"halt_ratio_min": 0.25}})) is None


@pytest.mark.parametrize("reference_steps", [1, 4, 10])
def test_entropy_never_halts_before_the_reference_and_patience_are_over(reference_steps):
    """The series falls right after its reference: the earliest halt is where `patience` steps have followed it."""
    block = drift({"entropy": {"halt_ratio_min": 0.25, "reference_steps": reference_steps}})
    assert first({"entropy": series([10.0] * reference_steps + [0.001] * 10)}, block).step == reference_steps + 3


def test_entropy_that_falls_within_its_reference_is_judged_only_after_it():
    """Reference: median(8, 8, 8, 0.1) = 8, floor 2. Step 4 lies below it already, but only 5, 6, 7 count."""
    assert first({"entropy": series([8.0, 8.0, 8.0] + [0.1] * 9)}, drift({"entropy": {"halt_ratio_min": 0.25}})).step == 7


@pytest.mark.parametrize("value", [0.01, 0.0, -1.0])
def test_entropy_low_from_the_start_is_its_own_reference(value):
    """And one of 0 or less is none: nothing is a share of it."""
    block = drift({"entropy": {"halt_ratio_min": 0.25, "halt_ratio_max": 3.0}})
    assert replay({"entropy": series([value] * 30)}, block) == []


@pytest.mark.parametrize("reference", [0.02, 0.04, 2.0])
def test_limits_of_a_level_and_a_ratio_are_the_narrower(reference):
    both = corridor(halt_min=0.01, halt_ratio_min=0.25, warn_min=0.015, warn_ratio_min=0.5, warn_max=6.0, warn_ratio_max=4.0)
    before, after = limits([reference] * 4, both), limits([reference] * 5, both)
    assert before == {"halt_min": 0.01, "warn_min": 0.015, "warn_max": 6.0}  # the reference is not known yet
    assert after == {
        "halt_min": max(0.01, 0.25 * reference),
        "warn_min": max(0.015, 0.5 * reference),
        "warn_max": min(6.0, 4.0 * reference),
    }


def test_level_within_the_reference_steps_is_judged_where_a_ratio_is_not():
    """Of 0.01 and 0.25 * median(2, 2, 2, 2): steps 2, 3, 4 lie below the first, which needs no reference."""
    block = drift({"entropy": {"halt_min": 0.01, "halt_ratio_min": 0.25}})
    assert first({"entropy": series([2.0] + [0.001] * 9)}, block).step == 4


def test_ratio_beside_a_level_never_makes_it_halt_later():
    """By the level alone, steps 4, 5, 6 lie below 0.01: the ratio, known after step 4, must not start the patience anew."""
    values = [2.0, 2.0, 2.0] + [0.001] * 9
    alone = first({"entropy": series(values)}, drift({"entropy": {"halt_min": 0.01}}))
    both = first({"entropy": series(values)}, drift({"entropy": {"halt_min": 0.01, "halt_ratio_min": 0.25}}))
    assert alone.step == 6
    assert both.step <= alone.step


# --- slopes -----------------------------------------------------------------------------------------------------------------


@UNHURRIED
@given(st.lists(FINITE, min_size=2, max_size=20))
def test_slope_is_scipy_s_theil_sen_slope(values):
    assert slope(series(values)) == pytest.approx(theilslopes(values).slope, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("limit", "severity"), [("warn_slope_max", WARN), ("halt_slope_max", HALT)])
@pytest.mark.parametrize("start", [10.0, -10.0])
def test_growth_beyond_its_limit_is_found_once_a_window_has_followed_the_reference(start, limit, severity):
    """Reference 10 over steps 1 to 4; the window's five grow by 2 per log step, a share of 0.2. It is whole at step 9."""
    grown = [start] * 4 + [start + 2.0 * n for n in range(5)]
    block = drift({"length": {limit: 0.1}})
    assert live({"length": series(grown)}, block)[:8] == [[]] * 8
    [found] = judge({"length": series(grown)}, block)
    assert found == Finding("length", "slope", severity, 9, pytest.approx(0.2), 0.1, 1)


@pytest.mark.parametrize(
    "after",
    [[10.0, 10.0, 500.0, 10.0, 10.0], [10.0, 11.0, 12.0, 13.0, 14.0], [50.0, 40.0, 30.0, 20.0, 10.0]],
    ids=["outlier", "on its limit", "falls"],
)
def test_growth_within_its_limit_is_not_found(after):
    assert replay({"length": series([10.0] * 4 + after)}, drift({"length": {"warn_slope_max": 0.1}})) == []


def test_growth_from_nothing_is_no_share_of_it():
    values = [0.0] * 4 + [float(n) for n in range(9)]
    assert replay({"length": series(values)}, drift({"length": {"halt_slope_max": 0.1}})) == []


def test_level_and_slope_of_one_signal_are_two_findings():
    values = [10.0] * 4 + [10.0 + 5.0 * n for n in range(9)]
    found = replay({"length": series(values)}, drift({"length": {"warn_max": 20.0, "halt_slope_max": 0.1}}), stop_at_halt=False)
    assert {(f.detector, f.severity) for f in found} == {("level", WARN), ("slope", HALT)}


# --- CUSUM ------------------------------------------------------------------------------------------------------------------


def test_cusum_adds_what_exceeds_the_slack_and_never_falls_below_nothing():
    """log(kl / 0.1) is 1, 2, 0, -3, 1; less the slack of 0.5 each: 0.5, 2.0, 1.5, max(0, -2.0), 0.5."""
    values = [0.1 * math.exp(x) for x in (1, 2, 0, -3, 1)]
    sums = [cusum(values[:n], 0.1, 0.5) for n in range(1, 6)]
    assert sums == pytest.approx([0.5, 2.0, 1.5, 0.0, 0.5])


@UNHURRIED
@given(st.lists(st.floats(1e-3, 10.0), min_size=1, max_size=20), st.floats(0, 2))
def test_cusum_is_the_greatest_sum_of_any_newest_part(values, slack):
    """Page's closed form: max(0, the greatest sum of the last k terms)."""
    terms = [math.log(value / 0.1) - slack for value in values]
    expected = max(0.0, *(math.fsum(terms[k:]) for k in range(len(terms))))
    assert cusum(values, 0.1, slack) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, -1e-9])
def test_cusum_begins_anew_where_there_is_no_kl(value):
    """A KL of 0 has no logarithm, and an estimate may round to less."""
    assert cusum([5.0, 5.0, value], 0.1, 0.5) == 0.0
    assert cusum([5.0, value, 0.1 * math.e], 0.1, 0.5) == pytest.approx(0.5)


def test_kl_that_runs_away_warns_where_its_sum_passes_the_limit():
    """Each step adds 2 - 0.5: 1.5, 3.0, 4.5, 6.0, so step 4 is the first above 5, with the level still far from its limit."""
    values = [0.1 * math.exp(2)] * 6
    block = drift({"kl": {"halt_max": 2.0}}, sums={"target": 0.1, "slack": 0.5, "warn_sum": 5.0})
    [found] = replay({"kl": series(values)}, block)
    assert found == Finding("kl", "cusum", WARN, 4, pytest.approx(6.0), 5.0, 1)
    assert replay({"kl": series(values)}, drift({"kl": {"halt_max": 2.0}})) == []
    assert replay({"grad_norm": series(values)}, block | {"signals": {"grad_norm": corridor()}}) == []


# --- reward hacking ---------------------------------------------------------------------------------------------------------

HACKING = {"warn_drop": 0.1, "halt_drop": 0.3, "smoothing": 1.0, "patience": 3}
RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


def hacked(held_out: list[float], training: list[float] | None, severity: str, **changed) -> Finding | None:
    training_reward = {} if training is None else {"reward": series(training)}
    return first({"canary/reward": series(held_out)} | training_reward, drift({}, hacking=HACKING | changed), severity)


def test_held_out_reward_that_falls_from_its_best_halts_after_its_patience():
    """Best 0.6 at step 2; steps 3 and 4 are 0.3125 below it and 5 is 0.375: more than 0.3 three times in a row."""
    found = hacked([0.5, 0.625, 0.3125, 0.3125, 0.25, 0.25], RISING[:6], HALT)
    assert found == Finding("canary/reward", "reward_hacking", HALT, 5, 0.625 - 0.25, 0.3, 3)


def test_held_out_reward_that_falls_by_less_warns_only():
    fallen = [0.5, 0.625, 0.375, 0.375, 0.375, 0.375]
    assert hacked(fallen, RISING[:6], HALT) is None
    found = hacked(fallen, RISING[:6], WARN)
    assert (found.step, found.value, found.limit) == (5, 0.25, 0.1)
    assert hacked([0.5, 0.625, 0.125, 0.125, 0.125], RISING[:5], HALT, halt_drop=None) is None


@pytest.mark.parametrize(
    ("training", "found"),
    [
        ([0.1, 0.5, 0.5, 0.5, 0.5], True),  # as high as it was at the best
        ([0.9, 0.5, 0.5, 0.5, 0.6], True),  # lower than at the start, but not than at the best
        ([0.1, 0.5, 0.6, 0.7, 0.4], False),  # it fell too: the policy got worse, which is no hacking
        (None, False),  # nothing to compare with
    ],
    ids=["level", "risen since the best", "fallen", "not logged"],
)
def test_held_out_reward_that_falls_is_hacking_where_the_training_reward_did_not_fall(training, found):
    assert (hacked([0.5, 0.625, 0.125, 0.125, 0.125], training, HALT) is not None) is found


@pytest.mark.parametrize(
    "held_out",
    [[0.8, 0.3, 0.3, 0.8, 0.3, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.5] * 6],
    ids=["back in time", "rising", "level"],
)
def test_held_out_reward_that_does_not_stay_below_its_best_is_not_found(held_out):
    assert hacked(held_out, RISING[:6], WARN) is None


def test_held_out_reward_is_compared_with_its_newest_best():
    """0.8 at step 5 is a new best: the fall before it is over, and steps 6, 7, 8 are 0.7 below."""
    assert hacked([0.7, 0.3, 0.3, 0.7, 0.8, 0.1, 0.1, 0.1], RISING, HALT).step == 8


def test_held_out_reward_s_patience_counts_its_own_points():
    """Measured at every third log step; the best at 1, and below it at 4, 7, 10."""
    held_out = [(1, 0.9), (4, 0.1), (7, 0.1), (10, 0.1)]
    played = {"reward": series([0.1 * n for n in range(1, 13)]), "canary/reward": held_out}
    assert first(played, drift({}, hacking=HACKING)).step == 10


def test_held_out_reward_is_smoothed_before_it_is_compared():
    """With weight 0.5: 0.8, then 0.4 once, then 0.8: averages 0.8, 0.6, 0.7; the greatest drop is 0.2."""
    held_out, training = [0.8, 0.4, 0.8], RISING[:3]
    assert hacked(held_out, training, WARN, smoothing=0.5, patience=1).value == pytest.approx(0.2)
    assert hacked(held_out, training, HALT, smoothing=0.5, patience=1) is None
    assert hacked(held_out, training, HALT, patience=1).value == pytest.approx(0.4)


# --- what is no number ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("signal", ALWAYS)
def test_value_that_is_no_number_halts_at_once_without_any_corridor(signal, value):
    found = first({signal: series([1.0, value])}, drift({}))
    assert (found.signal, found.detector, found.step) == (signal, "not_finite", 2)
    assert math.isnan(found.value) if math.isnan(value) else found.value == value


def test_value_that_is_no_number_is_told_alone():
    """Whatever else was found at that step follows from it."""
    played = {"grad_norm": series([9.0] * 3), "kl": series([1.0, 1.0, math.nan])}
    [found] = judge(played, drift({"grad_norm": {"halt_max": 1.0}, "kl": {"halt_max": 0.5}}))
    assert (found.signal, found.detector) == ("kl", "not_finite")


def test_watched_are_signals_with_a_corridor_and_those_that_must_be_finite():
    block = drift({"completions/mean_length": {"warn_max": 1.0}, "step_time": None, "kl": None})
    assert all(watched(name, block) for name in (*ALWAYS, "completions/mean_length", "canary/reward"))
    assert not watched("step_time", block) and not watched("num_tokens", block)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.5])
def test_finding_is_strict_json_whatever_the_value(value):
    found = Finding("kl", "not_finite", HALT, 3, value, math.inf, 1)
    read = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert (read["signal"], read["severity"], read["step"], read["text"]) == ("kl", HALT, 3, str(found))
    assert read.get("value") == (value if math.isfinite(value) else None) and "limit" not in read


@pytest.mark.parametrize("block", [drift({"kl": {"halt_max": 0.5}}), Drift().model_dump()], ids=["one", "default"])
def test_finding_of_a_level_keeps_every_number_in_json(block):
    [found] = [f for f in judge({"kl": series([9.0] * 20)}, block) if f.detector == "level"]
    read = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert Finding(**{name: value for name, value in read.items() if name != "text"}) == found


@pytest.mark.parametrize(
    ("signal", "values", "side"), [("kl", [0.9] * 3, "above"), ("entropy", [2.0] * 4 + [0.1] * 3, "below")]
)
def test_finding_says_which_series_when_by_how_much_and_on_which_side(signal, values, side):
    block = drift({"kl": {"halt_max": 0.5}, "entropy": {"halt_ratio_min": 0.25}})
    found = first({signal: series(values)}, block)
    parts = (signal, str(found.step), f"{found.value:g}", f"{found.limit:g}", side, HALT, str(found.patience))
    assert [part for part in parts if part not in str(found)] == []


# --- signals that are not logged at every step ------------------------------------------------------------------------------


def test_signal_is_judged_only_at_the_steps_where_it_is_logged():
    """Beyond its limit at 1, 4 and 7, it halts at 7; at 8 and 9 nothing new is known of it."""
    played = {"canary/kl": [(1, 0.9), (4, 0.9), (7, 0.9)], "reward": series([0.5] * 9)}
    found = live(played, drift({"canary/kl": {"halt_max": 0.5}}))
    assert [len(findings) for findings in found] == [0, 0, 0, 0, 0, 0, 1, 0, 0]


def test_signal_s_reference_is_of_its_own_points():
    """Four points are the reference, at steps 3, 6, 9, 12; the next three lie below a quarter of it."""
    entropy = [(3 * n, 2.0 if n <= 4 else 0.1) for n in range(1, 9)]
    played = {"canary/entropy": entropy, "reward": series([0.5] * 24)}
    assert first(played, drift({"canary/entropy": {"halt_ratio_min": 0.25}})).step == 3 * 7


# --- live, after the fact, resumed ------------------------------------------------------------------------------------------

MAYBE = st.none() | st.floats(0, 1)
LINES = st.lists(st.tuples(st.floats(0, 3), MAYBE, MAYBE, MAYBE), max_size=14)
TIGHT = drift(
    {
        "kl": {"warn_max": 0.7, "halt_max": 1.2, "patience": 2, "smoothing": 0.6},
        "entropy": {"warn_ratio_min": 0.8, "halt_ratio_min": 0.4, "halt_min": 0.1, "patience": 2, "reference_steps": 2},
        "reward": {"warn_slope_max": 0.05, "halt_slope_max": 0.5, "window": 3, "reference_steps": 1},
    },
    hacking={"warn_drop": 0.1, "halt_drop": 0.4, "patience": 2},
    sums={"warn_sum": 3.0},
)


def of_lines(lines: list[tuple], start: int = 1) -> dict:
    """Series of log lines, in which a signal may be absent."""
    names = ("kl", "entropy", "reward", "canary/reward")
    played = {
        name: [(step, line[n]) for step, line in enumerate(lines, start) if line[n] is not None] for n, name in enumerate(names)
    }
    return {name: points for name, points in played.items() if points}


@UNHURRIED
@given(LINES, st.booleans())
def test_replay_finds_what_was_found_live_each_once(lines, stop_at_halt):
    expected: dict = {}
    for findings in live(of_lines(lines), TIGHT):
        for found in findings:
            expected.setdefault((found.signal, found.detector, found.severity), found)
        if stop_at_halt and any(found.severity == HALT for found in findings):
            break
    assert replay(of_lines(lines), TIGHT, stop_at_halt) == list(expected.values())


@UNHURRIED
@given(LINES, st.integers(0, 14))
def test_resumed_run_is_judged_as_the_undisturbed_one(lines, cut):
    """What was logged before comes back from a JSON file; the verdicts after it are the same, and no series was changed."""
    whole = of_lines(lines)
    untouched = copy.deepcopy(whole)
    undisturbed = live(whole, TIGHT)
    assert whole == untouched
    known = json.loads(json.dumps(of_lines(lines[:cut])))
    resumed = []
    for step, line in enumerate(lines[cut:], cut + 1):
        for name, [point] in of_lines([line], step).items():
            known.setdefault(name, []).append(point)
        resumed.append(judge(known, TIGHT))
    assert undisturbed[cut:] == resumed


def test_nothing_logged_finds_nothing():
    for nothing in ({}, {"kl": []}):
        assert judge(nothing, TIGHT) == replay(nothing, TIGHT) == []
        assert corridors(nothing, TIGHT) == closeness(nothing, TIGHT) == {}
        assert is_inside(nothing, TIGHT)


# --- a good checkpoint ------------------------------------------------------------------------------------------------------


def test_checkpoint_beyond_a_halt_limit_is_not_inside_though_patience_goes_on():
    block = drift({"kl": {"warn_max": 0.2, "halt_max": 0.5}})
    played = {"kl": series([0.1, 0.1, 0.6])}
    assert judge(played, block) == [] and not is_inside(played, block)
    assert is_inside({"kl": series([0.3] * 9)}, block)  # a warning is no reason
    assert is_inside({"kl": series([0.6, 0.6, 0.1])}, block)  # it came back
    assert block["signals"]["kl"]["patience"] == 3  # the block itself is as it was


def test_checkpoint_is_judged_by_the_average_and_not_by_one_value():
    """With weight 0.3 the newest average is 0.3*0.6 + 0.7*0.1 = 0.25."""
    assert is_inside({"kl": series([0.1, 0.6])}, drift({"kl": {"halt_max": 0.5, "smoothing": 0.3}}))


def test_checkpoint_is_judged_by_the_newest_value_of_each_signal_whenever_it_was_logged():
    played = {"canary/kl": [(1, 0.1), (4, 0.9)], "reward": series([0.5] * 6)}
    block = drift({"canary/kl": {"halt_max": 0.5}})
    assert judge(played, block) == [] and not is_inside(played, block)
    assert is_inside({"canary/kl": [(1, 0.9), (4, 0.1)], "reward": series([0.5] * 6)}, block)


def test_checkpoint_of_a_policy_that_hacks_its_reward_is_not_inside_though_patience_goes_on():
    played = {"canary/reward": series([0.8, 0.3]), "reward": series([0.1, 0.2])}
    block = drift({}, hacking=HACKING)
    assert judge(played, block) == [] and not is_inside(played, block)
    assert is_inside(played, drift({}, hacking=HACKING | {"halt_drop": None}))
    assert is_inside(played, drift({}))


@pytest.mark.parametrize("signal", ALWAYS)
def test_checkpoint_with_a_value_that_is_no_number_is_not_inside(signal):
    assert not is_inside({signal: series([1.0, math.nan])}, drift({}))


# --- what is shown ----------------------------------------------------------------------------------------------------------


def test_corridors_are_the_average_and_the_limits_in_force():
    """Average with weight 0.5: 0.5*0.4 + 0.5*0.2 = 0.3. The ratio's reference takes four points, so there are none yet."""
    block = drift({"kl": {"smoothing": 0.5, "warn_max": 0.5, "halt_max": 2.0, "warn_ratio_min": 0.5}, "entropy": None})
    shown = corridors({"kl": series([0.2, 0.4]), "entropy": series([1.0, 1.0])}, block)
    assert shown == {"drift/kl": pytest.approx(0.3), "drift/kl_warn_max": 0.5, "drift/kl_halt_max": 2.0}
    after = corridors({"kl": series([0.2] * 5)}, block)
    assert after["drift/kl_warn_min"] == pytest.approx(0.5 * 0.2)


def test_corridors_are_of_the_signals_that_were_logged_at_the_newest_step():
    block = drift({"kl": {"halt_max": 2.0}, "canary/kl": {"halt_max": 3.0}, "entropy": {"halt_min": 0.1}})
    shown = corridors({"kl": series([0.1, 0.2]), "canary/kl": [(1, 0.1)], "reward": series([0.5, 0.5])}, block)
    assert shown == {"drift/kl": 0.2, "drift/kl_halt_max": 2.0}


def test_closeness_is_the_share_of_the_way_to_a_halt_limit():
    block = drift(
        {
            "kl": {"warn_max": 0.4, "halt_max": 0.5},
            "entropy": {"halt_min": 0.5},
            "reward": {"halt_min": 0.1, "halt_max": 4.0},
            "grad_norm": {"warn_max": 1.0},
            "loss": None,
        }
    )
    played = {"kl": 0.25, "entropy": 2.0, "reward": 1.0, "grad_norm": 9.0, "loss": 9.0}
    near = closeness({name: series([value]) for name, value in played.items()}, block)
    assert near == {"kl": 0.25 / 0.5, "entropy": 0.5 / 2.0, "reward": max(0.1 / 1.0, 1.0 / 4.0)}


@pytest.mark.parametrize("signal", ["kl", "entropy"])
def test_closeness_on_the_limit_is_one(signal):
    block = drift({"kl": {"halt_max": 0.5}, "entropy": {"halt_min": 0.5}})
    assert closeness({signal: series([0.5])}, block) == {signal: 1.0}


@pytest.mark.parametrize("value", [0.05, 0.0, -1.0])
def test_closeness_beyond_the_limit_is_at_least_one(value):
    """A reward may be 0 or less."""
    assert closeness({"reward": series([value])}, drift({"reward": {"halt_min": 0.1}})).get("reward", 0.0) >= 1.0
