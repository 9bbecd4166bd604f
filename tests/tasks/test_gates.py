"""The gate's numbers against their closed formulas, and its reasons with the numbers in them."""

from math import comb, sqrt
from statistics import NormalDist

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from profiles.schema import Gates
from tasks.gates import estimate, judge, mcnemar_p

SCORES = st.lists(st.integers(0, 1), min_size=1, max_size=60)


def paired(gained: int, lost: int, both: int, neither: int) -> dict[str, list[int]]:
    """Scores on the same rows: the policy alone right on `gained`, base alone on `lost`."""
    policy = [1] * gained + [0] * lost + [1] * both + [0] * neither
    base = [0] * gained + [1] * lost + [1] * both + [0] * neither
    return {"base": base, "policy": policy}


def binomial_tail(gained: int, lost: int) -> float:
    """P(X >= gained) for X ~ Binomial(gained + lost, 1/2): under no difference each differing row is a fair coin."""
    n = gained + lost
    return sum(comb(n, k) for k in range(gained, n + 1)) / 2**n


@given(SCORES)
def test_estimate_is_wilsons_interval(scores):
    """(p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z the 97.5 % point of the normal distribution."""
    n, p, z = len(scores), sum(scores) / len(scores), NormalDist().inv_cdf(0.975)
    centre, half = p + z**2 / (2 * n), z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    found = estimate(scores)
    assert (found.value, found.n) == (p, n)
    assert found.low == pytest.approx((centre - half) / (1 + z**2 / n), abs=1e-9)
    assert found.high == pytest.approx((centre + half) / (1 + z**2 / n), abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 5), st.integers(0, 5))
def test_mcnemar_is_the_binomial_tail_of_the_rows_that_differ(gained, lost, both, neither):
    assume(gained + lost + both + neither > 0)
    scores = paired(gained, lost, both, neither)
    expected = binomial_tail(gained, lost) if gained + lost else 1.0
    assert mcnemar_p(scores["policy"], scores["base"]) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_five_wins_and_no_loss_is_one_in_thirty_two():
    assert mcnemar_p([1] * 5, [0] * 5) == pytest.approx(1 / 32)


def test_mcnemar_of_scores_on_other_rows_is_refused():
    with pytest.raises(ValueError):
        mcnemar_p([1, 1], [0])


def test_gate_passes_a_policy_that_is_better():
    """5 of 5: p = 1/32 < 0.05. Without a reason there is nothing to say."""
    verdict = judge(paired(5, 0, 10, 0), Gates(), "accuracy")
    assert verdict.passed and verdict.reasons == []


@pytest.mark.parametrize(
    ("gained", "lost"), [(4, 0), (0, 0), (0, 9), (6, 5)], ids=["too few rows", "equal", "worse", "a little better"]
)
def test_gate_refuses_a_policy_that_is_not_shown_to_be_better(gained, lost):
    verdict = judge(paired(gained, lost, 3, 3), Gates(), "accuracy")
    assert not verdict.passed
    [reason] = verdict.reasons
    n = gained + lost + 6
    assert "base" in reason and "accuracy" in reason and f"n={n}" in reason and "p_max 0.05" in reason
    assert f"p={binomial_tail(gained, lost):.3g}" in reason
    assert f"{(gained + 3) / n:.3f}" in reason and f"{(lost + 3) / n:.3f}" in reason


def test_gate_at_the_level_itself_refuses():
    """5 of 5 is p = 1/32 exactly."""
    assert not judge(paired(5, 0, 0, 0), Gates(p_max=1 / 32), "accuracy").passed
    assert judge(paired(5, 0, 0, 0), Gates(p_max=1 / 32 + 1e-9), "accuracy").passed


def test_gate_holds_the_policy_against_each_model_that_is_named():
    scores = {"policy": [1] * 20, "base": [0] * 20, "sft": [1] * 20}
    assert judge(scores, Gates(better_than=["base"]), "accuracy").passed
    [reason] = judge(scores, Gates(better_than=["base", "sft"]), "accuracy").reasons
    assert "sft" in reason and "base" not in reason


def test_gate_floor_is_held_against_the_lower_end_of_the_interval():
    """90 of 100 right: the value is over 0.85, Wilson's lower end (0.8256) is not."""
    scores = {"policy": [1] * 90 + [0] * 10}
    low = estimate(scores["policy"]).low
    assert 0.82 < low < 0.85
    [reason] = judge(scores, Gates(better_than=[], accuracy_min=0.85), "accuracy").reasons
    assert all(part in reason for part in ("0.900", "n=100", f"{low:.3f}", "accuracy_min 0.85"))
    assert judge(scores, Gates(better_than=[], accuracy_min=0.82), "accuracy").passed


def test_gate_gives_every_reason_at_once():
    verdict = judge(
        {"policy": [0] * 9, "base": [1] * 9, "sft": [1] * 9}, Gates(accuracy_min=0.5, better_than=["base", "sft"]), "accuracy"
    )
    assert len(verdict.reasons) == 3
