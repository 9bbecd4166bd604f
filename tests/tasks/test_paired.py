"""The statistics of paired scores against closed formulas, published examples and enumeration."""

from itertools import product
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tasks.paired import difference, estimate, p_better, rows_for_difference, rows_for_floor, tango

COUNT = st.integers(0, 20)
Z95, Z80 = NormalDist().inv_cdf(0.95), NormalDist().inv_cdf(0.8)


def paired(gained: int, lost: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """0/1 scores on the same rows: the first alone right on `gained`, the second alone on `lost`."""
    first = [1] * gained + [0] * lost + [1] * both + [0] * neither
    second = [0] * gained + [1] * lost + [1] * both + [0] * neither
    return np.array(first), np.array(second)


def binomial_tail(gained: int, lost: int) -> float:
    """P(X >= gained) for X ~ Binomial(gained + lost, 1/2): under no difference each differing row is a fair coin."""
    n = gained + lost
    return sum(comb(n, k) for k in range(gained, n + 1)) / 2**n


@given(st.lists(st.integers(0, 1), min_size=1, max_size=60))
def test_estimate_of_shares_is_wilsons_interval(scores):
    """(p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z the 97.5 % point of the normal distribution."""
    n, p, z = len(scores), sum(scores) / len(scores), NormalDist().inv_cdf(0.975)
    centre, half = p + z**2 / (2 * n), z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    found = estimate(scores)
    assert (found.value, found.n) == (p, n)
    assert found.low == pytest.approx((centre - half) / (1 + z**2 / n), abs=1e-9)
    assert found.high == pytest.approx((centre + half) / (1 + z**2 / n), abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_estimate_of_real_values_is_students_t():
    """1, 2, 3, 4: mean 2.5, deviation √(5/3), t(3) at 97.5 % is 3.18245 (any table of Student's t)."""
    found, half = estimate([4, 1, 3, 2]), 3.18245 * sqrt(5 / 3) / 2
    assert (found.value, found.low, found.high) == (
        2.5,
        pytest.approx(2.5 - half, abs=1e-4),
        pytest.approx(2.5 + half, abs=1e-4),
    )


def test_estimate_of_a_win_rate_of_nothing_but_ties_is_not_certain():
    """Without wins and losses Tango's bounds are ±z²/(n+z²); a win rate is 0.5 and half of that."""
    found, z2 = estimate([0.5] * 96), NormalDist().inv_cdf(0.975) ** 2
    assert (found.value, found.low) == (0.5, pytest.approx(0.5 - 0.5 * z2 / (96 + z2), abs=1e-6))


@pytest.mark.parametrize(
    ("gained", "lost", "n", "low", "high"),
    [
        (1, 7, 21, -0.517, -0.026),  # Fagerland, Lydersen, Laake 2014 (doi:10.1002/sim.6148), airway reactivity
        (16, 8, 86, -0.020, 0.207),  # Agresti, Min 2005 (doi:10.1002/sim.1781)
    ],
)
def test_tango_gives_the_published_intervals(gained, lost, n, low, high):
    assert tango(gained, lost, n, 0.975) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))


@given(COUNT, COUNT, COUNT)
def test_tango_contains_the_estimate_and_mirrors_when_the_two_change_places(gained, lost, same):
    n = gained + lost + same
    assume(n)
    low, high = tango(gained, lost, n, 0.95)
    assert -1 <= low < (gained - lost) / n < high <= 1 or n in (gained, lost)
    assert tango(lost, gained, n, 0.95) == (pytest.approx(-high, abs=1e-9), pytest.approx(-low, abs=1e-9))


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_tango_at_its_edges(n):
    """All rows the same: |Δ| = z²/(n+z²), from (nΔ)² = z² n (|Δ| - Δ²). All won: the bound on that side is 1."""
    edge = Z95**2 / (n + Z95**2)
    assert tango(0, 0, n, 0.95) == (pytest.approx(-edge, abs=1e-6), pytest.approx(edge, abs=1e-6))
    assert tango(n, 0, n, 0.95)[1] == 1 and tango(0, n, n, 0.95)[0] == -1


@given(COUNT, COUNT, COUNT, COUNT)
def test_mcnemar_is_the_binomial_tail_of_the_rows_that_differ(gained, lost, both, neither):
    assume(gained + lost + both + neither)
    expected = binomial_tail(gained, lost) if gained + lost else 1.0
    p, test = p_better(*paired(gained, lost, both, neither))
    assert p == pytest.approx(expected, rel=1e-9) and "McNemar" in test


def test_test_of_a_win_rate_is_the_sign_test_without_the_ties():
    p, test = p_better(np.array([1] * 7 + [0] * 1 + [0.5] * 9), np.full(17, 0.5))
    assert p == pytest.approx(binomial_tail(7, 1)) and "sign" in test


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=9))
def test_permutation_test_is_the_share_of_sign_patterns_with_as_large_a_mean(halves):
    """Nine rows have 512 patterns of signs: all of them are counted."""
    delta = np.array(halves) / 8
    sums = [sum(s * d for s, d in zip(signs, delta, strict=True)) for signs in product((1, -1), repeat=len(delta))]
    expected = np.mean([total >= delta.sum() for total in sums])
    other = np.full(len(delta), 0.25)
    assert p_better(other + delta, other)[0] == pytest.approx(expected)


def test_permutation_test_of_many_rows_says_the_same_each_time_in_any_order():
    rng = np.random.default_rng(3)
    first, second = rng.random(60), rng.random(60)
    order = rng.permutation(60)
    assert p_better(first, second) == p_better(first[order], second[order])


def test_scores_on_other_rows_are_refused():
    for statistic in (p_better, difference):
        with pytest.raises(ValueError, match="paired"):
            statistic([1, 1], [0])


def test_difference_of_real_values_is_the_t_interval_of_the_rows_differences():
    """Differences 0, 1, 2, 3 in any pairing: mean 1.5, deviation √(5/3), t(3) at 95 % is 2.35336."""
    found, half = difference(np.array([5.5, 2, 3, 9]), np.array([5.5, 1, 1, 6])), 2.35336 * sqrt(5 / 3) / 2
    assert (found.value, found.low) == (1.5, pytest.approx(1.5 - half, abs=1e-4))
    assert found.high == pytest.approx(1.5 + half, abs=1e-4)


def test_difference_of_real_values_that_are_all_equal_is_not_certain():
    """No variance was seen, which is not to say that there is none: as if counted, times the span of the scores."""
    few, many = (difference(np.full(n, 2.0), np.full(n, 2.0)) for n in (10, 1000))
    assert few.low == pytest.approx(-2 * Z95**2 / (10 + Z95**2), abs=1e-6)
    assert few.value == many.value == 0 and few.low < many.low < 0 < many.high < few.high


def test_rows_needed_for_a_gain_are_connors():
    """ψ = 0.2, δ = 0.05: ((1.645 √0.2 + 0.842 √(0.2 - 0.0025)) / 0.05)² = 492.5."""
    found = difference(*paired(25, 15, 100, 60))
    connor = ((Z95 * sqrt(0.2) + Z80 * sqrt(0.2 - 0.05**2)) / 0.05) ** 2
    assert rows_for_difference(found, 0.0) == int(connor) + 1 == 493


def test_rows_needed_give_the_power_that_they_promise():
    """Exactly: over all numbers k of differing rows, and of gains among them, those that McNemar finds at 0.05."""
    n = rows_for_difference(difference(*paired(25, 15, 100, 60)), 0.0)
    power = 0.0
    for k in range(n + 1):
        least = next((g for g in range(k + 1) if binomial_tail(g, k - g) < 0.05), None) if 60 < k < 145 else None
        if least is not None:
            found = sum(comb(k, g) * 0.625**g * 0.375 ** (k - g) for g in range(least, k + 1))
            power += comb(n, k) * 0.2**k * 0.8 ** (n - k) * found
    assert 0.74 < power < 0.84


def test_rows_needed_to_rule_a_loss_out_where_no_row_differs():
    """Tango's bound z²/(n+z²) is below the margin m from n = z²(1-m)/m on: 0.03 takes 88 rows."""
    rows = rows_for_difference(difference(*paired(0, 0, 30, 20)), -0.03)
    assert rows == 88
    assert tango(0, 0, rows, 0.95)[0] > -0.03 > tango(0, 0, rows - 1, 0.95)[0]


def test_rows_needed_for_a_floor_where_every_row_is_right():
    """Wilson's lower end of n of n is n/(n+z²): 0.9 from n = 9z² = 34.6 on."""
    rows = rows_for_floor([1] * 20, 0.9)
    assert rows == 35
    assert estimate([1] * rows).low >= 0.9 > estimate([1] * (rows - 1)).low


def test_rows_needed_for_what_was_seen_itself_are_none():
    assert rows_for_difference(difference(*paired(5, 5, 5, 5)), 0.0) is None
    assert rows_for_floor([1, 0], 0.5) is None
