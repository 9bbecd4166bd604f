"""The gate's three verdicts: what is shown, what is shown not to be so, and what the rows cannot tell."""

import re
from math import nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.schema import Gates
from tasks.errors import ProfileError
from tasks.gates import Claim, Verdict, estimates, judge, weigh
from tasks.paired import difference, estimate, p_better

SHARES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)
VALUES = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=2, max_size=12)
ROWS = SHARES | VALUES.map(lambda rows: [(a / 4, b / 4) for a, b in rows])
# every kind of claim at once, none of which is impossible
ALL = Gates(floors={"m": 0.3}, better_than=["champion"], p_max=0.2, not_worse={"m": 0.2})
BETTER = Gates()
ANSWERS = ("PASS", "FAIL", "INCONCLUSIVE")


def paired(gained: int, lost: int, both: int = 0, neither: int = 0, other: str = "champion") -> dict[str, list[float]]:
    """0/1 scores on the same rows: the policy alone right on `gained`, the other alone on `lost`."""
    policy = [1] * gained + [0] * lost + [1] * both + [0] * neither
    return {other: [0] * gained + [1] * lost + [1] * both + [0] * neither, "policy": policy}


def only(scores: dict, gates: Gates = BETTER) -> Claim:
    """Judge one metric by gates that ask one thing."""
    verdict = judge({"accuracy": scores}, gates, "accuracy", None)
    [claim] = verdict.claims
    assert verdict.verdict == claim.verdict
    return claim


def numbers(claim: Claim) -> list[str]:
    return [claim.metric, f"n={claim.n}", f"{claim.estimate:.3f}", f"{claim.low:+.3f}", f"{claim.high:+.3f}"]


def test_policy_that_is_better_passes_with_its_numbers():
    """5 of 5: p = 1/32."""
    claim = only(paired(5, 0, 10))
    expected = difference(*map(np.array, (paired(5, 0, 10)["policy"], paired(5, 0, 10)["champion"])))
    assert (claim.verdict, claim.n, claim.p) == ("PASS", 15, pytest.approx(1 / 32))
    assert (claim.estimate, claim.low, claim.high, claim.limit) == (expected.value, expected.low, expected.high, 0.0)
    said = [*numbers(claim), "1.000", "0.667", "champion", "McNemar", "p=0.0312", "p_max 0.05", "gain_min 0"]
    assert [part for part in said if part not in claim.text] == []


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [((4, 0), "INCONCLUSIVE"), ((6, 5), "INCONCLUSIVE"), ((5, 6), "INCONCLUSIVE"), ((0, 9), "FAIL"), ((20, 60), "FAIL")],
)
def test_policy_that_is_not_shown_to_be_better_does_not_pass(counts, verdict):
    claim = only(paired(*counts, 3, 3))
    assert claim.verdict == verdict
    assert [part for part in [*numbers(claim), "p="] if part not in claim.text] == []
    assert ("rows would decide" in claim.text) == (verdict == "INCONCLUSIVE")


def test_policy_with_the_champions_answers_is_a_tie_however_many_rows_there_are():
    claim = only(paired(0, 0, 60_000, 40_000))
    assert claim.verdict == "INCONCLUSIVE" and "tie" in claim.text and "rows would decide" not in claim.text


def test_rows_that_would_decide_it_are_told_to_two_digits():
    """25 gained and 15 lost of 200 take Connor's 493 rows (tests/tasks/test_paired.py): 500."""
    assert "About 500 rows" in only(paired(25, 15, 100, 60)).text


def test_gain_and_loss_on_as_many_rows_is_decided_by_no_number_of_rows():
    claim = only(paired(50, 50, 900))
    assert claim.verdict == "INCONCLUSIVE" and "no number of rows" in claim.text


def test_level_itself_does_not_pass():
    """5 of 5 is p = 1/32 exactly."""
    assert only(paired(5, 0), Gates(p_max=1 / 32)).verdict == "INCONCLUSIVE"
    assert only(paired(5, 0), Gates(p_max=1 / 32 + 1e-9)).verdict == "PASS"


def test_gain_below_what_is_asked_does_not_pass_however_sure_it_is():
    """50 gained and 10 lost of 1,000 are 0.04 with p < 1e-6: enough for 0.04, too little for 0.05, far too little for 0.2."""
    scores = paired(50, 10, 940)
    assert [only(scores, Gates(gain_min=least)).verdict for least in (0.04, 0.05, 0.2)] == ["PASS", "INCONCLUSIVE", "FAIL"]
    assert "gain_min 0.05" in only(scores, Gates(gain_min=0.05)).text


def test_policy_is_held_against_each_model_that_is_named():
    scores = {"policy": [1] * 20, "base": [0] * 20, "sft": [1] * 20, "champion": [0] * 20}
    verdict = judge({"accuracy": scores}, Gates(better_than=["base", "sft", "champion"]), "accuracy", None)
    assert [claim.verdict for claim in verdict.claims] == ["PASS", "INCONCLUSIVE", "PASS"]
    assert [claim.asked for claim in verdict.open] == ["better than sft"]


def test_base_stands_in_for_a_champion_that_is_not_there_and_the_claim_says_so():
    claim = only(paired(9, 0, other="base"), Gates(better_than=["champion", "base"]))
    assert (claim.verdict, claim.asked) == ("PASS", "better than base, as there is no champion yet")
    assert "no champion yet" in claim.text
    guard = only(paired(9, 0, 99, other="base"), Gates(better_than=[], not_worse={"accuracy": 0.05}))
    assert guard.verdict == "PASS" and "no champion yet" in guard.text


@pytest.mark.parametrize(("least", "verdict"), [(0.82, "PASS"), (0.85, "INCONCLUSIVE"), (0.94, "INCONCLUSIVE"), (0.95, "FAIL")])
def test_floor_is_held_against_the_interval(least, verdict):
    """90 of 100 right: Wilson's interval is 0.8256 to 0.9448, so 0.9 itself is no answer to 0.85."""
    claim, e = (
        only({"policy": [1] * 90 + [0] * 10}, Gates(better_than=[], floors={"accuracy": least})),
        estimate([1] * 90 + [0] * 10),
    )
    assert (round(e.low, 4), round(e.high, 4)) == (0.8256, 0.9448)
    assert (claim.verdict, claim.estimate, claim.low, claim.high, claim.limit) == (verdict, 0.9, e.low, e.high, least)
    said = ["accuracy", "0.900", "n=100", "0.826", "0.945", f"{least:g}", "gates.floors"]
    assert [part for part in said if part not in claim.text] == []


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ((0, 0, 60, 40), "PASS"),
        ((0, 0, 40, 30), "INCONCLUSIVE"),
        ((5, 8, 400, 87), "PASS"),
        ((1, 12, 87, 0), "FAIL"),
        ((3, 9, 88, 0), "INCONCLUSIVE"),
    ],
)
def test_guard_passes_only_when_a_loss_of_the_margin_is_ruled_out(counts, verdict):
    """No differing row: Tango's bound z²/(n+z²) is 0.026 of 100 rows, 0.037 of 70. The margin is 0.03."""
    claim = only(paired(*counts), Gates(better_than=[], not_worse={"accuracy": 0.03}))
    assert (claim.verdict, claim.limit) == (verdict, -0.03)
    assert (claim.low > -0.03, claim.high < -0.03) == (verdict == "PASS", verdict == "FAIL")
    assert [part for part in [*numbers(claim), "0.03", "gates.not_worse", "champion"] if part not in claim.text] == []


def test_absence_of_a_significant_loss_is_no_proof_of_none():
    """3 lost, none gained of 40: McNemar finds no loss (p = 1/8), and yet a loss of a tenth is not ruled out."""
    scores = paired(0, 3, 37)
    assert p_better(*(np.array(scores[name]) for name in ("champion", "policy")))[0] == 1 / 8
    assert only(scores, Gates(better_than=[], not_worse={"accuracy": 0.1})).verdict == "INCONCLUSIVE"


def test_candidate_that_is_better_but_forgets_fails():
    scores = {"accuracy": paired(90, 10, 900), "mmlu/acc": paired(10, 90, 900)}
    verdict = judge(scores, Gates(not_worse={"mmlu/acc": 0.03}), "accuracy", None)
    assert (verdict.verdict, [claim.verdict for claim in verdict.claims]) == ("FAIL", ["PASS", "FAIL"])
    assert verdict.open[0].metric == "mmlu/acc"


def test_candidate_that_is_better_on_another_metric_than_the_gates_does_not_pass():
    scores = {"accuracy": paired(5, 5, 90), "reward/near_answer": paired(90, 0, 10)}
    assert judge(scores, Gates(), "accuracy", None).verdict == "INCONCLUSIVE"
    assert judge(scores, Gates(metric="reward/near_answer"), "accuracy", None).verdict == "PASS"


@pytest.mark.parametrize(
    ("wins", "ties", "losses", "verdict"),
    [(60, 100, 30, "PASS"), (30, 900, 28, "INCONCLUSIVE"), (0, 300, 0, "INCONCLUSIVE"), (30, 100, 60, "FAIL")],
)
def test_win_rate_is_judged_against_a_half_and_its_ties_decide_nothing(wins, ties, losses, verdict):
    scores = {"accuracy": paired(1, 0), "win_rate/champion": {"policy": [1.0] * wins + [0.5] * ties + [0.0] * losses}}
    [claim] = judge(scores, Gates(metric="win_rate/champion"), "accuracy", None).claims
    n = wins + ties + losses
    assert (claim.verdict, claim.metric, claim.n) == (verdict, "win_rate/champion", n)
    assert claim.estimate == pytest.approx((wins + 0.5 * ties) / n - 0.5)
    [floor] = judge(scores, Gates(better_than=[], floors={"win_rate/champion": 0.5}), "accuracy", None).claims
    assert floor.estimate == pytest.approx(0.5 + claim.estimate) and (floor.verdict == "PASS") == (verdict == "PASS")


def test_win_rate_over_the_champion_is_that_over_the_base_where_there_is_none():
    scores = {"accuracy": paired(1, 0, other="base"), "win_rate/base": {"policy": [1.0] * 9}}
    [claim] = judge(scores, Gates(metric="win_rate/champion"), "accuracy", None).claims
    assert (claim.verdict, claim.metric) == ("PASS", "win_rate/base") and "no champion yet" in claim.asked


def test_win_rate_over_one_model_says_nothing_about_another():
    scores = {"accuracy": paired(1, 0), "win_rate/sft": {"policy": [1.0] * 9}}
    with pytest.raises(ProfileError, match=r"gates\.metric 'win_rate/sft'.*champion"):
        judge(scores, Gates(metric="win_rate/sft"), "accuracy", None)


def asked(**changed: dict) -> dict:
    """What three models were asked with: the same, but for what is changed of one."""
    same = {"chat_template": "a" * 64, "tasks": {"mmlu": "t" * 64}}
    return {name: same | changed.get(name, {}) for name in ("base", "champion", "policy")}


def test_model_with_another_chat_template_is_not_compared_on_any_metric():
    scores = {metric: paired(50, 0) | {"base": [0] * 50} for metric in ("accuracy", "mmlu/acc")}
    gates = Gates(better_than=["champion", "base"], not_worse={"mmlu/acc": 0.05}, floors={"accuracy": 0.5})
    assert judge(scores, gates, "accuracy", asked()).verdict == "PASS"
    verdict = judge(scores, gates, "accuracy", asked(champion={"chat_template": "b" * 64}))
    assert verdict.verdict == "INCONCLUSIVE"
    assert [(c.asked, c.metric) for c in verdict.open] == [("comparable with champion", m) for m in ("accuracy", "mmlu/acc")]
    said = ["chat template", "a" * 12, "b" * 12, "evaluate again", "gates.better_than"]
    assert [part for part in said if part not in verdict.open[0].text] == []


@pytest.mark.parametrize("tasks", [{"mmlu": "u" * 64}, {}], ids=["another", "none"])
def test_model_with_another_task_is_not_compared_on_that_task_alone(tasks):
    scores = {metric: paired(50, 0) for metric in ("accuracy", "reward/x", "mmlu/acc")}
    gates = Gates(not_worse={"mmlu/acc": 0.05, "reward/x": 0.05})
    verdict = judge(scores, gates, "accuracy", asked(champion={"tasks": tasks}))
    assert [claim.metric for claim in verdict.open] == ["mmlu/acc"]
    assert "task mmlu" in verdict.open[0].text and "gates.not_worse" in verdict.open[0].text


def test_task_whose_definition_nobody_recorded_is_an_error():
    with pytest.raises(KeyError):
        judge({"accuracy": paired(9, 0), "arc/acc": paired(9, 0)}, Gates(metric="arc/acc"), "accuracy", asked())


@pytest.mark.parametrize(
    ("gates", "setting"),
    [
        (Gates(metric="acuracy"), "gates.metric"),
        (Gates(floors={"acuracy": 0.1}), "gates.floors"),
        (Gates(not_worse={"acuracy": 0.1}), "gates.not_worse"),
    ],
)
def test_metric_that_was_not_measured_is_an_error_that_names_what_was(gates, setting):
    with pytest.raises(ProfileError) as raised:
        judge({"accuracy": paired(9, 0), "mmlu/acc": paired(9, 0)}, gates, "accuracy", None)
    assert [part for part in (setting, "'acuracy'", "accuracy, mmlu/acc") if part not in str(raised.value)] == []


def test_model_that_was_not_asked_is_an_error_that_names_who_was():
    with pytest.raises(ProfileError, match=r"with sft.*champion, policy"):
        judge({"accuracy": paired(9, 0)}, Gates(better_than=["sft"]), "accuracy", None)


@pytest.mark.parametrize(
    "scores",
    [
        {"accuracy": {"policy": [1, 1], "champion": [0]}},
        {"accuracy": {"policy": [], "champion": []}},
        {"accuracy": {"champion": [0, 1]}},
        {"accuracy": {"policy": [1, nan], "champion": [0, 0]}},
        {"accuracy": {"policy": [1, 1], "champion": [0, float("inf")]}},
        {"accuracy": paired(9, 0), "mmlu/acc": {"policy": [1] * 9}},
        {"accuracy": paired(9, 0), "win_rate/champion": {"policy": [0.7] * 9}},
    ],
    ids=["other rows", "no rows", "no policy", "NaN", "infinity", "a model less", "no win rate"],
)
def test_scores_that_cannot_be_paired_are_an_error_and_never_a_verdict(scores):
    with pytest.raises(ValueError):
        judge(scores, Gates(better_than=[]), "accuracy", None)


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [("", "PASS"), ("PP", "PASS"), ("PI", "INCONCLUSIVE"), ("IPF", "FAIL"), ("FP", "FAIL")],
)
def test_verdict_is_that_of_the_worst_claim(answers, verdict):
    claims = [Claim("x", next(a for a in ANSWERS if a[0] == letter), "", "m") for letter in answers]
    assert weigh(claims) == Verdict(verdict, claims)


def test_gate_gives_every_claim_at_once():
    scores = {"policy": [0] * 9, "base": [1] * 9, "sft": [1] * 9}
    gates = Gates(floors={"accuracy": 0.5}, better_than=["base", "sft"], not_worse={"accuracy": 0.03})
    assert [claim.verdict for claim in judge({"accuracy": scores}, gates, "accuracy", None).claims] == ["FAIL"] * 4


def test_estimates_are_of_every_metric_and_model():
    scores = {"accuracy": paired(3, 1), "win_rate/champion": {"policy": [1, 0.5]}}
    found = estimates(scores)
    assert {metric: set(own) for metric, own in found.items()} == {m: set(own) for m, own in scores.items()}
    assert (found["accuracy"]["policy"].value, found["win_rate/champion"]["policy"].value) == (0.75, 0.75)


def verdicts(rows: list[tuple[float, float]], gates: Gates = ALL) -> list[str]:
    policy, champion = zip(*rows, strict=True)
    return [claim.verdict for claim in judge({"m": {"policy": policy, "champion": champion}}, gates, "m", None).claims]


@settings(deadline=None)
@given(ROWS, st.floats(0.001, 0.499))
def test_no_two_models_are_better_than_each_other(rows, p_max):
    gates = Gates(p_max=p_max)
    assert [verdicts(rows, gates), verdicts([(b, a) for a, b in rows], gates)] != [["PASS"], ["PASS"]]


@settings(deadline=None)
@given(ROWS, st.floats(0.001, 0.499))
def test_equal_model_is_never_better(rows, p_max):
    assert verdicts([(a, a) for a, _ in rows], Gates(p_max=p_max)) == ["INCONCLUSIVE"]


@settings(deadline=None)
@given(ROWS, st.randoms())
def test_order_of_the_rows_changes_no_verdict(rows, random):
    shuffled = random.sample(rows, len(rows))
    assert verdicts(rows) == verdicts(shuffled)


@settings(deadline=None, max_examples=50)
@given(ROWS, st.integers(2, 5))
def test_more_of_the_same_never_turns_one_answer_into_its_opposite(rows, times):
    assert {frozenset(pair) for pair in zip(verdicts(rows), verdicts(rows * times), strict=True)}.isdisjoint(
        {frozenset({"PASS", "FAIL"})}
    )


def test_rows_that_would_decide_a_least_gain_are_those_of_the_rule_itself():
    """13 gained and 7 lost of 100, a least gain of 0.05: simulated, the rule passes with power 0.8 at the rows it names."""
    rng = np.random.default_rng(0)
    gates = Gates(gain_min=0.05)
    seen = np.repeat([[1, 0], [0, 1], [1, 1]], [13, 7, 80], axis=0)
    text = only({"policy": seen[:, 0].tolist(), "champion": seen[:, 1].tolist()}, gates).text
    rows = int(re.search(r"About ([\d,]+) rows", text)[1].replace(",", ""))
    assert 1000 < rows < 2000
    passed = 0
    for _ in range(200):
        kinds = rng.choice(3, size=rows, p=[0.13, 0.07, 0.80])
        policy, champion = (kinds != 1).astype(float), (kinds != 0).astype(float)
        passed += only({"policy": policy.tolist(), "champion": champion.tolist()}, gates).verdict == "PASS"
    assert 0.70 < passed / 200 < 0.90


def test_margin_beyond_every_possible_loss_is_refused_with_the_span_of_the_scores():
    scores = {"policy": [0.0, 0.0, 1.0], "champion": [1.0, 1.0, 1.0]}
    with pytest.raises(ProfileError, match=r"gates.not_worse.x/metric is 3, but its scores lie within 1"):
        judge({"x/metric": scores}, Gates(better_than=[], not_worse={"x/metric": 3}), "x/metric", None)
