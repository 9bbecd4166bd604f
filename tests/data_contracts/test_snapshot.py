"""A retrain's facts are compared with the last ones: chance is silent, a drift warns or blocks by the fact that moved."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from data_contracts.contract import ContractInvalid, contract_for
from data_contracts.facts import facts
from data_contracts.rows import read_rows
from data_contracts.snapshot import compare as compare_with
from data_contracts.snapshot import drift_contract, split_limits
from data_contracts.snapshot import judge_drift as judge_drift_with
from data_contracts.snapshot import snapshot as snapshot_with

LIMITS = drift_contract().limits
COLUMNS = {"prompt": "string", "chosen": "string", "rejected": "string"}


def snapshot(facts: pd.DataFrame) -> dict:
    return snapshot_with(facts, COLUMNS)


def compare(last: dict, facts: pd.DataFrame) -> pd.DataFrame:
    return compare_with(last, facts, COLUMNS)


def judge_drift(last: dict, facts: pd.DataFrame, limits: dict) -> list:
    return judge_drift_with(last, facts, COLUMNS, limits)


def drawn(n: int, seed: int, length: float = 1.0) -> pd.DataFrame:
    """Return facts as a preference set has them; the log of a length has the spread 0.57, so 30 % more is a PSI near 0.21."""
    rng = np.random.default_rng(seed)
    turns = rng.geometric(0.6, n)
    return pd.DataFrame(
        {
            "row": np.arange(n),
            "n_messages": turns * 2 + 1,
            "n_empty_messages": 0,
            "prompt_hash": [f"{number:016x}" for number in rng.integers(0, 2**60, n)],
            "n_held_out": rng.integers(1, 100),
            "prompt_roles": np.array(["", *("ua" * n + "u" for n in range(40))])[turns],
            "chosen_chars": (length * rng.lognormal(6, 0.57, n)).astype(int),
            "is_tie": rng.random(n) < 0.004,
            "len_ratio": rng.lognormal(0, 0.5, n),
        }
    )


def moved(last: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    return compare(snapshot(last), new).set_index("fact")


def values(**counts: int) -> pd.DataFrame:
    return pd.DataFrame({"fact": [value for value, count in counts.items() for _ in range(count)]})


def spoke(results) -> dict[str, str]:
    return {result.rule.removeprefix("drift-"): result.status for result in results if result.status != "PASS"}


def test_snapshot_of_thirty_facts_is_plain_json_of_a_few_kilobytes():
    few = drawn(5000, 0).drop(columns=["prompt_hash", "row", "n_held_out"])
    wide = pd.concat([few.add_suffix(f"_{number}") for number in range(5)], axis="columns")
    made = snapshot(wide)
    assert len(made["facts"]) == 30
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert len(json.dumps(made)) < 20_000


def test_snapshot_counts_every_row_once_and_leaves_out_what_only_names_it():
    made = snapshot(drawn(300, 0))
    assert made["num_rows"] == 300
    assert {sum(fact["counts"]) for fact in made["facts"].values()} == {300}
    kinds = {name: fact["kind"] for name, fact in made["facts"].items()}
    assert kinds == dict.fromkeys(["n_messages", "n_empty_messages", "chosen_chars", "len_ratio"], "numeric") | dict.fromkeys(
        ["prompt_roles", "is_tie"], "category"
    )


def test_snapshot_of_numbers_has_deciles_and_nothing_beyond_them():
    [fact] = snapshot(pd.DataFrame({"chars": range(1, 101)}))["facts"].values()
    assert fact["bins"][1:] == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert fact["counts"] == [0, *[10] * 10, 0]


def test_snapshot_of_many_values_keeps_the_fifty_most_frequent():
    """Value n stands n times, n = 1 to 60: the 10 that are left out have 1 + 2 + ... + 10 = 55 rows."""
    [fact] = snapshot(values(**{f"u{n}": n for n in range(1, 61)}))["facts"].values()
    assert set(fact["bins"]) == {f"u{n}" for n in range(11, 61)}
    assert fact["counts"][-1] == 55


@pytest.mark.parametrize("gap", [drawn(9, 0).iloc[:0], drawn(9, 0).assign(is_tie=None)], ids=["no rows", "nulls"])
def test_facts_that_no_contract_accepts_are_refused(gap):
    with pytest.raises(ValueError, match="contract"):
        snapshot(gap)
    with pytest.raises(ValueError, match="contract"):
        compare(snapshot(drawn(9, 0)), gap)


def test_psi_is_the_textbook_one():
    """Shares 0.5, 0.5 become 0.8, 0.2: 0.3 ln(0.8 / 0.5) - 0.3 ln(0.2 / 0.5) = 0.3 ln 4."""
    assert moved(values(u=50, ua=50), values(u=80, ua=20)).psi["fact"] == pytest.approx(0.3 * math.log(4))


def test_psi_of_a_bin_that_is_empty_counts_half_a_row_in_it():
    """Shares 0.5, 0.5 become 1 and 0.5 rows of 100: 0.5 ln(1 / 0.5) + (0.005 - 0.5) ln(0.005 / 0.5)."""
    gone = 0.5 * math.log(2) - 0.495 * math.log(0.01)
    assert moved(values(u=50, ua=50), values(u=100)).psi["fact"] == pytest.approx(gone)
    assert moved(values(u=100), values(u=50, ua=50)).psi["fact"] == pytest.approx(gone)


def test_noise_is_the_chi_squared_bound_for_both_sizes():
    noise = moved(values(u=50, ua=30, uau=20), values(u=20, ua=10, uau=10)).psi_noise["fact"]
    assert noise == pytest.approx(chi2.ppf(0.999, 2) * (1 / 100 + 1 / 40))


@pytest.mark.parametrize(("n_last", "n_new"), [(300, 300), (20_000, 20_000), (300, 20_000), (20_000, 300)])
def test_rows_of_one_distribution_are_silent(n_last, n_new):
    lasts = [drawn(n_last, seed) for seed in range(5)]
    for seed in range(50):
        table = moved(lasts[seed % 5], drawn(n_new, 100 + seed))
        assert table.psi_above_noise.max() < LIMITS["psi_warn_max"]
        assert table.n_new_values_above_noise.max() == 0
        assert table.is_known.all()


@pytest.mark.parametrize(("n_last", "n_new"), [(300, 20_000), (5000, 5000), (20_000, 300)])
def test_values_that_hardly_repeat_are_silent_though_a_snapshot_lists_some_of_them(n_last, n_new):
    """Fifty of them are in the snapshot by chance, and in no other set: without care a PSI of 1.5 for 300 and 20,000 rows."""
    codes = [
        pd.DataFrame({"fact": np.random.default_rng(s).integers(0, 10**6, n).astype(str)})
        for s, n in enumerate((n_last, n_new))
    ]
    assert moved(*codes).psi_above_noise["fact"] == 0
    assert moved(*codes).n_new_values["fact"] == 0


@pytest.mark.parametrize(("length", "statuses"), [(1.3, {"moderate": "WARN"}), (2, {"moderate": "WARN", "large": "FAIL"})])
def test_longer_replies_warn_and_twice_as_long_ones_block(length, statuses):
    last, new = (drawn(5000, seed, by).assign(prompt_roles="u") for seed, by in ((0, 1.0), (1, length)))
    results = judge_drift(snapshot(last), new, {})
    assert spoke(results) == statuses
    [found] = [result for result in results if result.rule == "drift-moderate"]
    assert found.example == f"chosen_chars PSI {moved(last, new).psi['chosen_chars']:.2f}"
    assert (found.finding(), found.rows) == ("1 of 6 facts (16.67%)", ())
    assert length == 2 or 0.15 < moved(last, new).psi["chosen_chars"] < 0.27


@pytest.mark.parametrize(
    ("n_rows", "limits", "statuses"),
    [
        (400, {}, {"new-value": "FAIL", "new-value-rare": "WARN"}),
        (1, {}, {"new-value-rare": "WARN"}),
        (400, {"new_values_max": 1, "psi_warn_max": 1}, {}),
    ],
    ids=["a twelfth of the rows", "one row", "allowed"],
)
def test_role_code_that_was_never_seen_blocks_unless_it_is_rare_or_allowed(n_rows, limits, statuses):
    new = drawn(5000, 1)
    new.loc[new.index[:n_rows], "prompt_roles"] = "sua"
    new.loc[new.index[n_rows:], "prompt_roles"] = "u"
    last = drawn(5000, 0).assign(prompt_roles="u")
    results = judge_drift(snapshot(last), new, {"psi_warn_max": 1, "psi_max": 1} | limits)
    assert spoke(results) == statuses
    assert {result.example for result in results if result.status != "PASS"} <= {"prompt_roles new value 'sua'"}


def test_new_value_is_beyond_chance_from_ten_rows_on_in_sets_of_one_size():
    """Each row of a value that both have alike is in either set by 1 / 2: nine in the new one are 1 in 512, ten 1 in 1024."""
    nine, ten = (moved(values(u=90), values(u=90 - n, su=n)) for n in (9, 10))
    assert (nine.n_new_values["fact"], nine.n_new_values_above_noise["fact"]) == (1, 0)
    assert (ten.n_new_values["fact"], ten.n_new_values_above_noise["fact"]) == (1, 1)


def test_new_values_are_not_counted_where_the_snapshot_lists_only_some():
    last = {f"u{n}": 10 for n in range(51)}
    assert moved(values(**last), values(**last, su=500)).n_new_values["fact"] == 0
    assert moved(values(**last), values(**last, su=500)).psi_above_noise["fact"] > LIMITS["psi_max"]


def test_boolean_that_was_never_true_moves_by_its_share_and_is_no_new_value():
    last = pd.DataFrame({"is_tie": [False] * 1000})
    few, many = (moved(last, last.assign(is_tie=np.arange(1000) < n)).loc["is_tie"] for n in (12, 500))
    assert (few.n_new_values, many.n_new_values) == (0, 0)
    assert few.psi_above_noise < LIMITS["psi_warn_max"] < LIMITS["psi_max"] < many.psi_above_noise


@pytest.mark.parametrize("value", [0, 2, 0.1, -7.5, 10**12])
def test_constant_is_silent_while_it_stays_and_seen_when_it_leaves_to_either_side(value):
    was = pd.DataFrame({"fact": [value] * 500})
    assert moved(was, was.iloc[:40]).psi["fact"] == 0
    for other in (value - 1, value + 1):
        assert moved(was, was.assign(fact=other)).psi_above_noise["fact"] > LIMITS["psi_max"]


def test_single_row_says_nothing_for_or_against():
    one = drawn(1, 0)
    assert moved(one, drawn(1, 1)).psi_above_noise.max() == 0
    assert (moved(one, one).psi == 0).all()


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"prompt": "string", "chosen": "string"}, "rejected is gone"),
        (COLUMNS | {"tools": "string"}, "tools is new (string)"),
        (COLUMNS | {"chosen": "list<struct>"}, "chosen was string and is list<struct>"),
    ],
    ids=["gone", "new", "of another type"],
)
def test_column_that_only_one_set_has_is_schema_drift_and_blocks(columns, told):
    last = drawn(300, 0)
    results = judge_drift_with(snapshot(last), last, columns, {})
    assert spoke(results) == {"schema": "FAIL"}
    assert [result.example for result in results if result.status == "FAIL"] == [told]


def test_fact_that_only_one_release_measures_is_no_drift_of_the_data():
    last = drawn(300, 0)
    for changed in (last.drop(columns="is_tie"), last.assign(is_echo=False), last.assign(is_tie=0)):
        assert spoke(judge_drift(snapshot(last), changed, {})) == {}
    assert "is_echo" not in set(compare(snapshot(last), last.assign(is_echo=False)).fact)


def test_example_names_three_facts_that_moved_the_most_first():
    last = pd.DataFrame({name: np.arange(1000) for name in ("a", "b", "c", "d")})
    new = pd.DataFrame({name: np.arange(1000) + shift for name, shift in zip(last, (200, 800, 400, 600), strict=True)})
    [large] = [result for result in judge_drift(snapshot(last), new, {}) if result.rule == "drift-large"]
    assert [said.split()[0] for said in large.example.split(", ")] == ["b", "d", "c"]


def test_limit_that_is_not_one_of_drift_or_could_not_hold_is_refused():
    last = drawn(10, 0)
    with pytest.raises(ContractInvalid, match="psi_max"):
        judge_drift(snapshot(last), last, {"psy_max": 1})
    for limits in ({"psi_max": -0.1}, {"new_values_max": -1}, {"psi_warn_max": "0.1"}):
        with pytest.raises(ContractInvalid, match=next(iter(limits))):
            judge_drift(snapshot(last), last, limits)


def test_limits_of_a_dataset_are_split_between_its_contract_and_drift():
    own, drift = split_limits({"ties_ratio_max": 0.1, "psi_max": 2, "quarantine_ratio_max": 0.1, "new_values_max": 3})
    assert (own, drift) == ({"ties_ratio_max": 0.1, "quarantine_ratio_max": 0.1}, {"psi_max": 2, "new_values_max": 3})
    assert contract_for("preference").with_limits(own).limits["ties_ratio_max"] == 0.1
    assert drift_contract().with_limits(drift).limits == LIMITS | drift


def test_drift_contract_says_what_follows_for_each_rule_and_names_columns_that_are_there():
    contract = drift_contract()
    assert all(len(rule["notes"].split()) >= 8 for rule in contract.expectations)
    named = {rule["kwargs"]["column"] for rule in contract.expectations if "column" in rule["kwargs"]}
    assert named <= set(compare(snapshot(drawn(9, 0)), drawn(9, 1)).columns) == set(contract.columns)


def test_facts_of_rows_of_every_kind_have_not_moved_from_themselves(kind_and_form, clean_rows, write_rows):
    kind, form = kind_and_form
    found = facts(read_rows(write_rows(clean_rows(kind, form, 60)), kind), kind)
    table = compare(json.loads(json.dumps(snapshot(found))), found)
    assert set(table.fact) == set(found.columns) - {"row", "prompt_hash", "n_held_out"}
    assert not table[["psi", "psi_above_noise", "n_new_values"]].any(axis=None)


FINITE = st.one_of(st.floats(-1e9, 1e9), st.sampled_from([0.0, 0.5, 1.0]))
ROWS = st.tuples(st.integers(-5, 5), FINITE, st.booleans(), st.text("suat-", max_size=4))
TABLES = st.lists(ROWS, min_size=1, max_size=40).map(lambda rows: pd.DataFrame(rows, columns=["n", "ratio", "is", "roles"]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TABLES, TABLES)
def test_any_facts_have_not_moved_from_themselves_and_any_two_compare_without_a_nan(one, other):
    last = json.loads(json.dumps(snapshot(one), allow_nan=False))
    same, table = compare(last, one), compare(last, other)
    assert (same.psi == 0).all() and (same.n_new_values == 0).all() and same.is_known.all()
    assert not table.isna().any(axis=None)
    assert np.isfinite(table[["psi", "psi_noise", "psi_above_noise"]]).all(axis=None)
    assert (table.psi >= 0).all() and (table.psi_above_noise >= 0).all()
