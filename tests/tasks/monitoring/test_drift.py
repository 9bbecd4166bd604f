"""A corridor halts a run when a moving average stays beyond it, and only then."""

import math
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.schema import Drift
from tasks.monitoring.drift import breach, out_of_corridor, smoothed

FINITE = st.floats(-1e6, 1e6)


def limits(**changed) -> dict:
    """The profile's drift block, by default without any corridor."""
    return (Drift().model_dump() | {"smoothing": 1.0, "patience": 3, "reference_steps": 4}) | changed


def series(values: list[float], first_step: int = 1) -> list[tuple[int, float]]:
    return list(enumerate(values, start=first_step))


def first_breach(signal: str, values: list[float], settings: dict):
    """Play a series step by step as a live run does; return the first breach."""
    return next((b for n in range(1, len(values) + 1) if (b := breach({signal: series(values[:n])}, settings))), None)


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


@pytest.mark.parametrize(
    ("last", "beyond"), [([2, 2, 2], True), ([2, 2], False), ([2, 1, 2], False), ([1, 2, 2], False), ([0, 2, 2, 2], True)]
)
def test_corridor_is_left_when_each_of_the_last_values_lies_beyond_it(last, beyond):
    assert out_of_corridor(last, 1.0, 3, above=True) is beyond
    assert out_of_corridor([-v for v in last], -1.0, 3, above=False) is beyond


def test_kl_above_its_limit_halts_at_the_step_where_patience_ends():
    """No smoothing: steps 3, 4, 5 are the first three in a row above 0.5."""
    found = first_breach("kl", [0.1, 0.1, 0.6, 0.7, 0.8, 0.9], limits(kl_max=0.5))
    assert (found.signal, found.step, found.value, found.limit, found.patience) == ("kl", 5, 0.8, 0.5, 3)


def test_kl_back_inside_before_patience_ends_does_not_halt():
    assert first_breach("kl", [0.9, 0.9, 0.1] * 10, limits(kl_max=0.5)) is None


def test_kl_at_its_limit_does_not_halt():
    assert first_breach("kl", [0.5] * 10, limits(kl_max=0.5)) is None


def test_kl_spike_is_smoothed_away_but_a_rise_is_not():
    """One 1.2 among 0.1 with weight 0.3: 0.3*1.2 + 0.7*0.1 = 0.43 < 0.5. A lasting 1.2 from step 4 on gives
    0.43, 0.661, 0.8227, 0.9359: above at steps 5, 6, 7, so it halts at 7."""
    settings = limits(kl_max=0.5, smoothing=0.3)
    assert first_breach("kl", [0.1, 0.1, 0.1, 1.2, 0.1, 0.1, 0.1, 0.1, 0.1], settings) is None
    found = first_breach("kl", [0.1, 0.1, 0.1] + [1.2] * 6, settings)
    average = 0.1
    for _ in range(4):
        average = 0.3 * 1.2 + 0.7 * average
    assert found.step == 7
    assert found.value == pytest.approx(average)


def test_kl_without_a_limit_never_halts():
    assert first_breach("kl", [1e6] * 20, limits(kl_max=None)) is None


def test_kl_that_the_trainer_does_not_log_never_halts():
    assert first_breach("reward", [0.0] * 20, limits(kl_max=0.5, entropy_ratio_min=0.25)) is None


def test_entropy_below_its_share_of_the_first_steps_halts():
    """Reference: the median of the first four, of which one is wild: median(2, 2, 50, 2) = 2, floor 0.25 * 2 = 0.5.
    Steps 6, 7, 8 lie below."""
    values = [2.0, 2.0, 50.0, 2.0, 0.6, 0.4, 0.4, 0.4]
    found = first_breach("entropy", values, limits(entropy_ratio_min=0.25))
    assert (found.signal, found.step, found.value, found.limit) == ("entropy", 8, 0.4, 0.25 * median(values[:4]))


def test_entropy_at_its_floor_does_not_halt():
    assert first_breach("entropy", [2.0] * 4 + [0.5] * 10, limits(entropy_ratio_min=0.25)) is None


@pytest.mark.parametrize("reference_steps", [1, 4, 10])
def test_entropy_never_halts_before_the_reference_and_patience_are_over(reference_steps):
    """The series falls right after its reference: the earliest halt is where `patience` steps have followed it."""
    values = [10.0] * reference_steps + [0.001] * 10
    found = first_breach("entropy", values, limits(entropy_ratio_min=0.25, reference_steps=reference_steps))
    assert found.step == reference_steps + 3


def test_entropy_that_falls_within_its_reference_is_judged_only_after_it():
    """Reference: median(8, 8, 8, 0.1) = 8, floor 2. Step 4 lies below it already, but only 5, 6, 7 count."""
    assert first_breach("entropy", [8.0, 8.0, 8.0] + [0.1] * 9, limits(entropy_ratio_min=0.25)).step == 7


def test_entropy_low_from_the_start_is_its_own_reference():
    assert first_breach("entropy", [0.01] * 30, limits(entropy_ratio_min=0.25)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("signal", ["loss", "reward", "kl", "entropy", "grad_norm"])
def test_value_that_is_no_number_halts_at_once_without_any_limit(signal, value):
    found = first_breach(signal, [1.0, value], limits(patience=100))
    assert (found.signal, found.step) == (signal, 2)
    assert math.isnan(found.value) if math.isnan(value) else found.value == value


def test_breach_names_the_step_that_was_logged_and_not_its_place_in_the_series():
    points = [(step, 0.9) for step in (10, 20, 30)]
    assert breach({"kl": points}, limits(kl_max=0.5)).step == 30


@pytest.mark.parametrize(
    ("signal", "values", "side"), [("kl", [0.9] * 3, "above"), ("entropy", [2.0] * 4 + [0.1] * 3, "below")]
)
def test_breach_says_which_series_when_by_how_much_and_on_which_side(signal, values, side):
    found = first_breach(signal, values, limits(kl_max=0.5, entropy_ratio_min=0.25))
    text = str(found)
    assert all(part in text for part in (signal, str(found.step), f"{found.value:g}", f"{found.limit:g}", side))
