"""Great Expectations fails open in six ways (and some near ones); each is shown to fail closed here."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from data_contracts.contract import ContractInvalid, contract_for, judge, judge_by, read_contract
from data_contracts.facts import facts
from data_contracts.rows import read_rows

SHIPPED = Path(__file__).parents[2] / "data_contracts" / "preference.yaml"


@pytest.fixture
def clean_facts(write_rows, clean_rows) -> pd.DataFrame:
    rows = clean_rows("preference", "conversational", 10)
    return facts(read_rows(write_rows(rows), "preference"), "preference", {"another prompt"})


@pytest.fixture
def judged_with(tmp_path, clean_facts):
    """Judge clean facts by the shipped preference contract with one thing in it changed."""

    def judge_changed(change, rows: pd.DataFrame | None = None):
        spec = yaml.safe_load(SHIPPED.read_text())
        change(spec)
        path = tmp_path / "preference.yaml"
        path.write_text(yaml.safe_dump(spec))
        return judge_by(clean_facts if rows is None else rows, read_contract(path))

    return judge_changed


def rule(spec: dict, name: str) -> dict:
    return next(it for it in spec["expectations"] if it["meta"]["rule"] == f"preference-{name}")


def test_contract_unchanged_accepts_what_the_others_are_shown(judged_with):
    assert judged_with(lambda spec: None).passed


def test_expectation_of_a_misspelt_type_is_refused_with_its_neighbour(judged_with):
    def misspell(spec):
        rule(spec, "tie")["type"] = "expect_column_values_to_be_in_sett"

    with pytest.raises(ContractInvalid, match="expect_column_values_to_be_in_set "):
        judged_with(misspell)


def test_suite_that_is_empty_is_refused(judged_with):
    with pytest.raises(ContractInvalid):
        judged_with(lambda spec: spec.update(expectations=[], limits={}))


def test_table_that_is_empty_is_refused(clean_facts):
    verdict = judge(clean_facts.iloc[:0], "preference")
    assert not verdict.passed
    assert "preference-rows" in [result.rule for result in verdict.failures()]


@pytest.mark.parametrize("column", ["is_tie", "prompt_roles", "len_ratio", "row", "prompt_hash"])
def test_column_of_nulls_is_refused(column, clean_facts):
    verdict = judge(clean_facts.assign(**{column: None}), "preference")
    assert f"preference-known-{column.replace('_', '-')}" in [result.rule for result in verdict.failures()]


def test_column_with_one_null_is_refused_at_its_line(clean_facts):
    roles = clean_facts["prompt_roles"].where(clean_facts["row"] != 4)
    [known] = judge(clean_facts.assign(prompt_roles=roles), "preference").failures()
    assert (known.rule, known.rows) == ("preference-known-prompt-roles", (5,))


@pytest.mark.parametrize("severity", ["fatal", "Critical", None, "info"])
def test_expectation_of_a_bad_severity_is_refused(severity, judged_with):
    with pytest.raises(ContractInvalid, match="severity"):
        judged_with(lambda spec: rule(spec, "tie").update(severity=severity))


@pytest.mark.parametrize("column", ["prompt_roles", "chosen_roles", "rejected_roles"])
def test_value_with_a_trailing_newline_is_refused(column, clean_facts):
    verdict = judge(clean_facts.assign(**{column: clean_facts[column] + "\n"}), "preference")
    assert [result.rule for result in verdict.failures()] == [f"preference-{column.replace('_roles', '-order')}"]


@pytest.mark.parametrize("regex", ["^u$", "^(u|ua$)"])
def test_regex_that_a_trailing_newline_would_pass_is_refused(regex, judged_with):
    with pytest.raises(ContractInvalid, match="newline"):
        judged_with(lambda spec: rule(spec, "prompt-order")["kwargs"].update(regex=regex))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("prompt-order", {"regex": "(("}),
        ("prompt-order", {"column": "prompt_role"}),
        ("held-out-known", {"column": "prompt_roles"}),
    ],
)
def test_rule_that_cannot_be_judged_is_an_error_and_blocks_whatever_its_severity(name, kwargs, judged_with):
    verdict = judged_with(lambda spec: rule(spec, name)["kwargs"].update(kwargs))
    assert [(result.rule, result.status) for result in verdict.failures()] == [(f"preference-{name}", "ERROR")]


@pytest.mark.parametrize("kwargs", [{"mostly": 1.5}, {"colunm": "is_tie"}, {"mostly": "1 - ties_ratio_max"}])
def test_rule_with_impossible_arguments_is_refused(kwargs, judged_with):
    with pytest.raises(ContractInvalid):
        judged_with(lambda spec: rule(spec, "empty-text")["kwargs"].update(kwargs))


def test_facts_that_lack_a_column_are_refused(clean_facts):
    verdict = judge(clean_facts.drop(columns="is_tie"), "preference")
    assert {result.rule for result in verdict.failures()} == {"preference-tie", "preference-known-is-tie"}
    assert {result.status for result in verdict.failures()} == {"ERROR"}


def test_facts_of_another_kind_are_refused(clean_facts):
    assert not judge(clean_facts, "eval").passed


BREAKS = {
    "no row count": lambda spec: spec["expectations"].remove(rule(spec, "rows")),
    "row count only warned": lambda spec: rule(spec, "rows").update(severity="warning"),
    "no harm": lambda spec: rule(spec, "tie").update(notes=" "),
    "no rule id": lambda spec: rule(spec, "tie").update(meta={}),
    "rule twice": lambda spec: spec["expectations"].append(rule(spec, "tie")),
    "unknown key": lambda spec: rule(spec, "tie").update(enabled=False),
    "limit that nothing uses": lambda spec: spec["limits"].update(spare_ratio_max=0.1),
    "limit that is not set": lambda spec: spec["limits"].pop("ties_ratio_max"),
    "limit spelled in another way": lambda spec: rule(spec, "tie")["kwargs"].update(mostly="1-$ties_ratio_max"),
    "limit out of range": lambda spec: spec["limits"].update(ties_ratio_max=7),
    "rows_min of none": lambda spec: spec["limits"].update(rows_min=0),
    "version as a number": lambda spec: spec.update(version=2026.11),
    "unknown kind": lambda spec: spec.update(kind="pairs"),
    "unknown block": lambda spec: spec.update(skip=["tie"]),
}


@pytest.mark.parametrize("name", BREAKS)
def test_contract_that_is_wrong_itself_is_refused(name, judged_with):
    with pytest.raises(ContractInvalid):
        judged_with(BREAKS[name])


def test_contract_file_equals_what_is_shipped_under_its_name():
    assert read_contract(SHIPPED) == contract_for("preference")
